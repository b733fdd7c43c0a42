// Memory and quantization of one call's activations. Kernels share nothing, so several inferences may run at once.
#pragma once

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace relu2 {

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T), kAlign))) {}
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

// A matrix unit reads 16 rows of a group's bytes of a tile that may have but one token.
constexpr size_t kBehind = 16 * kMaxGroup / 4;

class OwnedActivations : public Activations {
 public:
  OwnedActivations(size_t inputs_, size_t group_, size_t tokens_, int bits_)
      : units_(tokens_ * inputs_ * bits_ / 32 + kBehind),
        scales_(tokens_ * ((inputs_ + group_ - 1) / group_)),
        sums_(tokens_ * ((inputs_ + group_ - 1) / group_)) {
    units = units_.data(), scales = scales_.data(), sums = sums_.data();
    inputs = inputs_, group = group_, tokens = tokens_, bits = bits_;
  }

 private:
  Buffer<int32_t> units_;
  Buffer<float> scales_;
  Buffer<int32_t> sums_;
};

// Inputs that are quantized together. int8 needs small groups, as stock OpenVINO's default of 32.
inline size_t activation_group(int bits, size_t weight_group) {
  return bits == 8 ? 32 : std::min(weight_group, kMaxGroup);
}

template <class F>
void for_each_tile(size_t tokens, size_t max_width, F&& f) {
  for (size_t first = 0; first < tokens;) {
    const size_t width = next_tile(tokens - first, max_width);
    f(first, width);
    first += width;
  }
}

inline bool all_finite(const float* x, size_t n) {
  // 0 * x is 0 for every finite x.
  return std::none_of(x, x + n, [](float v) { return v * 0 != 0; });
}

// Quantizes all tokens of `x` (to.tokens x size); marks those that hold a NaN or an infinity.
inline void quantize_tokens(const Kernels& kernels, const float* x, size_t size, const Activations& to,
                            std::vector<std::atomic<bool>>& poisoned) {
  const auto one = [&](size_t first, size_t n) {
    if (kernels.quantize(x + first * size, size, size, to, first, n)) return;
    for (size_t t = first; t < first + n; t++)
      if (!all_finite(x + t * size, size)) poisoned[t] = true;
  };
  const size_t width = kernels.tile, full = to.tokens / width;
  if (full == 0) return for_each_tile(to.tokens, width, one);
  parallel_for(full, [&](size_t i) { one(i * width, width); });
  for_each_tile(to.tokens - full * width, width, [&](size_t first, size_t n) { one(full * width + first, n); });
}

}  // namespace relu2
