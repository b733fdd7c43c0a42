// How packed weights lie in memory. Python's ov_afm/kernels/layout.py writes them; both files change together.
//
// Quantized values are stored as unsigned codes c (0..15 or 0..255); a weight is (c - zero) * scale. Symmetric weights
// have the constant zero 8 or 128. Scales are the f16 values of the IR, so nothing is requantized.
//
// UP (hidden -> neurons): one record per 16 neurons, read from front to back while all 16 are computed.
//
//     int4: 64 bytes = 16 neurons x 4 bytes;  byte b: low nibble input 8i+b, high nibble input 8i+4+b
//     int8: 64 bytes = 16 neurons x 4 bytes;  byte b: input 4i+b
//     ... for every 8 (4) inputs, then scales f16[groups][16], then zeros u8[groups][16] if asymmetric, padding to 64
//
// DOWN (neurons -> hidden), transposed: one record per group of neurons, so that the row of a neuron that ReLU² made
// zero is never touched.
//
//     row of one neuron: hidden outputs in pieces of 64 bytes; rows of the group; then scales f16[hidden], then zeros
//     u8[hidden] if asymmetric
//     int4: byte 16L+4z+d of a piece: low nibble output 32z+4L+d, high nibble output 32z+16+4L+d       (128 outputs)
//     int8: byte 16L+4z+d of a piece: output 16z+4L+d                                                  (64 outputs)
//
// The odd order inside a piece is what interleaving the rows of four neurons byte by byte (unpack, twice) turns into
// vectors of consecutive outputs with four neurons in every 32-bit lane: what a dot-product instruction wants.
#pragma once

#include <cstddef>
#include <cstdint>

// Files compiled for different instruction sets share these headers, so every function in them must be inlined: a copy
// compiled for AVX-512 could otherwise be the one that the linker keeps for every CPU.
// RELU2_PLAIN, for plain C++ and sanitizers, turns forced inlining and unrolling off: both only take time to compile.
#if defined(RELU2_PLAIN)
#define RELU2_INLINE inline
#elif defined(_MSC_VER)
#define RELU2_INLINE __forceinline
#else
#define RELU2_INLINE inline __attribute__((always_inline))
#endif

namespace relu2 {

constexpr size_t kBlock = 16;      // neurons of one UP record
constexpr size_t kPiece = 64;      // bytes of weights that are handled together
constexpr size_t kMaxGroup = 128;  // neurons of one DOWN record at most; channel-wise weights use 128

RELU2_INLINE constexpr size_t round_up(size_t n, size_t step) {
  return (n + step - 1) / step * step;
}

// One packed matrix. `inputs` and `outputs` are the true sizes; padded ones follow.
struct Matrix {
  const uint8_t* data = nullptr;
  size_t inputs = 0;
  size_t outputs = 0;
  size_t group = 0;  // inputs that share a scale; the number of (padded) inputs when channel-wise
  int bits = 4;
  bool asymmetric = false;

  RELU2_INLINE int zero() const { return bits == 4 ? 8 : 128; }
};

struct UpMatrix : Matrix {
  RELU2_INLINE size_t padded_inputs() const { return round_up(inputs, 32); }
  RELU2_INLINE size_t blocks() const { return round_up(outputs, kBlock) / kBlock; }
  RELU2_INLINE size_t groups() const { return (padded_inputs() + group - 1) / group; }
  RELU2_INLINE size_t weight_bytes() const { return kBlock * padded_inputs() * bits / 8; }
  RELU2_INLINE size_t record_bytes() const {
    return round_up(weight_bytes() + groups() * kBlock * (asymmetric ? 3 : 2), kPiece);
  }
  RELU2_INLINE size_t bytes() const { return blocks() * record_bytes(); }

  RELU2_INLINE const uint8_t* record(size_t block) const { return data + block * record_bytes(); }
  RELU2_INLINE const uint16_t* scales(size_t block) const {
    return reinterpret_cast<const uint16_t*>(record(block) + weight_bytes());
  }
  RELU2_INLINE const uint8_t* zeros(size_t block) const {
    return record(block) + weight_bytes() + groups() * kBlock * 2;
  }
};

struct DownMatrix : Matrix {
  RELU2_INLINE size_t padded_outputs() const { return round_up(outputs, 128); }
  RELU2_INLINE size_t groups() const { return (inputs + group - 1) / group; }
  RELU2_INLINE size_t row_bytes() const { return padded_outputs() * bits / 8; }
  RELU2_INLINE size_t record_bytes() const { return group * row_bytes() + padded_outputs() * (asymmetric ? 3 : 2); }
  RELU2_INLINE size_t bytes() const { return groups() * record_bytes(); }

  RELU2_INLINE const uint8_t* record(size_t g) const { return data + g * record_bytes(); }
  RELU2_INLINE const uint16_t* scales(size_t g) const {
    return reinterpret_cast<const uint16_t*>(record(g) + group * row_bytes());
  }
  RELU2_INLINE const uint8_t* zeros(size_t g) const { return record(g) + group * row_bytes() + padded_outputs() * 2; }
};

}  // namespace relu2
