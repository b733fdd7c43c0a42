// Test only: the VNNI and AMX variants as they are, over emulated instructions. The library has none of this.
#include "emulated_intrinsics.h"

#include "kernels_avx2vnni.cpp"
#include "kernels_avx512vnni.cpp"

#include "kernels_amx.cpp"

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
  // One row of tiles: the first four bytes of b with each four of a.
  const auto tile = [&](auto&& multiply) {
    emulated::Tiles& t = emulated::tiles();
    t.palette = 1, t.rows[0] = t.rows[1] = t.rows[2] = 1, t.row_bytes[0] = t.row_bytes[2] = 32, t.row_bytes[1] = 4;
    std::memcpy(t.data[0][0], bytes, 32), std::memcpy(t.data[1][0], bytes + 64, 4);
    std::memcpy(t.data[2][0], bytes + 32, 32);
    multiply(0, 1, 2);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.data[0][0]));
  };
  // The tile's product of a row of four bytes with columns is the dot product with the row in every lane.
  const __m256i row = _mm256_broadcastd_epi32(_mm256_castsi256_si128(b));
  const __m256i top = _mm256_set1_epi8(-128);  // a signed byte is an unsigned one, of which the top bit is flipped, less 128
  const __m256i both_signed = _mm256_sub_epi32(emulated::dpbusd(src, _mm256_xor_si256(a, top), row),
                                               emulated::dpbusd(_mm256_setzero_si256(), top, row));
  return same(emulated::dpbusd(src, a, b), sum) && same(tile(emulated::tile_dp<int8_t, int8_t>), both_signed) &&
         same(tile(emulated::tile_dp<uint8_t, int8_t>), emulated::dpbusd(src, row, a));
}

}  // namespace relu2
