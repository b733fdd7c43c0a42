// 8 lanes: AVX2 with FMA and F16C; AVX-VNNI replaces the two dot products.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "layout.h"

namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kTile = 4;  // 4 tokens x 16 neurons are 8 accumulators of the 16 registers
  static constexpr bool kMatrix = false;
  using I = __m256i;
  using F = __m256;

  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  // Forced to be inlined: GCC drops calls of a function that only prefetches, for it has no effect.
  RELU2_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
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

  static I dot8(I acc, I w, I x) {
#ifdef RELU2_AVXVNNI_PRIMITIVE
    return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
    // maddubs would saturate for int8 weights: widen even and odd bytes instead.
    const I even =
        _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const I odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
  }
  static I dot16(I acc, I w, I x) {
#ifdef RELU2_AVXVNNI_PRIMITIVE
    return _mm256_dpwssd_avx_epi32(acc, w, x);
#else
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w, x));
#endif
  }
  static I mul32(I a, I b) { return _mm256_mullo_epi32(a, b); }
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
