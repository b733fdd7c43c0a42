// Test only: the intrinsics of simd_avx2.h and simd_avx512.h that a CPU with AVX2 lacks, so that their code runs there.
//
// The two dot products are written out lane by lane as Intel's Intrinsics Guide defines them. Every other AVX-512
// intrinsic used works on lanes or on 128-bit parts alone, so it is its AVX2 sibling on either half. An intrinsic that
// is missing here does not compile. What this cannot show is speed, and whether the compiler encodes the real ones.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {
namespace emulated {

struct M512i {
  __m256i low, high;
};
struct M512 {
  __m256 low, high;
};

// VPDPBUSD: tmp1..4 := ZeroExtend16(a.byte) * SignExtend16(b.byte); dst.dword := src.dword + tmp1 + .. + tmp4
inline __m256i dpbusd(__m256i src, __m256i a, __m256i b) {
  uint32_t dword[8];
  uint8_t x[32];
  int8_t y[32];
  std::memcpy(dword, &src, 32);
  std::memcpy(x, &a, 32);
  std::memcpy(y, &b, 32);
  for (int i = 0; i < 32; i++) dword[i / 4] += static_cast<uint32_t>(x[i] * y[i]);  // wraps, no saturation
  std::memcpy(&src, dword, 32);
  return src;
}

// VPDPWSSD: tmp1..2 := SignExtend32(a.word) * SignExtend32(b.word); dst.dword := src.dword + tmp1 + tmp2
inline __m256i dpwssd(__m256i src, __m256i a, __m256i b) {
  uint32_t dword[8];
  int16_t x[16], y[16];
  std::memcpy(dword, &src, 32);
  std::memcpy(x, &a, 32);
  std::memcpy(y, &b, 32);
  for (int i = 0; i < 16; i++) dword[i / 2] += static_cast<uint32_t>(x[i] * y[i]);
  std::memcpy(&src, dword, 32);
  return src;
}

inline M512i dpbusd(const M512i& src, const M512i& a, const M512i& b) {
  return {dpbusd(src.low, a.low, b.low), dpbusd(src.high, a.high, b.high)};
}
inline M512i dpwssd(const M512i& src, const M512i& a, const M512i& b) {
  return {dpwssd(src.low, a.low, b.low), dpwssd(src.high, a.high, b.high)};
}

inline M512i loadu_si512(const void* p) {
  const auto* half = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)};
}
inline void storeu_si512(void* p, const M512i& a) {
  auto* half = static_cast<__m256i*>(p);
  _mm256_storeu_si256(half, a.low);
  _mm256_storeu_si256(half + 1, a.high);
}
inline M512 loadu_ps(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline void storeu_ps(float* p, const M512& a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
inline M512i set1_epi32(int32_t v) {
  return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)};
}
inline M512 set1_ps(float v) {
  return {_mm256_set1_ps(v), _mm256_set1_ps(v)};
}

inline M512i srli_epi16(const M512i& a, int bits) {
  return {_mm256_srli_epi16(a.low, bits), _mm256_srli_epi16(a.high, bits)};
}
inline M512i cvtepu8_epi32(__m128i a) {
  return {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))};
}
inline M512 cvtepi32_ps(const M512i& a) {
  return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}
inline M512 cvtph_ps(__m256i a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}
inline M512 fmadd_ps(const M512& a, const M512& b, const M512& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

#define RELU2_HALVES(T, name, sibling)                       \
  inline T name(const T& a, const T& b) {                    \
    return {sibling(a.low, b.low), sibling(a.high, b.high)}; \
  }
RELU2_HALVES(M512i, and_si512, _mm256_and_si256)
RELU2_HALVES(M512i, unpacklo_epi8, _mm256_unpacklo_epi8)
RELU2_HALVES(M512i, unpackhi_epi8, _mm256_unpackhi_epi8)
RELU2_HALVES(M512i, unpacklo_epi16, _mm256_unpacklo_epi16)
RELU2_HALVES(M512i, unpackhi_epi16, _mm256_unpackhi_epi16)
RELU2_HALVES(M512i, mullo_epi32, _mm256_mullo_epi32)
RELU2_HALVES(M512i, sub_epi32, _mm256_sub_epi32)
RELU2_HALVES(M512, mul_ps, _mm256_mul_ps)
#undef RELU2_HALVES

}  // namespace emulated
}  // namespace

#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_avx_epi32
#undef _mm512_dpbusd_epi32
#undef _mm512_dpwssd_epi32
#undef _mm512_srli_epi16
#undef _mm512_cvtph_ps
#define __m512i emulated::M512i
#define __m512 emulated::M512
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd
#define _mm256_dpwssd_avx_epi32 emulated::dpwssd
#define _mm512_dpbusd_epi32 emulated::dpbusd
#define _mm512_dpwssd_epi32 emulated::dpwssd
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_unpacklo_epi8 emulated::unpacklo_epi8
#define _mm512_unpackhi_epi8 emulated::unpackhi_epi8
#define _mm512_unpacklo_epi16 emulated::unpacklo_epi16
#define _mm512_unpackhi_epi16 emulated::unpackhi_epi16
#define _mm512_mullo_epi32 emulated::mullo_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
