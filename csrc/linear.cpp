#include "linear.h"

#include <limits>

#include "activations.h"

namespace relu2 {
namespace {

// The 16 outputs of one block for some tokens, in their place in `y`.
void one_block(const Kernels& kernels, const UpMatrix& m, size_t block, const Activations& x, float* y) {
  const size_t first = block * kBlock, count = std::min(kBlock, m.outputs - first);
  if (count == kBlock) return kernels.up(m, block, x, y + first, m.outputs);
  alignas(64) float padded[kChunk * kBlock];
  kernels.up(m, block, x, padded, kBlock);
  for (size_t t = 0; t < x.tokens; t++) std::copy_n(padded + t * kBlock, count, y + t * m.outputs + first);
}

void run_chunk(const Kernels& kernels, const Linear& linear, const float* x, size_t tokens,
               const std::vector<float*>& y) {
  const UpMatrix& first = linear.matrices.front();
  const int bits = linear.activation_bits ? linear.activation_bits : default_activation_bits(kernels, tokens);
  const OwnedActivations quantized(first.padded_inputs(), activation_group(bits, first.group), tokens, bits);
  std::vector<std::atomic<bool>> poisoned(tokens);
  quantize_tokens(kernels, x, first.inputs, quantized, poisoned);
  size_t blocks = 0;
  for (const UpMatrix& m : linear.matrices) blocks += m.blocks();
  // More tasks than threads, because cores are not equal.
  const size_t tasks = std::min(blocks, thread_count() * 4);
  parallel_for(tasks, [&](size_t task) {
    const size_t end = blocks * (task + 1) / tasks;
    for (size_t b = blocks * task / tasks; b < end; b++) {
      size_t i = 0, block = b;
      while (block >= linear.matrices[i].blocks()) block -= linear.matrices[i++].blocks();
      one_block(kernels, linear.matrices[i], block, quantized, y[i]);
    }
  });
  for (size_t t = 0; t < tokens; t++)
    for (size_t i = 0; poisoned[t] && i < y.size(); i++) {
      const size_t outputs = linear.matrices[i].outputs;
      std::fill_n(y[i] + t * outputs, outputs, std::numeric_limits<float>::quiet_NaN());
    }
}

}  // namespace

void run(const Kernels& kernels, const Linear& linear, const float* x, size_t tokens, const std::vector<float*>& y) {
  for (size_t t = 0; t < tokens; t += kChunk) {
    std::vector<float*> to = y;
    for (size_t i = 0; i < to.size(); i++) to[i] += t * linear.matrices[i].outputs;
    run_chunk(kernels, linear, x + t * linear.matrices.front().inputs, std::min(kChunk, tokens - t), to);
  }
}

}  // namespace relu2
