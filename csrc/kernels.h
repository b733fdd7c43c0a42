// The kernels that exist once per instruction set, and the choice among them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace relu2 {

// Tokens of a long prompt that go together: their outputs (640 KiB at hidden 2560) stay in the second-level cache
// while the weights pass, and 64 is enough for arithmetic to outweigh reading the weights again.
constexpr size_t kChunk = 64;

// Quantized activations of several tokens, kChunk at most. Every 32-bit word ("unit") holds what one lane of a dot
// product consumes: four int8 inputs, or inputs (0, 2) and then (1, 3) of four as int16. Tokens are grouped in tiles of
// `width` <= max tokens (see next_tile); inside a tile units, scales and sums are [index][token of the tile], so a tile
// that starts at token t begins at t * (indices per token). For a matrix unit, units of several int16 tokens are bytes
// instead: in each tile, for each group, the high bytes [token][input] and then the low ones.
struct Activations {
  int32_t* units = nullptr;
  float* scales = nullptr;  // one per `group` inputs; zero where all of them are
  int32_t* sums = nullptr;  // of the quantized values of a group, for the zero points
  size_t inputs = 0;        // padded
  size_t group = 0;
  size_t tokens = 0;
  int bits = 8;

  RELU2_INLINE size_t groups() const { return (inputs + group - 1) / group; }
  RELU2_INLINE size_t units_per_token() const { return inputs * bits / 32; }
};

// Widths of tiles are powers of two, so a tail of tokens needs a few narrower tiles and no padding.
RELU2_INLINE size_t next_tile(size_t remaining, size_t max_width) {
  size_t width = max_width;
  while (width > remaining) width /= 2;
  return width;
}

// The neurons of one group that are active for one token, always as int16: squares span too many magnitudes for int8,
// and reading the rows takes longer than multiplying them.
struct Active {
  size_t count = 0;
  float scale = 0;                                // of the quantized values
  alignas(64) int32_t values[2 * kMaxGroup / 4];  // units, in quads of rows
  int32_t sum = 0;
  uint8_t rows[kMaxGroup + 4];  // padded with the last row to whole quads
};

struct Kernels {
  const char* name;
  size_t tile;  // widest tile of tokens

  // Quantize `width` rows of `x` into the tile that starts at token `first`; false if a value is not finite.
  bool (*quantize)(const float* x, size_t stride, size_t size, const Activations& to, size_t first, size_t width);

  // z[token * z_stride + 0..15] = the 16 neurons of one block for all tokens.
  void (*up)(const UpMatrix& up, size_t block, const Activations& x, float* z, size_t z_stride);

  // Neurons above the threshold, squared and quantized; false if a square is not finite.
  bool (*select)(const float* z, size_t count, float threshold, Active& out);

  // y[0..padded outputs) += rows of the active neurons of one group.
  void (*down_sparse)(const DownMatrix& down, size_t g, const Active& active, float* y);

  // The same for all tokens and all neurons of the group.
  void (*down_dense)(const DownMatrix& down, size_t g, const Activations& h, float* y, size_t y_stride);
};

// Kernels by name ("amx", "avx512vnni", "avx2vnni", "avx2", "portable", or "portable8" and "portable16", which walk the
// loops of the wider variants and exist for tests); null if this build or this CPU lacks them.
const Kernels* kernels_by_name(const char* name);

// The fastest that this CPU runs.
const Kernels& best_kernels();

// int8 for many tokens on CPUs with a dot-product instruction for it, as stock OpenVINO does there; else int16, which
// loses nothing and costs nothing, while reading weights is what takes the time or a matrix unit multiplies.
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
