// Vectors of N 32-bit lanes in plain C++: the fallback for any CPU and the specification of the intrinsic versions.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

template <int N>
struct Portable {
  static constexpr int kLanes = N;
  static constexpr int kVectors = N == 8 ? 2 : 4;
  static constexpr int kSlots = N == 4 ? 4 : 6;
  static constexpr int kNibble = N == 16 ? 16 : 1;
  static constexpr bool kMatrix = false;
  static constexpr bool kWords = N == 8;
  static constexpr bool kPairs = false;  // no faster way to two dot products at once
  struct I {
    int32_t lane[N];
  };
  struct F {
    float lane[N];
  };

  static I load(const void* p) {
    I r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(void* p, I a) { std::memcpy(p, &a, sizeof a); }
  static void prefetch(const void*) {}
  static void prefetch_l2(const void*) {}
  static I set1(int32_t v) {
    I r;
    for (int i = 0; i < N; i++) r.lane[i] = v;
    return r;
  }
  static I low_nibbles(I v) { return bit_and(v, set1(0x0f0f0f0f)); }
  static I bit_and(I a, I b) {
    for (int i = 0; i < N; i++) a.lane[i] &= b.lane[i];
    return a;
  }
  template <int kBits>
  static I srl16(I a) {
    uint16_t w[2 * N];
    std::memcpy(w, &a, sizeof a);
    for (int i = 0; i < 2 * N; i++) w[i] = static_cast<uint16_t>(w[i] >> kBits);
    return load(w);
  }
  static I unpack_lo8(I a, I b) { return unpack<uint8_t>(a, b, 0); }
  static I unpack_hi8(I a, I b) { return unpack<uint8_t>(a, b, 8); }
  static I unpack_lo16(I a, I b) { return unpack<uint16_t>(a, b, 0); }
  static I unpack_hi16(I a, I b) { return unpack<uint16_t>(a, b, 4); }

  static I bit_xor(I a, I b) {
    for (int i = 0; i < N; i++) a.lane[i] ^= b.lane[i];
    return a;
  }
  // kNibble * (code - 8) of the low and the high four bits of every byte
  static I signed_low(I v) { return signed_nibbles(v, 0); }
  static I signed_high(I v) { return signed_nibbles(v, 4); }

  // acc + four products of unsigned and signed bytes, without saturation
  template <bool kSmall>
  static I dot(I acc, I u, I s) {
    uint8_t a[4 * N];
    int8_t b[4 * N];
    std::memcpy(a, &u, sizeof u);
    std::memcpy(b, &s, sizeof s);
    for (int i = 0; i < 4 * N; i++) acc.lane[i / 4] += a[i] * b[i];
    return acc;
  }
  static I keep(I a) { return a; }
  // acc + two products of signed 16-bit values
  static I dot_words(I acc, I u, I v) {
    int16_t a[2 * N], b[2 * N];
    std::memcpy(a, &u, sizeof u);
    std::memcpy(b, &v, sizeof v);
    for (int i = 0; i < 2 * N; i++) acc.lane[i / 2] += a[i] * b[i];
    return acc;
  }
  static I add32(I a, I b) {
    for (int i = 0; i < N; i++) a.lane[i] += b.lane[i];
    return a;
  }
  static I sub32(I a, I b) {
    for (int i = 0; i < N; i++) a.lane[i] -= b.lane[i];
    return a;
  }
  static I load_u8(const uint8_t* p) {
    I r;
    for (int i = 0; i < N; i++) r.lane[i] = p[i];
    return r;
  }

  static F to_float(I a) {
    F r;
    for (int i = 0; i < N; i++) r.lane[i] = static_cast<float>(a.lane[i]);
    return r;
  }
  static F load_float(const float* p) {
    F r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static void store_float(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static F set1_float(float v) {
    F r;
    for (int i = 0; i < N; i++) r.lane[i] = v;
    return r;
  }
  static F mul(F a, F b) {
    for (int i = 0; i < N; i++) a.lane[i] *= b.lane[i];
    return a;
  }
  static F mul_add(F a, F b, F c) {
    for (int i = 0; i < N; i++) a.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return a;
  }
  static F load_half(const uint16_t* p) {
    F r;
    for (int i = 0; i < N; i++) r.lane[i] = half_to_float(p[i]);
    return r;
  }

 private:
  static I signed_nibbles(I v, int shift) {
    uint8_t bytes[4 * N];
    std::memcpy(bytes, &v, sizeof v);
    for (auto& b : bytes) b = static_cast<uint8_t>(kNibble * ((b >> shift & 15) - 8));
    return load(bytes);
  }

  // Interleave elements [first, first + n) of every 128-bit part of a and b.
  template <class T>
  static I unpack(I a, I b, int first) {
    constexpr int kPart = 16 / sizeof(T);
    T x[N * 4 / sizeof(T)], y[N * 4 / sizeof(T)], r[N * 4 / sizeof(T)];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(y, &b, sizeof b);
    for (int part = 0; part < N / 4; part++)
      for (int i = 0; i < kPart / 2; i++) {
        r[part * kPart + 2 * i] = x[part * kPart + first + i];
        r[part * kPart + 2 * i + 1] = y[part * kPart + first + i];
      }
    return load(r);
  }

  static float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    uint32_t exponent = (h >> 10) & 31, fraction = h & 0x3ff, bits;
    if (exponent == 31) {
      bits = 0x7f800000 | fraction << 13;
    } else if (exponent) {
      bits = (exponent + 112) << 23 | fraction << 13;
    } else {
      float tiny = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24, the unit of f16 subnormals
      std::memcpy(&bits, &tiny, 4);
    }
    bits |= sign;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

}  // namespace
