#include "ffn.h"

#include <limits>

#include "activations.h"

namespace relu2 {
namespace {

// One chunk of tokens of one call.
class Chunk {
 public:
  Chunk(const Kernels& kernels, const Ffn& ffn, const float* x, size_t tokens, float* y)
      : kernels_(kernels),
        ffn_(ffn),
        x_(x),
        tokens_(tokens),
        y_(y),
        stride_(ffn.down.padded_outputs() + kBlock),  // rows of a power of two would share a set of the cache
        bits_(ffn.activation_bits ? ffn.activation_bits : default_activation_bits(kernels, tokens)),
        quantized_(ffn.up.padded_inputs(), step(ffn.up.group), tokens, bits_),
        poisoned_(tokens) {}

  void run() {
    const size_t threads = thread_count();
    // More tasks than threads, because neither cores nor activity are equal; but each brings an output to add up.
    const size_t tasks = threads == 1 ? 1 : std::min(ffn_.down.groups(), threads * (tokens_ == 1 ? 8 : 2));
    quantize_tokens(kernels_, x_, ffn_.up.inputs, quantized_, poisoned_);
    Buffer<float> partial(tasks * tokens_ * stride_);
    parallel_for(tasks, [&](size_t i) {
      const size_t begin = ffn_.down.groups() * i / tasks, end = ffn_.down.groups() * (i + 1) / tasks;
      float* out = partial.data() + i * tokens_ * stride_;
      std::fill_n(out, tokens_ * stride_, 0.f);
      tokens_ == 1 ? one_token(begin, end, out) : many_tokens(begin, end, out);
    });
    add_up(partial.data(), tasks);
  }

 private:
  size_t step(size_t weight_group) const { return activation_group(bits_, weight_group); }

  size_t neurons(size_t g) const { return std::min(ffn_.down.group, ffn_.down.inputs - g * ffn_.down.group); }

  void up(size_t g, float* z, size_t stride) const {
    const size_t first = g * ffn_.down.group / kBlock, count = round_up(neurons(g), kBlock) / kBlock;
    for (size_t b = 0; b < count; b++) kernels_.up(ffn_.up, first + b, quantized_, z + b * kBlock, stride);
  }

  void one_token(size_t begin, size_t end, float* out) {
    Active active;
    alignas(64) float z[kMaxGroup];
    for (size_t g = begin; g < end; g++) {
      up(g, z, kMaxGroup);
      if (!kernels_.select(z, neurons(g), ffn_.threshold, active)) poisoned_[0] = true;
      kernels_.down_sparse(ffn_.down, g, active, out);
    }
  }

  void many_tokens(size_t begin, size_t end, float* out) {
    Buffer<float> z(tokens_ * kMaxGroup);
    OwnedActivations h(ffn_.down.group, step(ffn_.down.group), tokens_, bits_);
    for (size_t g = begin; g < end; g++) {
      up(g, z.data(), kMaxGroup);
      size_t count = 0;
      for (size_t t = 0; t < tokens_; t++)
        count += std::count_if(z.data() + t * kMaxGroup, z.data() + t * kMaxGroup + neurons(g),
                               [this](float v) { return v > ffn_.threshold; });
      // A neuron costs about twice as much in a list as in the dense product, which unpacks each row but once.
      count * 2 < tokens_* neurons(g) ? by_lists(g, z.data(), out) : dense(g, z.data(), h, out);
    }
  }

  void by_lists(size_t g, const float* z, float* out) {
    Active active;
    for (size_t t = 0; t < tokens_; t++) {
      if (!kernels_.select(z + t * kMaxGroup, neurons(g), ffn_.threshold, active)) poisoned_[t] = true;
      kernels_.down_sparse(ffn_.down, g, active, out + t * stride_);
    }
  }

  void dense(size_t g, float* z, const Activations& h, float* out) {
    for (size_t t = 0; t < tokens_; t++)
      for (size_t i = 0; i < neurons(g); i++) {
        float& v = z[t * kMaxGroup + i];
        v = v > ffn_.threshold ? v * v : 0.f;
      }
    for_each_tile(tokens_, kernels_.tile, [&](size_t first, size_t n) {
      if (kernels_.quantize(z + first * kMaxGroup, kMaxGroup, neurons(g), h, first, n)) return;
      for (size_t t = first; t < first + n; t++)
        if (!all_finite(z + t * kMaxGroup, neurons(g))) poisoned_[t] = true;
    });
    kernels_.down_dense(ffn_.down, g, h, out, stride_);
  }

  // In the order of tasks, so that the sum does not depend on which thread was first.
  void add_up(const float* partial, size_t tasks) {
    const size_t outputs = ffn_.down.outputs;
    const auto row = [&](size_t t) {
      float* to = y_ + t * outputs;
      std::copy_n(partial + t * stride_, outputs, to);
      for (size_t i = 1; i < tasks; i++) {
        const float* from = partial + (i * tokens_ + t) * stride_;
        for (size_t o = 0; o < outputs; o++) to[o] += from[o];
      }
      if (poisoned_[t]) std::fill_n(to, outputs, std::numeric_limits<float>::quiet_NaN());
    };
    if (tokens_ == 1) return row(0);
    parallel_for(tokens_, row);
  }

  const Kernels& kernels_;
  const Ffn& ffn_;
  const float* x_;
  const size_t tokens_;
  float* y_;
  const size_t stride_;
  const int bits_;
  OwnedActivations quantized_;
  std::vector<std::atomic<bool>> poisoned_;
};

}  // namespace

void run(const Kernels& kernels, const Ffn& ffn, const float* x, size_t tokens, float* y) {
  for (size_t t = 0; t < tokens; t += kChunk)
    Chunk(kernels, ffn, x + t * ffn.up.inputs, std::min(kChunk, tokens - t), y + t * ffn.down.outputs).run();
}

}  // namespace relu2
