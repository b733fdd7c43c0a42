#include "linear.h"

#include <limits>

#include "activations.h"

namespace relu2 {
namespace {

// Outputs of some blocks for some tokens, in their place in `y`.
void some_blocks(const Kernels& kernels, const UpMatrix& m, size_t block, size_t count, const Activations& x,
                 float* y) {
  const size_t first = block * kBlock;
  const size_t whole = std::min(count, (m.outputs - first) / kBlock);
  if (whole > 0) kernels.up(m, block, whole, x, y + first, m.outputs, nullptr);
  if (whole == count) return;
  alignas(64) float padded[kChunk * kBlock];
  kernels.up(m, block + whole, 1, x, padded, kBlock, nullptr);
  const size_t rest = first + whole * kBlock;
  for (size_t t = 0; t < x.tokens; t++)
    std::copy_n(padded + t * kBlock, m.outputs - rest, y + t * m.outputs + rest);
}

void run_chunk(const Kernels& kernels, const Linear& linear, const float* x, size_t tokens,
               const std::vector<float*>& y) {
  const UpMatrix& first = linear.matrices.front();
  const int bits = linear.activation_bits ? linear.activation_bits : default_activation_bits(kernels, tokens);
  const OwnedActivations quantized(kernels, first.padded_inputs(), activation_group(bits, first.group), tokens, bits);
  std::vector<std::atomic<bool>> poisoned(tokens);
  quantize_tokens(kernels, x, first.inputs, quantized, poisoned);
  size_t blocks = 0;
  for (const UpMatrix& m : linear.matrices) blocks += m.blocks();
  // More tasks than threads, because cores are not equal; of blocks by fours, which kernels compute side by side.
  const size_t fours = (blocks + 3) / 4, tasks = std::min(fours, thread_count() * 4);
  parallel_for(tasks, [&](size_t task) {
    const size_t begin = fours * task / tasks * 4, end = std::min(blocks, fours * (task + 1) / tasks * 4);
    size_t first_of_matrix = 0;
    for (size_t i = 0; i < y.size(); i++) {
      const UpMatrix& m = linear.matrices[i];
      const size_t from = std::max(begin, first_of_matrix), to = std::min(end, first_of_matrix + m.blocks());
      if (from < to) some_blocks(kernels, m, from - first_of_matrix, to - from, quantized, y[i]);
      first_of_matrix += m.blocks();
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
