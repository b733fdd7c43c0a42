// Quantization of activations, and the choice of active neurons: the same code for every instruction set. Like
// kernels_impl.h it is compiled under the flags of each, so nothing here has external linkage.
#pragma once

#include "kernels.h"

namespace {

using namespace relu2;

union Bits {
  float f;
  uint32_t u;
};

// Quantization of one group: q = round(x * inverse), x ~ q * scale.
struct Step {
  float scale = 0, inverse = 0;
  bool finite = true;

  RELU2_INLINE Step(const float* x, size_t n, float limit) {
    uint32_t top = 0;  // the largest magnitude, or a NaN: their bit patterns are ordered as unsigned integers
    for (size_t i = 0; i < n; i++) {
      Bits b{x[i]};
      const uint32_t magnitude = b.u & 0x7fffffff;
      top = magnitude > top ? magnitude : top;
    }
    Bits b;
    b.u = top;
    finite = top < 0x7f800000;
    // The inverse of anything smaller overflows; such a group counts as zero.
    if (!finite || b.f < 1e-30f) return;
    scale = b.f / limit;
    inverse = limit / b.f;
  }
};

// Rounds half to even like the vector instructions, |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the mantissa.
RELU2_INLINE int32_t round_to_int(float x) {
  Bits b{x + 12582912.f};
  return static_cast<int32_t>(b.u - 0x4b400000u);
}

// Levels of signed values: one byte, or two bytes of which the higher counts 256.
constexpr float kSigned8 = 127, kSigned16 = 127 * 256 + 127;
// Levels of unsigned values.
constexpr float kUnsigned8 = 255, kUnsigned16 = 65535;
// Levels of 16-bit words, signed for both.
constexpr float kWord = 32767;

// Bytes of one slot and group to their place in a tile: [unit][slot of the tile], or for a matrix unit in one piece.
template <bool kRows>
RELU2_INLINE void store_slot(const uint8_t* bytes, size_t units, int32_t* tile, size_t slot, size_t width) {
  for (size_t u = 0; u < units; u++) {
    const uint8_t* b = bytes + 4 * u;
    const uint32_t unit = b[0] | b[1] << 8 | b[2] << 16 | static_cast<uint32_t>(b[3]) << 24;
    tile[kRows ? slot * units + u : u * width + slot] = static_cast<int32_t>(unit);
  }
}

// Words of one slot and group: the first and third of four inputs are one unit, the others the next.
RELU2_INLINE void store_words(const int32_t* q, size_t inputs, int32_t* tile, size_t slot, size_t width) {
  for (size_t i = 0; i < inputs; i += 4, tile += 2 * width) {
    tile[slot] = static_cast<int32_t>((q[i] & 0xffffu) | (q[i + 2] & 0xffffu) << 16);
    tile[width + slot] = static_cast<int32_t>((q[i + 1] & 0xffffu) | (q[i + 3] & 0xffffu) << 16);
  }
}

template <bool kRows>
bool quantize(const float* x, size_t stride, size_t size, const Activations& to, size_t slot, size_t width) {
  bool finite = true;
  for (size_t group = 0; group < to.groups(); group++) {
    int32_t* tile = to.at(group, slot);
    const size_t begin = group * to.group, n = to.group_units(group) * (to.words ? 2 : 4);
    const size_t valid = begin + n < size ? n : begin < size ? size - begin : 0;
    for (size_t s = slot; s < slot + width; s++) {
      const float* row = x + s / to.planes * stride + begin;
      const Step step(row, valid, to.words ? kWord : to.planes == 1 ? kSigned8 : kSigned16);
      finite &= step.finite;
      alignas(64) uint8_t bytes[kMaxGroup] = {};
      int32_t q[kMaxGroup] = {}, sum = 0;
      if (step.scale > 0) {
        for (size_t i = 0; i < valid; i++) q[i] = round_to_int(row[i] * step.inverse);
        if (to.planes == 2)
          for (size_t i = 0; i < valid; i++) {
            const int32_t low = static_cast<int8_t>(q[i]);
            q[i] = s % 2 ? low : (q[i] - low) >> 8;
          }
        for (size_t i = 0; i < kMaxGroup; i++) bytes[i] = static_cast<uint8_t>(q[i]), sum += q[i];
      }
      to.words ? store_words(q, n, tile, s - slot, width) : store_slot<kRows>(bytes, n / 4, tile, s - slot, width);
      const float scale = to.planes == 2 && s % 2 == 0 ? step.scale * 256 : step.scale;
      to.scales[group * to.slots() + s] = scale;
      to.offsets[group * to.slots() + s] = scale * static_cast<float>(sum);
    }
  }
  return finite;
}

size_t active(const float* z, size_t stride, size_t tokens, size_t count, float threshold, uint8_t* rows) {
  alignas(64) float top[kMaxGroup];
  for (size_t i = 0; i < count; i++) top[i] = z[i];
  for (size_t t = 1; t < tokens; t++)
    for (size_t i = 0; i < count; i++) {
      const float v = z[t * stride + i];
      top[i] = v > top[i] ? v : top[i];
    }
  size_t n = 0;
  for (size_t i = 0; i < count; i++) {  // without a branch: which neurons are active is not predictable
    rows[n] = static_cast<uint8_t>(i);
    n += top[i] > threshold;
  }
  return n;
}

template <bool kRows>
void squares(const float* z, size_t stride, float threshold, const uint8_t* rows, size_t count, const Activations& to,
             size_t widest, float unit_scale, bool* finite) {
  const size_t n = to.inputs;
  const Tiles tiles(to.slots(), widest);
  for (size_t i = 0; i < tiles.count; i++) {
    const size_t slot = tiles.begin(i), width = tiles.begin(i + 1) - slot;
    for (size_t s = slot; s < slot + width; s++) {
      const float* row = z + s / to.planes * stride;
      alignas(64) float square[kMaxGroup] = {};
      for (size_t k = 0; k < count; k++) {
        const float v = row[rows[k]];
        square[k] = v > threshold ? v * v : 0;
      }
      const Step step(square, n, to.words ? kWord : to.planes == 1 ? kUnsigned8 : kUnsigned16);
      if (!step.finite) finite[s / to.planes] = false;
      alignas(64) uint8_t bytes[kMaxGroup];
      int32_t q[kMaxGroup], sum = 0;
      for (size_t k = 0; k < kMaxGroup; k++) q[k] = round_to_int(square[k] * step.inverse);
      const int shift = to.planes == 2 && s % 2 == 0 ? 8 : 0;
      if (to.words) {
        for (size_t k = 0; k < kMaxGroup; k++) sum += q[k];
        store_words(q, n, to.at(0, slot), s - slot, width);
      } else {
        for (size_t k = 0; k < kMaxGroup; k++) bytes[k] = static_cast<uint8_t>(q[k] >> shift), sum += bytes[k];
        store_slot<kRows>(bytes, n / 4, to.at(0, slot), s - slot, width);
      }
      to.scales[s] = to.words ? step.scale : step.scale * unit_scale * (shift ? 256.f : 1.f);
      to.offsets[s] = to.scales[s] * static_cast<float>(sum);
    }
  }
}

}  // namespace
