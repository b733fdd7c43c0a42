// Test only: both VNNI variants as they are, over emulated instructions. The library has neither this file nor them.
#include "emulated_intrinsics.h"

#include "kernels_avx2vnni.cpp"
#include "kernels_avx512vnni.cpp"

namespace relu2 {

// Whether the emulated dot products give what older instructions of this CPU give in several steps. VPMADDUBSW would
// saturate for bytes above 127, so it gets their low seven bits and their top bits in turn.
bool emulation_is_exact(const uint8_t (&bytes)[96]) {
  const auto load = [&](int at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + at)); };
  const auto same = [](__m256i a, __m256i b) { return _mm256_movemask_epi8(_mm256_cmpeq_epi32(a, b)) == -1; };
  const __m256i src = load(0), a = load(32), b = load(64), ones = _mm256_set1_epi16(1);
  const auto part = [&](int mask) {
    const __m256i some = _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(mask)));
    return _mm256_madd_epi16(_mm256_maddubs_epi16(some, b), ones);
  };
  const __m256i sum = _mm256_add_epi32(src, _mm256_add_epi32(part(0x7f), part(0x80)));
  return same(emulated::dpbusd(src, a, b), sum) &&
         same(emulated::dpwssd(src, a, b), _mm256_add_epi32(src, _mm256_madd_epi16(a, b)));
}

}  // namespace relu2
