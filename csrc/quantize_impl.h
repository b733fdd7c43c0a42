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

// Quantization of one group to n bits: q = round(x * inverse), x ~ q * scale.
struct Step {
  float scale = 0, inverse = 0;
  bool finite = true;

  RELU2_INLINE Step(const float* x, size_t n, int bits) {
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
    const float limit = bits == 8 ? 127.f : 32767.f;
    scale = b.f / limit;
    inverse = limit / b.f;
  }
};

// Rounds half to even like the vector instructions, |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the mantissa.
RELU2_INLINE int32_t round_to_int(float x) {
  Bits b{x + 12582912.f};
  return static_cast<int32_t>(b.u - 0x4b400000u);
}

// Quad `i` of quantized values as one unit of bytes, or two of 16-bit values.
RELU2_INLINE void store_quad(const int32_t* q, int bits, int32_t* to, size_t step) {
  if (bits == 8) {
    to[0] = static_cast<int32_t>((q[0] & 0xffu) | (q[1] & 0xffu) << 8 | (q[2] & 0xffu) << 16 | (q[3] & 0xffu) << 24);
  } else {
    to[0] = static_cast<int32_t>((q[0] & 0xffffu) | (q[2] & 0xffffu) << 16);
    to[step] = static_cast<int32_t>((q[1] & 0xffffu) | (q[3] & 0xffffu) << 16);
  }
}

// The same quad as bytes of two planes.
RELU2_INLINE void store_bytes(const int32_t* q, uint8_t* high, uint8_t* low) {
  for (int i = 0; i < 4; i++) high[i] = static_cast<uint8_t>(q[i] >> 8), low[i] = static_cast<uint8_t>(q[i]);
}

template <bool kPlanes>
bool quantize(const float* x, size_t stride, size_t size, const Activations& to, size_t first, size_t width) {
  bool finite = true;
  for (size_t t = 0; t < width; t++) {
    const float* row = x + t * stride;
    int32_t* units = to.units + first * to.units_per_token() + t;
    for (size_t group = 0; group < to.groups(); group++) {
      const size_t begin = group * to.group, end = begin + to.group < to.inputs ? begin + to.group : to.inputs;
      const size_t valid = end < size ? end - begin : begin < size ? size - begin : 0;
      const Step step(row + begin, valid, to.bits);
      finite &= step.finite;
      int32_t q[kMaxGroup] = {}, sum = 0;
      if (step.scale > 0)
        for (size_t i = 0; i < valid; i++) sum += q[i] = round_to_int(row[begin + i] * step.inverse);
      const size_t n = end - begin;
      if (kPlanes && to.bits == 16 && to.tokens > 1) {
        uint8_t* high = reinterpret_cast<uint8_t*>(to.units + first * to.units_per_token() + begin / 2 * width) + t * n;
        for (size_t i = 0; i < n; i += 4) store_bytes(q + i, high + i, high + width * n + i);
      } else {
        for (size_t i = 0; i < n; i += 4, units += width * to.bits / 8) store_quad(q + i, to.bits, units, width);
      }
      to.scales[first * to.groups() + group * width + t] = step.scale;
      to.sums[first * to.groups() + group * width + t] = sum;
    }
  }
  return finite;
}

bool select(const float* z, size_t count, float threshold, Active& out) {
  float h[kMaxGroup + 4];
  size_t n = 0;
  for (size_t i = 0; i < count; i++) {  // without a branch: which neurons are active is not predictable
    h[n] = z[i] * z[i];
    out.rows[n] = static_cast<uint8_t>(i);
    n += z[i] > threshold;
  }
  out.count = n;
  if (n == 0) return true;
  const Step step(h, n, 16);
  out.scale = step.scale;
  out.sum = 0;
  if (step.scale == 0) {
    out.count = 0;
    return step.finite;
  }
  int32_t q[kMaxGroup + 4];
  for (size_t i = 0; i < n; i++) out.sum += q[i] = round_to_int(h[i] * step.inverse);
  for (size_t i = n; i % 4; i++) {
    q[i] = 0;
    out.rows[i] = out.rows[n - 1];
  }
  for (size_t i = 0; i < n; i += 4) store_quad(q + i, 16, out.values + i / 2, 1);
  return step.finite;
}

}  // namespace
