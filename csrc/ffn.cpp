#include "ffn.h"

#include <limits>
#include <memory>

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
        quantized_(kernels, ffn.up.padded_inputs(), activation_group(bits_, ffn.up.group), tokens, bits_),
        poisoned_(tokens) {}

  void run() {
    const size_t threads = thread_count();
    // More tasks than threads, because neither cores nor activity are equal; but each brings an output to add up.
    const size_t tasks = threads == 1 ? 1 : std::min(ffn_.down.groups(), threads * (tokens_ == 1 ? 4 : 2));
    quantize_tokens(kernels_, x_, ffn_.up.inputs, quantized_, poisoned_);
    Buffer<float> partial(tasks * tokens_ * stride_);
    parallel_for(tasks, [&](size_t i) {
      const size_t begin = ffn_.down.groups() * i / tasks, end = ffn_.down.groups() * (i + 1) / tasks;
      float* out = partial.data() + i * tokens_ * stride_;
      std::fill_n(out, tokens_ * stride_, 0.f);
      groups(begin, end, out);
    });
    add_up(partial.data(), tasks);
  }

 private:
  size_t neurons(size_t g) const { return std::min(ffn_.down.group, ffn_.down.inputs - g * ffn_.down.group); }
  size_t first_block(size_t g) const { return g * ffn_.down.group / kBlock; }
  size_t blocks(size_t g) const { return round_up(neurons(g), kBlock) / kBlock; }

  // Two phases share the memory's time: `up` of a group fetches the rows of DOWN that the group before needs, `down` of
  // that one fetches the records of UP that come after. So memory never waits for arithmetic, and `down`, which walks
  // columns, finds its rows in the cache.
  void groups(size_t begin, size_t end, float* out) {
    Buffer<float> z(tokens_ * kStride);
    OwnedActivations h(kernels_, kMaxGroup, kMaxGroup, tokens_, bits_);
    const auto finite = std::make_unique<bool[]>(tokens_);
    std::fill_n(finite.get(), tokens_, true);
    uint8_t rows[kMaxGroup];
    Fetch down_rows, up_records;
    h.inputs = 0;
    for (size_t g = begin; g < end; g++) {
      kernels_.up(ffn_.up, first_block(g), blocks(g), quantized_, z.data(), kStride, g > begin ? &down_rows : nullptr);
      if (g > begin) down(g - 1, rows, h, out, g + 1 < end ? &up_records : nullptr);
      const size_t count = kernels_.active(z.data(), kStride, tokens_, neurons(g), ffn_.threshold, rows);
      if (each_by_itself(g, z.data(), count, finite.get(), out)) {
        h.inputs = 0;
        down_rows.begin(0, 0, 1);
        continue;
      }
      h.inputs = round_up(count, h.slots() <= kernels_.few ? 4 : kernels_.rows);
      for (size_t i = count; i < h.inputs; i++) rows[i] = rows[0];
      kernels_.squares(z.data(), kStride, ffn_.threshold, rows, count, ffn_.down.bits, h, finite.get());
      fetch_rows(g, rows, h.inputs, down_rows);
    }
    if (end > begin) down(end - 1, rows, h, out, nullptr);
    for (size_t t = 0; t < tokens_; t++)
      if (!finite[t]) poisoned_[t] = true;
  }

  // Where the tokens share few neurons, the rows of each are taken by themselves. Returns whether that was so.
  bool each_by_itself(size_t g, const float* z, size_t all, bool* finite, float* out) const {
    if (tokens_ == 1) return false;
    uint8_t rows[kMaxGroup];
    size_t sum = 0;
    for (size_t t = 0; t < tokens_; t++)
      sum += kernels_.active(z + t * kStride, kStride, 1, neurons(g), ffn_.threshold, rows);
    // By itself a neuron costs more, because its row is unpacked for one token alone: about twice as much, or with a dot
    // product of bytes, where multiplying takes little, five times.
    if (sum * (kernels_.words ? 2 : 5) >= all * tokens_) return false;
    OwnedActivations h(kernels_, kMaxGroup, kMaxGroup, 1, bits_);
    for (size_t t = 0; t < tokens_; t++) {
      const float* row = z + t * kStride;
      const size_t count = kernels_.active(row, kStride, 1, neurons(g), ffn_.threshold, rows);
      h.inputs = round_up(count, 4);
      for (size_t i = count; i < h.inputs; i++) rows[i] = rows[0];
      kernels_.squares(row, kStride, ffn_.threshold, rows, count, ffn_.down.bits, h, finite + t);
      kernels_.down(ffn_.down, g, rows, h, out + t * stride_, stride_, nullptr);
    }
    return true;
  }

  void down(size_t g, const uint8_t* rows, const Activations& h, float* out, Fetch* next) const {
    if (next) {
      const size_t records = blocks(g + 2);
      for (size_t b = 0; b < records; b++) next->row[b] = ffn_.up.record(first_block(g + 2) + b);
      next->begin(records, ffn_.up.record_bytes(), records);
    }
    kernels_.down(ffn_.down, g, rows, h, out, stride_, next);
  }

  void fetch_rows(size_t g, const uint8_t* rows, size_t count, Fetch& to) const {
    const DownMatrix& m = ffn_.down;
    for (size_t i = 0; i < count; i++) to.row[i] = m.record(g) + rows[i] * m.row_bytes();
    // Scales and zero points lie behind the rows, as if they were some more.
    const size_t behind = count ? (m.record_bytes() - m.group * m.row_bytes() + m.row_bytes() - 1) / m.row_bytes() : 0;
    for (size_t i = 0; i < behind; i++) to.row[count + i] = m.record(g) + (m.group + i) * m.row_bytes();
    to.begin(count + behind, m.row_bytes(), 1);
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

  static constexpr size_t kStride = kMaxGroup + kBlock;

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
