// 8 lanes: AVX2 with FMA and F16C; AVX-VNNI replaces the two dot products.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "layout.h"

// AVX-VNNI has an encoding of its own; the one of AVX-512 VNNI is for timing on a CPU that lacks it.
#ifdef RELU2_TIME_AS_AVX512
#define RELU2_VEX ""
#else
#define RELU2_VEX "%{vex%} "
#endif

#ifdef RELU2_AVXVNNI_PRIMITIVE
#define RELU2_PAIRS false
#else
#define RELU2_PAIRS true
#endif

namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
#ifdef RELU2_AVXVNNI_PRIMITIVE
  static constexpr bool kWords = false;
  static constexpr int kSlots = 6;  // 12 sums, 2 vectors of weights and a broadcast are 15 of 16 registers
  static constexpr int kNibble = 16;
#else
  static constexpr bool kWords = true;
  static constexpr int kSlots = 4;  // the dot product takes registers, too
  static constexpr int kNibble = 1;
#endif
  static constexpr bool kMatrix = false;
  struct alignas(32) Constant {
    uint64_t v[4];
  };
  static constexpr Constant kLowNibbles = {{0x0f0f0f0f0f0f0f0f, 0x0f0f0f0f0f0f0f0f, 0x0f0f0f0f0f0f0f0f, 0x0f0f0f0f0f0f0f0f}};
  static constexpr Constant kOnes = {{0x0001000100010001, 0x0001000100010001, 0x0001000100010001, 0x0001000100010001}};
  using I = __m256i;
  using F = __m256;

  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  // Forced to be inlined: GCC drops calls of a function that only prefetches, for it has no effect.
  RELU2_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  RELU2_INLINE static void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static I set1(int32_t v) { return _mm256_set1_epi32(v); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  template <int kBits>
  static I srl16(I a) {
    return _mm256_srli_epi16(a, kBits);
  }
  static I unpack_lo8(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
  static I unpack_hi8(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
  static I unpack_lo16(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
  static I unpack_hi16(I a, I b) { return _mm256_unpackhi_epi16(a, b); }

  // Constants that stay in memory, for they would take one of 16 registers; and sums that stay in their register, where
  // GCC otherwise copies them around and spills some.
  RELU2_INLINE static I low_nibbles(I v) {
#if defined(_MSC_VER) || defined(RELU2_EMULATE)
    return bit_and(v, _mm256_set1_epi8(0x0f));
#else
    __asm__("vpand %1, %0, %0" : "+x"(v) : "m"(kLowNibbles));
    return v;
#endif
  }
  RELU2_INLINE static I pair_sums(I v) {
#if defined(_MSC_VER) || defined(RELU2_EMULATE)
    return _mm256_madd_epi16(v, _mm256_set1_epi16(1));
#else
    __asm__("vpmaddwd %1, %0, %0" : "+x"(v) : "m"(kOnes));
    return v;
#endif
  }
  RELU2_INLINE static I plus(I acc, I v) {
#if defined(_MSC_VER) || defined(RELU2_EMULATE)
    return _mm256_add_epi32(acc, v);
#else
    __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(v));
    return acc;
#endif
  }
  static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
#ifdef RELU2_AVXVNNI_PRIMITIVE
  // See Avx512Vnni.
  static I signed_high(I v) { return bit_and(bit_xor(v, _mm256_set1_epi8(-0x78)), _mm256_set1_epi8(-0x10)); }
  static I signed_low(I v) { return signed_high(_mm256_slli_epi16(v, 4)); }
#else
  static I signed_low(I v) { return _mm256_sub_epi8(bit_and(v, _mm256_set1_epi8(15)), _mm256_set1_epi8(8)); }
  static I signed_high(I v) { return signed_low(_mm256_srli_epi16(v, 4)); }
#endif

  // acc + four products of unsigned and signed bytes; kSmall: two of them fit into 16 bits.
  template <bool kSmall>
  RELU2_INLINE static I dot(I acc, I u, I s) {
#if defined(RELU2_AVXVNNI_PRIMITIVE) && (defined(_MSC_VER) || defined(RELU2_EMULATE))
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#elif defined(RELU2_AVXVNNI_PRIMITIVE)  // see Avx512Vnni
    __asm__(RELU2_VEX "vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(s));
    return acc;
#else
    if constexpr (kSmall) return plus(acc, pair_sums(_mm256_maddubs_epi16(u, s)));
    // maddubs would saturate: even and odd bytes of `u` in turn, widened.
    const I even =
        _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const I odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return plus(acc, _mm256_add_epi32(even, odd));
#endif
  }
  // acc + two products of words
  RELU2_INLINE static I dot_words(I acc, I a, I b) { return plus(acc, _mm256_madd_epi16(a, b)); }
  // Two of `dot`; products that fit into 16 bits are added there, so that one widening serves both.
  static constexpr bool kPairs = RELU2_PAIRS;
  RELU2_INLINE static I dot_pair(I acc, I u0, I s0, I u1, I s1) {
    const I sum = _mm256_add_epi16(_mm256_maddubs_epi16(u0, s0), _mm256_maddubs_epi16(u1, s1));
    return plus(acc, pair_sums(sum));
  }
  RELU2_INLINE static I keep(I a) {
#if !defined(_MSC_VER) && !defined(RELU2_EMULATE)
    __asm__("" : "+x"(a));
#endif
    return a;
  }
  static I add32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I load_u8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }

  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static F load_float(const float* p) { return _mm256_loadu_ps(p); }
  static void store_float(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F set1_float(float v) { return _mm256_set1_ps(v); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};

}  // namespace
