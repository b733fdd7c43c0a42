// Test only: the intrinsics of simd_*.h that a CPU with AVX2 lacks, so that their code runs there.
//
// The dot products and tiles are written out as Intel's Intrinsics Guide and manual define them. Every other AVX-512
// intrinsic used works on lanes or on 128-bit parts alone, so it is its AVX2 sibling on either half. An intrinsic that
// is missing here does not compile. What this cannot show is speed, and whether the compiler encodes the real ones.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
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

inline M512i dpbusd(const M512i& src, const M512i& a, const M512i& b) {
  return {dpbusd(src.low, a.low, b.low), dpbusd(src.high, a.high, b.high)};
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
inline M512i slli_epi16(const M512i& a, int bits) {
  return {_mm256_slli_epi16(a.low, bits), _mm256_slli_epi16(a.high, bits)};
}
inline M512i slli_epi32(const M512i& a, int bits) {
  return {_mm256_slli_epi32(a.low, bits), _mm256_slli_epi32(a.high, bits)};
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
RELU2_HALVES(M512i, xor_si512, _mm256_xor_si256)
RELU2_HALVES(M512i, unpacklo_epi8, _mm256_unpacklo_epi8)
RELU2_HALVES(M512i, unpackhi_epi8, _mm256_unpackhi_epi8)
RELU2_HALVES(M512i, unpacklo_epi16, _mm256_unpacklo_epi16)
RELU2_HALVES(M512i, unpackhi_epi16, _mm256_unpackhi_epi16)
RELU2_HALVES(M512i, add_epi32, _mm256_add_epi32)
RELU2_HALVES(M512i, sub_epi32, _mm256_sub_epi32)
RELU2_HALVES(M512, mul_ps, _mm256_mul_ps)
#undef RELU2_HALVES

// The eight tile registers of a thread. Where the CPU would raise #UD, this aborts.
struct Tiles {
  uint8_t palette = 0, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
  uint8_t data[8][16][64];

  void need(bool good) const {
    if (!good || palette != 1) std::abort();
  }
};
inline Tiles& tiles() {
  thread_local Tiles t;
  return t;
}

inline void tile_loadconfig(const void* config) {
  Tiles& t = tiles();
  std::memcpy(static_cast<void*>(&t), config, 64);
  std::memset(t.data, 0, sizeof t.data);
  for (int i = 0; i < 8; i++) t.need(t.rows[i] <= 16 && t.row_bytes[i] <= 64);
}
inline void tile_release() {
  tiles().palette = 0;
}
inline void tile_zero(int to) {
  tiles().need(true);
  std::memset(tiles().data[to], 0, sizeof tiles().data[to]);
}
inline void tile_loadd(int to, const void* base, size_t stride) {
  Tiles& t = tiles();
  t.need(t.rows[to] > 0);
  for (size_t r = 0; r < t.rows[to]; r++)
    std::memcpy(t.data[to][r], static_cast<const uint8_t*>(base) + r * stride, t.row_bytes[to]);
}
inline void tile_stored(int from, void* base, size_t stride) {
  Tiles& t = tiles();
  t.need(t.rows[from] > 0);
  for (size_t r = 0; r < t.rows[from]; r++)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, t.data[from][r], t.row_bytes[from]);
}
// TDPBSSD, TDPBUSD: c[m][n] += the four bytes of a[m][k] (signed, unsigned) times those of b[k][n] (signed)
template <class A, class B>
void tile_dp(int c, int a, int b) {
  Tiles& t = tiles();
  t.need(t.rows[c] == t.rows[a] && t.row_bytes[c] == t.row_bytes[b] && t.row_bytes[a] == t.rows[b] * 4);
  for (size_t m = 0; m < t.rows[c]; m++)
    for (size_t k = 0; k < t.rows[b]; k++)
      for (size_t n = 0; n * 4 < t.row_bytes[b]; n++) {
        uint32_t sum;
        std::memcpy(&sum, &t.data[c][m][n * 4], 4);
        for (size_t i = 0; i < 4; i++)
          sum += static_cast<uint32_t>(static_cast<A>(t.data[a][m][k * 4 + i]) * static_cast<B>(t.data[b][k][n * 4 + i]));
        std::memcpy(&t.data[c][m][n * 4], &sum, 4);
      }
}

}  // namespace emulated
}  // namespace

#undef _mm256_dpbusd_avx_epi32
#undef _mm512_dpbusd_epi32
#undef _mm512_srli_epi16
#undef _mm512_slli_epi16
#undef _mm512_cvtph_ps
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbusd
#define __m512i emulated::M512i
#define __m512 emulated::M512
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd
#define _mm512_dpbusd_epi32 emulated::dpbusd
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_xor_si512 emulated::xor_si512
#define _mm512_slli_epi16 emulated::slli_epi16
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_unpacklo_epi8 emulated::unpacklo_epi8
#define _mm512_unpackhi_epi8 emulated::unpackhi_epi8
#define _mm512_unpacklo_epi16 emulated::unpacklo_epi16
#define _mm512_unpackhi_epi16 emulated::unpackhi_epi16
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbssd emulated::tile_dp<int8_t, int8_t>
#define _tile_dpbusd emulated::tile_dp<uint8_t, int8_t>
