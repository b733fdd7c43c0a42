// 16 lanes: AVX-512 (F, BW, VL) with VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "layout.h"

namespace {

struct Avx512Vnni {
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 4;  // a tile of 4 vectors x 6 slots takes 24 of 32 registers
  static constexpr int kSlots = 6;
  static constexpr int kNibble = 16;
  static constexpr bool kMatrix = false;
  static constexpr bool kWords = false;
  static constexpr bool kPairs = false;  // no faster way to two dot products at once
  using I = __m512i;
  using F = __m512;

  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, I a) { _mm512_storeu_si512(p, a); }
  // Forced to be inlined: GCC drops calls of a function that only prefetches, for it has no effect.
  RELU2_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  RELU2_INLINE static void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static I set1(int32_t v) { return _mm512_set1_epi32(v); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  template <int kBits>
  static I srl16(I a) {
    return _mm512_srli_epi16(a, kBits);
  }
  static I unpack_lo8(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
  static I unpack_hi8(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
  static I unpack_lo16(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
  static I unpack_hi16(I a, I b) { return _mm512_unpackhi_epi16(a, b); }

  static I low_nibbles(I v) { return bit_and(v, set1(0x0f0f0f0f)); }
  static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  // Codes c of 4 bits as signed bytes 16 (c - 8): c ^ 8 is c - 8 in two's complement, and in the high half of a byte it
  // is 16 times that.
  static I signed_high(I v) { return _mm512_and_si512(_mm512_xor_si512(v, set1(static_cast<int32_t>(0x88888888))), set1(static_cast<int32_t>(0xf0f0f0f0))); }
  static I signed_low(I v) { return signed_high(_mm512_slli_epi16(v, 4)); }

  // acc + four products of unsigned and signed bytes. kSmall, that two of them fit into 16 bits, does not matter here.
  // GCC copies every accumulator around the intrinsic and spills those of a wide tile; this it leaves where it is.
  template <bool kSmall>
  RELU2_INLINE static I dot(I acc, I u, I s) {
#if defined(_MSC_VER) || defined(RELU2_EMULATE)
    return _mm512_dpbusd_epi32(acc, u, s);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
    return acc;
#endif
  }
  // Keeps a broadcast in a register instead of in each of its uses.
  RELU2_INLINE static I keep(I a) {
#if !defined(_MSC_VER) && !defined(RELU2_EMULATE)
    __asm__("" : "+v"(a));
#endif
    return a;
  }
  static I add32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I times256(I a) { return _mm512_slli_epi32(a, 8); }
  static I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F load_float(const float* p) { return _mm512_loadu_ps(p); }
  static void store_float(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F set1_float(float v) { return _mm512_set1_ps(v); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

}  // namespace
