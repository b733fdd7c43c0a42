// Stand-alone test of the kernels and their threading, made for sanitizers; Python's tests check many more shapes.
//
//     make -C csrc sanitize        (AddressSanitizer + UndefinedBehaviorSanitizer, then ThreadSanitizer)
//
// Buffers are as small as the layout says, so a read or write past an end is seen. With RELU2_EMULATE the VNNI variants
// run over emulated instructions; that build is no evidence about a CPU that has them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "ffn.h"
#include "linear.h"

#ifdef RELU2_EMULATE
namespace relu2 {
bool emulation_is_exact(const uint8_t (&bytes)[96]);
}
#endif

namespace {

using namespace relu2;

struct Case {
  size_t hidden, neurons, up_group, down_group;
  int up_bits, down_bits;
  bool asymmetric;
};

uint16_t half(float v) {  // of a positive normal number
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return static_cast<uint16_t>(((u >> 23) - 112) << 10 | (u >> 13 & 0x3ff));
}

float unhalf(uint16_t h) {
  return std::ldexp(1.f + (h & 0x3ff) / 1024.f, (h >> 10) - 15);
}

// A random matrix, its packed form and its weights as floats, packed by the words of layout.h and not by its code.
template <class M>
struct Random : M {
  std::vector<uint8_t> packed;
  std::vector<float> weights;  // [output][input]

  Random(size_t inputs, size_t outputs, size_t group, int bits, bool asymmetric, std::mt19937& rng) {
    const size_t span = prepare(inputs, outputs, group, bits, asymmetric);
    weights.resize(inputs * outputs);
    std::vector<uint16_t> scales((inputs + span - 1) / span * outputs);
    std::vector<uint8_t> zeros(scales.size());
    for (auto& s : scales) s = half(0.001f + rng() % 1000 * 1e-5f);
    for (auto& z : zeros) z = static_cast<uint8_t>(asymmetric ? rng() % (1u << bits) : this->zero());
    for (size_t o = 0; o < outputs; o++)
      for (size_t i = 0; i < inputs; i++) {
        const size_t at = i / span * outputs + o;
        const int code = static_cast<int>(rng() % (1u << bits));
        weights[o * inputs + i] = static_cast<float>(code - zeros[at]) * unhalf(scales[at]);
        put(o, i, static_cast<uint8_t>(code), scales[at], zeros[at]);
      }
  }

  // The matrix of tests/kernels/test_layout.py, which has the same formulas; `weights` stays empty.
  Random(size_t inputs, size_t outputs, size_t group, int bits, bool asymmetric) {
    const size_t span = prepare(inputs, outputs, group, bits, asymmetric);
    const size_t codes = size_t{1} << bits;
    for (size_t o = 0; o < outputs; o++)
      for (size_t i = 0; i < inputs; i++) {
        const size_t g = i / span;
        put(o, i, static_cast<uint8_t>((7 * o + 13 * i + o * i) % codes),
            static_cast<uint16_t>(0x1c00 + (3 * o + 5 * g) % 512), static_cast<uint8_t>((o + 2 * g + 1) % codes));
      }
  }

 private:
  // Returns the number of inputs that share a scale.
  size_t prepare(size_t inputs, size_t outputs, size_t group, int bits, bool asymmetric) {
    this->inputs = inputs, this->outputs = outputs, this->bits = bits, this->asymmetric = asymmetric;
    this->group = group ? group : channel_wise();
    packed.assign(this->bytes(), 0);
    this->data = packed.data();
    return group ? group : inputs;
  }
  size_t channel_wise() const;
  void put(size_t o, size_t i, uint8_t code, uint16_t scale, uint8_t zero);

  void put_at(size_t byte, bool high, uint8_t code) {
    packed[byte] = static_cast<uint8_t>(packed[byte] | (high ? code << 4 : code));
  }
};

template <>
size_t Random<UpMatrix>::channel_wise() const {
  return padded_inputs();
}
template <>
size_t Random<DownMatrix>::channel_wise() const {
  return kMaxGroup;
}

template <>
void Random<UpMatrix>::put(size_t o, size_t i, uint8_t code, uint16_t scale, uint8_t zero) {
  const size_t block = o / kBlock, lane = o % kBlock, record = block * record_bytes();
  const size_t piece = bits == 4 ? i / 8 : i / 4;
  put_at(record + piece * kPiece + lane * 4 + i % 4, bits == 4 && i % 8 >= 4, code);
  const size_t at = i / group * kBlock + lane;
  std::memcpy(&packed[record + weight_bytes() + at * 2], &scale, 2);
  if (asymmetric) packed[record + weight_bytes() + groups() * kBlock * 2 + at] = zero;
}

template <>
void Random<DownMatrix>::put(size_t o, size_t i, uint8_t code, uint16_t scale, uint8_t zero) {
  const size_t g = i / group, record = g * record_bytes(), per_piece = bits == 4 ? 128 : 64;
  const size_t in = o % per_piece, z = bits == 4 ? in / 32 : in / 16, part = in % 16 / 4, d = in % 4;
  put_at(record + i % group * row_bytes() + o / per_piece * kPiece + 16 * part + 4 * z + d, bits == 4 && in % 32 >= 16,
         code);
  std::memcpy(&packed[record + group * row_bytes() + o * 2], &scale, 2);
  if (asymmetric) packed[record + group * row_bytes() + padded_outputs() * 2 + o] = zero;
}

std::vector<float> reference(const Random<UpMatrix>& up, const Random<DownMatrix>& down, const std::vector<float>& x) {
  const size_t tokens = x.size() / up.inputs;
  std::vector<float> y(tokens * down.outputs);
  for (size_t t = 0; t < tokens; t++) {
    std::vector<double> out(down.outputs);
    for (size_t j = 0; j < up.outputs; j++) {
      double z = 0;
      for (size_t i = 0; i < up.inputs; i++) z += double(x[t * up.inputs + i]) * up.weights[j * up.inputs + i];
      if (z > 0)
        for (size_t o = 0; o < down.outputs; o++) out[o] += z * z * down.weights[o * down.inputs + j];
    }
    std::copy(out.begin(), out.end(), y.begin() + static_cast<std::ptrdiff_t>(t * down.outputs));
  }
  return y;
}

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::exit(1);
}

// The packed bytes that Python's tests pin too. Sizes without padding: what it holds is not part of the layout.
void test_golden_bytes(const char* path) {
  std::vector<uint8_t> packed;
  const auto append = [&](const std::vector<uint8_t>& bytes) { packed.insert(packed.end(), bytes.begin(), bytes.end()); };
  append(Random<UpMatrix>(64, 16, 32, 4, false).packed);
  append(Random<UpMatrix>(32, 32, 32, 8, true).packed);
  append(Random<DownMatrix>(32, 128, 32, 4, true).packed);
  append(Random<DownMatrix>(32, 128, 32, 8, false).packed);
  std::vector<uint8_t> golden(packed.size() + 1);
  std::FILE* file = std::fopen(path, "rb");
  check(file != nullptr, "the file of packed bytes cannot be read");
  golden.resize(std::fread(golden.data(), 1, golden.size(), file));
  std::fclose(file);
  check(packed == golden, "packed bytes differ from tests/kernels/data/packed_layout.bin");
}

void test(const Kernels& kernels, const Case& c, size_t tokens, int bits, std::mt19937& rng) {
  const Random<UpMatrix> up(c.hidden, c.neurons, c.up_group, c.up_bits, c.asymmetric, rng);
  const Random<DownMatrix> down(c.neurons, c.hidden, c.down_group, c.down_bits, c.asymmetric, rng);
  const Ffn ffn{up, down, 0, bits};
  std::vector<float> x(tokens * c.hidden), y(x.size());
  for (auto& v : x) v = static_cast<float>(rng() % 2000) / 1000.f - 1;
  run(kernels, ffn, x.data(), tokens, y.data());
  const std::vector<float> expected = reference(up, down, x);
  double error = 0, size = 1e-20;
  for (size_t i = 0; i < y.size(); i++) {
    error += std::pow(y[i] - expected[i], 2);
    size += std::pow(expected[i], 2);
  }
  std::printf("%s %zux%zu groups %zu,%zu bits %d,%d act %d tokens %zu: relative error %.1e\n", kernels.name, c.hidden,
              c.neurons, c.up_group, c.down_group, c.up_bits, c.down_bits, bits, tokens, std::sqrt(error / size));
  check(std::sqrt(error / size) < (bits == 8 ? 0.04 : 4e-4), "kernels and reference disagree");

  if (tokens == 0) return;
  x.back() = std::numeric_limits<float>::quiet_NaN();
  run(kernels, ffn, x.data(), tokens, y.data());
  check(std::isnan(y.back()) && std::isnan(y[(tokens - 1) * c.hidden]), "NaN does not propagate");
  check(tokens == 1 || !std::isnan(y[0]), "NaN leaks into another token");
}

// Matrices that share an input, the last with a rest of outputs.
void test_linear(const Kernels& kernels, size_t tokens, int bits, std::mt19937& rng) {
  const Random<UpMatrix> first(64, 48, 32, 4, true, rng), last(64, 21, 32, 4, true, rng);
  const Linear linear{{first, last}, bits};
  std::vector<float> x(tokens * 64), y0(tokens * 48), y1(tokens * 21);
  for (auto& v : x) v = static_cast<float>(rng() % 2000) / 1000.f - 1;
  run(kernels, linear, x.data(), tokens, {y0.data(), y1.data()});
  double error = 0, size = 1e-20;
  const auto compare = [&](const Random<UpMatrix>& m, const std::vector<float>& y) {
    for (size_t t = 0; t < tokens; t++)
      for (size_t o = 0; o < m.outputs; o++) {
        double z = 0;
        for (size_t i = 0; i < 64; i++) z += double(x[t * 64 + i]) * m.weights[o * 64 + i];
        error += std::pow(y[t * m.outputs + o] - z, 2), size += z * z;
      }
  };
  compare(first, y0);
  compare(last, y1);
  check(std::sqrt(error / size) < (bits == 8 ? 0.04 : 4e-4), "projections and reference disagree");
}

// Several inferences at once on the same weights.
void test_concurrency(const Kernels& kernels, std::mt19937& rng) {
  const Random<UpMatrix> up(128, 512, 32, 4, false, rng);
  const Random<DownMatrix> down(512, 128, 64, 4, false, rng);
  const Ffn ffn{up, down, 0, 0};
  std::vector<float> x(9 * 128);
  for (auto& v : x) v = static_cast<float>(rng() % 2000) / 1000.f - 1;
  std::vector<std::vector<float>> results(4, std::vector<float>(x.size()));
  std::vector<std::thread> threads;
  for (auto& y : results)
    threads.emplace_back([&] {
      for (int i = 0; i < 5; i++) run(kernels, ffn, x.data(), 9, y.data());
    });
  for (auto& t : threads) t.join();
  for (const auto& y : results) check(y == results[0], "concurrent inferences disagree");
}

}  // namespace

int main() {
#ifdef OV_AFM_PACKED_LAYOUT
  test_golden_bytes(OV_AFM_PACKED_LAYOUT);
#endif
  std::mt19937 rng(0);
  const Case cases[] = {
      {64, 96, 32, 32, 4, 4, false}, {128, 256, 128, 128, 4, 8, true}, {37, 51, 0, 0, 8, 4, false},
      {100, 300, 0, 0, 4, 4, true},  {192, 128, 64, 64, 8, 8, true},   {576, 256, 64, 128, 4, 4, false},
  };
#ifdef RELU2_EMULATE
  for (int i = 0; i < 10000; i++) {
    uint8_t bytes[96];
    for (auto& b : bytes) b = static_cast<uint8_t>(rng() % 4 ? rng() : rng() % 2 ? 0xff : 0x80);  // extremes are common
    check(emulation_is_exact(bytes), "an emulated dot product is wrong");
  }
  std::puts("avx2vnni, avx512vnni and amx are EMULATED in this build");
#endif
  for (const char* name : {"portable", "portable8", "portable16", "avx2", "avx2vnni", "avx512vnni", "amx"}) {
    const Kernels* kernels = kernels_by_name(name);
    if (!kernels) {
      std::printf("%s: not on this CPU or not in this build\n", name);
      continue;
    }
    for (const Case& c : cases)
      for (size_t tokens : {0, 1, 2, 3, 4, 5, 6, 7, 13, &c == cases ? 67 : 16})  // every width of a tile
        for (int bits : {8, 16}) test(*kernels, c, tokens, bits, rng);
    for (size_t tokens : {0, 1, 4, 67})
      for (int bits : {8, 16}) test_linear(*kernels, tokens, bits, rng);
    test_concurrency(*kernels, rng);
  }
  std::puts("all good");
}
