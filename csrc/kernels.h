// The kernels that exist once per instruction set, and the choice among them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace relu2 {

// Tokens of a long prompt that go together: their outputs (640 KiB at hidden 2560) stay in the second-level cache
// while the weights pass, and 64 is enough for arithmetic to outweigh reading the weights again.
constexpr size_t kChunk = 64;

// Slots that a matrix unit takes at a time.
constexpr size_t kMatrixSlots = 16;

// Quantized activations. An 8-bit token is one row of bytes. A 16-bit token is two where there is a dot product of bytes:
// a value is high * 256 + low, which is exact. Elsewhere it is one row of 16-bit words. Rows are "slots"; slot s belongs
// to token s / planes.
//
// Every 32-bit "unit" holds four consecutive inputs of one slot as bytes, or as words the first and third of them, and
// the next unit the other two. Slots are grouped in tiles (see Tiles). Group g of the tile that begins at slot t is at
// units[g * slots * (units of a whole group) + t * u], where u is the number of units of a slot in that group, ordered
// [unit][slot of the tile]; for a matrix unit it is [slot of the tile][unit]. Scales and offsets are [group][slot].
struct Activations {
  int32_t* units = nullptr;
  float* scales = nullptr;  // one per `group` inputs; zero where all of them are
  float* offsets = nullptr;  // sums of the values of a group as they were rounded, for the zero points
  size_t inputs = 0;        // padded
  size_t group = 0;
  size_t tokens = 0;
  size_t planes = 1;
  bool words = false;

  RELU2_INLINE size_t groups() const { return (inputs + group - 1) / group; }
  RELU2_INLINE size_t slots() const { return tokens * planes; }
  RELU2_INLINE size_t group_units(size_t g) const {
    const size_t begin = g * group;
    return ((begin + group < inputs ? begin + group : inputs) - begin) >> (words ? 1 : 2);
  }
  RELU2_INLINE int32_t* at(size_t g, size_t slot) const {
    return units + g * slots() * (group >> (words ? 1 : 2)) + slot * group_units(g);
  }
};

// Slots in tiles of balanced widths, `widest` at most: 8 slots in tiles of 6 are 4 + 4, 16 are 5 + 5 + 6. Tiles of a
// matrix unit are full but for the last, so that both planes of a token are in one.
struct Tiles {
  size_t slots, count, width, narrow;  // the first `narrow` tiles have that width, the others one more

  RELU2_INLINE Tiles(size_t slots_, size_t widest)
      : slots(slots_), count((slots + widest - 1) / widest), width(widest), narrow(count) {
    if (widest < kMatrixSlots && count > 0) width = slots / count, narrow = count - slots % count;
  }
  RELU2_INLINE size_t begin(size_t i) const {
    const size_t slot = i * width + (i > narrow ? i - narrow : 0);
    return slot < slots ? slot : slots;
  }
};

// Cache lines of the phase that comes next, fetched a few at a time while the present one computes, so that memory
// never waits for arithmetic. Either whole rows one after the other (rows of DOWN), or rows side by side (records of UP
// that are read together).
struct Fetch {
  const uint8_t* row[kMaxGroup + 16];
  size_t rows = 0, row_bytes = 0, side = 1;
  size_t next_row = 0, next_byte = 0;

  RELU2_INLINE void begin(size_t rows_, size_t row_bytes_, size_t side_) {
    rows = rows_, row_bytes = row_bytes_, side = side_, next_row = next_byte = 0;
  }
  RELU2_INLINE size_t lines() const { return rows * (row_bytes / kPiece); }
};

struct Kernels {
  const char* name;
  bool words;   // 16-bit activations are words, and no slower than bytes: there is no dot product of bytes
  size_t few;   // slots that are computed straight from packed weights, in one tile
  size_t tile;  // widest tile of more slots
  size_t rows;  // the number of rows that `down` takes is a multiple of it where there are more slots, else of 4
  size_t wide;  // from so many tokens on, 16-bit activations in large groups take less time than 8-bit ones in small

  // Quantizes the tokens of a tile that begins at `slot`: rows of `x` to signed bytes; false if a value is not finite.
  bool (*quantize)(const float* x, size_t stride, size_t size, const Activations& to, size_t slot, size_t width);

  // z[token * stride + 0 .. 16 * count) = the neurons of `count` blocks for all tokens. Fetches all of `next` meanwhile.
  void (*up)(const UpMatrix& up, size_t block, size_t count, const Activations& x, float* z, size_t stride,
             Fetch* next);

  // Neurons of a group that are above the threshold for any token, ascending; returns their number.
  size_t (*active)(const float* z, size_t stride, size_t tokens, size_t count, float threshold, uint8_t* rows);

  // Squares of the first `count` neurons in `rows` as unsigned bytes, for DOWN with weights of so many bits; zeros for
  // the rest of to.inputs. Those not above the threshold for a token are zero. Sets finite[token] to false where a square is not finite.
  void (*squares)(const float* z, size_t stride, float threshold, const uint8_t* rows, size_t count, int bits,
                  const Activations& to, bool* finite);

  // y[token * stride + 0 .. padded outputs) += rows of one group times the squares of all tokens.
  void (*down)(const DownMatrix& down, size_t g, const uint8_t* rows, const Activations& h, float* y, size_t stride,
               Fetch* next);
};

// Kernels by name ("amx", "avx512vnni", "avx2vnni", "avx2", "portable", or "portable8" and "portable16", which walk the
// loops of the wider variants and exist for tests); null if this build or this CPU lacks them.
const Kernels* kernels_by_name(const char* name);

// The fastest that this CPU runs.
const Kernels& best_kernels();

// 16 for one token, which loses nothing while reading weights is what takes the time; 8 for several where there is a dot
// product of bytes, as stock OpenVINO computes with compressed weights on such a CPU. Elsewhere stock does not round
// activations, and neither do we.
int default_activation_bits(const Kernels& kernels, size_t tokens);

extern const Kernels kPortable4, kPortable8, kPortable16;
#ifdef RELU2_AVX2
extern const Kernels kAvx2;
#endif
#ifdef RELU2_AVX2VNNI
extern const Kernels kAvx2Vnni;
#endif
#ifdef RELU2_AVX512VNNI
extern const Kernels kAvx512Vnni;
#endif
#ifdef RELU2_AMX
extern const Kernels kAmx;
#endif

}  // namespace relu2
