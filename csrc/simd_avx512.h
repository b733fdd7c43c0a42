// 16 lanes: AVX-512 (F, BW, VL) with VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "layout.h"

namespace {

struct Avx512Vnni {
  static constexpr int kLanes = 16;
  static constexpr int kTile = 16;
  static constexpr bool kMatrix = false;
  using I = __m512i;
  using F = __m512;

  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, I a) { _mm512_storeu_si512(p, a); }
  // Forced to be inlined: GCC drops calls of a function that only prefetches, for it has no effect.
  RELU2_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
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

  static I dot8(I acc, I w, I x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static I dot16(I acc, I w, I x) { return _mm512_dpwssd_epi32(acc, w, x); }
  static I mul32(I a, I b) { return _mm512_mullo_epi32(a, b); }
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
