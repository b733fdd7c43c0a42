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
  OwnedActivations(const Kernels& kernels, size_t inputs_, size_t group_, size_t tokens_, int bits)
      : units_(tokens_ * inputs_ * static_cast<size_t>(bits) / 32 + kBehind),
        scales_(tokens_ * 2 * ((inputs_ + group_ - 1) / group_)),
        offsets_(tokens_ * 2 * ((inputs_ + group_ - 1) / group_)) {
    units = units_.data(), scales = scales_.data(), offsets = offsets_.data();
    inputs = inputs_, group = group_, tokens = tokens_;
    words = bits == 16 && kernels.words, planes = bits == 16 && !words ? 2 : 1;
  }

 private:
  Buffer<int32_t> units_;
  Buffer<float> scales_;
  Buffer<float> offsets_;
};

// Inputs that are quantized together: for 8 bits as few as stock OpenVINO takes, which is what its fidelity needs.
inline size_t activation_group(int bits, size_t weight_group) {
  return std::min(weight_group, bits == 8 ? 32 : kMaxGroup);
}

inline bool all_finite(const float* x, size_t n) {
  // 0 * x is 0 for every finite x.
  return std::none_of(x, x + n, [](float v) { return v * 0 != 0; });
}

// Quantizes all tokens of `x` (to.tokens x size); marks those that hold a NaN or an infinity.
inline void quantize_tokens(const Kernels& kernels, const float* x, size_t size, const Activations& to,
                            std::vector<std::atomic<bool>>& poisoned) {
  const Tiles tiles(to.slots(), to.slots() <= kernels.few ? kernels.few : kernels.tile);
  const auto one = [&](size_t i) {
    const size_t slot = tiles.begin(i), width = tiles.begin(i + 1) - slot;
    if (kernels.quantize(x, size, size, to, slot, width)) return;
    for (size_t t = slot / to.planes; t * to.planes < slot + width; t++)
      if (!all_finite(x + t * size, size)) poisoned[t] = true;
  };
  tiles.count == 1 ? one(0) : parallel_for(tiles.count, one);
}

}  // namespace relu2
