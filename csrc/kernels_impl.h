// The kernels, written once over a vector type V (simd_*.h). Every kernels_<isa>.cpp includes this file under the
// compiler flags of its instruction set, so nothing here may have external linkage or call the standard library.
//
// Three microkernels do all the arithmetic. Each holds the sums of a tile, some vectors of outputs times some slots, in
// registers over one quantization group, and adds them to memory once per group, with the scales of both sides:
//   from_packed   few slots: weights go from memory through registers, decoded on the way
//   from_bytes    many slots: weights were decoded once, into the first-level cache, for all slots
//   down_few      few slots: rows of DOWN are interleaved and decoded in registers
#pragma once

#include "kernels.h"
#include "quantize_impl.h"

// Without unrolling, arrays of vectors do not become registers.
#if defined(_MSC_VER) || defined(RELU2_PLAIN)
#define RELU2_UNROLL
#define RELU2_NOINLINE
#else
#define RELU2_UNROLL _Pragma("GCC unroll 16")
#define RELU2_NOINLINE __attribute__((noinline))
#endif

namespace {

using namespace relu2;

// Bytes between what is computed and what is fetched, of all records together that are read side by side: a few
// microseconds of memory at full speed. The hardware's own prefetching stops at every page of 4 KiB.
constexpr size_t kAhead = 4096;
// Up to so many vectors of sums a second one each hides the latency of a dot product.
constexpr int kFewSums = 4;

template <class V>
constexpr size_t blocks_of(int vectors) {
  return static_cast<size_t>(vectors) * V::kLanes / kBlock;
}

template <class V>
RELU2_INLINE constexpr size_t widest_tile(size_t slots) {
  return slots <= static_cast<size_t>(V::kSlots) || !V::kMatrix ? V::kSlots : 16;
}

template <class V>
RELU2_INLINE void fetch(Fetch& f, size_t lines) {
  for (; lines > 0 && f.next_row < f.rows; lines--) {
    V::prefetch_l2(f.row[f.next_row] + f.next_byte);
    if (f.side > 1) {  // the same line of each row that is side by side, then the next line
      if (++f.next_row % f.side) continue;
      f.next_row -= f.side;
    }
    if ((f.next_byte += kPiece) >= f.row_bytes) f.next_byte = 0, f.next_row += f.side;
  }
}

// Where a group's sums of a tile go, and what they are multiplied with.
struct Target {
  float* out;            // of the first token of all
  size_t stride, shift;  // slot s goes to row s >> shift
  const float* scales;   // of the slots of all tiles
  const int32_t* sums;

  RELU2_INLINE Target(float* out_, size_t stride_, const Activations& x, size_t group)
      : out(out_), stride(stride_), shift(x.planes - 1), scales(x.scales + group * x.slots()),
        sums(x.sums + group * x.slots()) {}
};

// What a dot product multiplies: two 16-bit words, or four bytes, of which perhaps two products fit into 16 bits.
enum class Form { kWords, kBytes, kSmallBytes };

template <int kBits, bool kWords>
constexpr Form kForm = kWords ? Form::kWords : kBits == 4 ? Form::kSmallBytes : Form::kBytes;

// Units of activations that the codes in a 32-bit lane meet.
template <int kBits, bool kWords>
constexpr int kUnitsOf = (kWords ? 16 : 8) / kBits;

// acc + products of weights with activations. Of bytes the first factor is unsigned and the second signed.
template <class V, Form kOf>
RELU2_INLINE typename V::I dot(typename V::I acc, typename V::I a, typename V::I b) {
  if constexpr (kOf == Form::kWords)
    return V::dot_words(acc, a, b);
  else
    return V::template dot<kOf == Form::kSmallBytes>(acc, a, b);
}

// Scales and zero points of NV vectors of outputs. A sum begins with `offset` times the sum of the slot's values, which
// is what the zero points add up to.
template <class V, int NV>
struct Columns {
  typename V::F scale[NV];
  typename V::I offset[NV];

};

template <class V, int W, int NV>
RELU2_INLINE void begin_sums(typename V::I (&acc)[W][NV], const Columns<V, NV>& c, const Target& to, size_t slot,
                             bool multiply) {
  RELU2_UNROLL for (int t = 0; t < W; t++) {
    const typename V::I sum = V::set1(to.sums[slot + t]);
    RELU2_UNROLL for (int n = 0; n < NV; n++) acc[t][n] = multiply ? V::mul32(c.offset[n], sum) : V::set1(0);
  }
}

template <class V, int W, int NV>
RELU2_INLINE void add_scaled(const typename V::I (&acc)[W][NV], const Columns<V, NV>& c, const Target& to,
                             size_t slot) {
  RELU2_UNROLL for (int t = 0; t < W; t++) {
    const typename V::F s = V::set1_float(to.scales[slot + t]);
    float* row = to.out + ((slot + t) >> to.shift) * to.stride;
    RELU2_UNROLL for (int n = 0; n < NV; n++) {
      float* p = row + n * V::kLanes;
      V::store_float(p, V::mul_add(V::to_float(acc[t][n]), V::mul(c.scale[n], s), V::load_float(p)));
    }
  }
}

// Unit `i` of a vector of packed codes.
template <class V, int kBits, bool kWords>
RELU2_INLINE typename V::I code(typename V::I v, int i) {
  if constexpr (kWords) {
    const typename V::I low = V::set1(kBits == 4 ? 0x000f000f : 0x00ff00ff);
    if constexpr (kBits == 8) return i ? V::template srl16<8>(v) : V::bit_and(v, low);
    if (i == 3) return V::template srl16<12>(v);
    return V::bit_and(i == 0 ? v : i == 1 ? V::template srl16<8>(v) : V::template srl16<4>(v), low);
  } else {
    if constexpr (kBits == 8) return v;
    return V::bit_and(i ? V::template srl16<4>(v) : v, V::set1(0x0f0f0f0f));
  }
}

// One group for W slots and NV vectors of outputs, from packed records. p[n] is where vector n has its first inputs.
template <class V, int kBits, bool kWords, int W, int NV>
RELU2_INLINE void from_packed(const uint8_t* const* p, size_t pieces, const int32_t* x, const Columns<V, NV>& c,
                              const Target& to, size_t ahead, Fetch* next, size_t lines) {
  using I = typename V::I;
  constexpr int kUnits = kUnitsOf<kBits, kWords>;
  constexpr bool kPairs = kForm<kBits, kWords> == Form::kSmallBytes && V::kPairs;
  constexpr bool kTwoChains = W * NV <= kFewSums && kUnits > 1 && !kPairs;
  I acc[W][NV], more[W][NV];
  begin_sums<V, W, NV>(acc, c, to, 0, true);
  if (kTwoChains) RELU2_UNROLL for (int t = 0; t < W; t++) RELU2_UNROLL for (int n = 0; n < NV; n++) more[t][n] = V::set1(0);
  for (size_t i = 0; i < pieces; i++, x += kUnits * W) {
    RELU2_UNROLL for (int n = 0; n < NV; n++) if (n * V::kLanes % 16 == 0) V::prefetch(p[n] + i * kPiece + ahead);
    if constexpr (kPairs) {
      RELU2_UNROLL for (int n = 0; n < NV; n++) {
        const I v = V::load(p[n] + i * kPiece), w0 = code<V, kBits, false>(v, 0), w1 = code<V, kBits, false>(v, 1);
        RELU2_UNROLL for (int t = 0; t < W; t++) acc[t][n] =
            V::dot_pair(acc[t][n], w0, V::set1(x[t]), w1, V::set1(x[W + t]));
      }
    } else RELU2_UNROLL for (int half = 0; half < kUnits; half++) {
      const auto add = [&](int t, int n, I w, I b) {
        I& sum = kTwoChains && half % 2 ? more[t][n] : acc[t][n];
        sum = dot<V, kForm<kBits, kWords>>(sum, w, b);
      };
      if constexpr (W <= 2) {  // activations stay in registers, or
        I b[W];
        RELU2_UNROLL for (int t = 0; t < W; t++) b[t] = V::keep(V::set1(x[half * W + t]));
        RELU2_UNROLL for (int n = 0; n < NV; n++) {
          const I w = code<V, kBits, kWords>(V::load(p[n] + i * kPiece), half);
          RELU2_UNROLL for (int t = 0; t < W; t++) add(t, n, w, b[t]);
        }
      } else {  // weights do
        I w[NV];
        RELU2_UNROLL for (int n = 0; n < NV; n++) w[n] = code<V, kBits, kWords>(V::load(p[n] + i * kPiece), half);
        RELU2_UNROLL for (int t = 0; t < W; t++) {
          const I b = V::keep(V::set1(x[half * W + t]));
          RELU2_UNROLL for (int n = 0; n < NV; n++) add(t, n, w[n], b);
        }
      }
    }
    if (lines) fetch<V>(*next, lines);
  }
  if (kTwoChains) RELU2_UNROLL for (int t = 0; t < W; t++) RELU2_UNROLL for (int n = 0; n < NV; n++) acc[t][n] =
      V::add32(acc[t][n], more[t][n]);
  add_scaled<V, W, NV>(acc, c, to, 0);
}

// One group for W slots and V::kVectors vectors of outputs, from decoded bytes [unit][vector]. kSigned: weights are the
// signed side and activations the unsigned one.
template <class V, bool kSigned, Form kOf, int W>
RELU2_NOINLINE void from_bytes(const uint8_t* w, size_t units, const int32_t* x, const Columns<V, V::kVectors>& c,
                               const Target& to, size_t slot, bool multiply) {
  using I = typename V::I;
  constexpr int N = V::kVectors;
  I acc[W][N];
  begin_sums<V, W, N>(acc, c, to, slot, multiply);
  size_t u = 0;
  if constexpr (kOf == Form::kSmallBytes && V::kPairs) {
    constexpr size_t kUnit = N * V::kLanes * 4;
    for (; u + 2 <= units; u += 2, w += 2 * kUnit, x += 2 * W) {
      I v[2][N];
      RELU2_UNROLL for (int n = 0; n < N; n++) {
        v[0][n] = V::load(w + n * V::kLanes * 4);
        v[1][n] = V::load(w + kUnit + n * V::kLanes * 4);
      }
      RELU2_UNROLL for (int t = 0; t < W; t++) {
        const I b0 = V::keep(V::set1(x[t])), b1 = V::keep(V::set1(x[W + t]));
        RELU2_UNROLL for (int n = 0; n < N; n++) acc[t][n] = kSigned
            ? V::dot_pair(acc[t][n], b0, v[0][n], b1, v[1][n])
            : V::dot_pair(acc[t][n], v[0][n], b0, v[1][n], b1);
      }
    }
  }
  for (; u < units; u++, w += N * V::kLanes * 4, x += W) {
    I v[N];
    RELU2_UNROLL for (int n = 0; n < N; n++) v[n] = V::load(w + n * V::kLanes * 4);
    RELU2_UNROLL for (int t = 0; t < W; t++) {
      const I b = V::keep(V::set1(x[t]));
      RELU2_UNROLL for (int n = 0; n < N; n++) acc[t][n] =
          kSigned ? dot<V, kOf>(acc[t][n], b, v[n]) : dot<V, kOf>(acc[t][n], v[n], b);
    }
  }
  add_scaled<V, W, N>(acc, c, to, slot);
}

// The same for all tiles of slots,
template <class V, bool kSigned, Form kOf>
void all_tiles(const uint8_t* w, size_t units, const Activations& x, size_t group, const Columns<V, V::kVectors>& c,
               const Target& to, bool multiply) {
  const Tiles tiles(x.slots(), V::kSlots);
  for (size_t i = 0; i < tiles.count; i++) {
    const size_t slot = tiles.begin(i), width = tiles.begin(i + 1) - slot;
    const int32_t* at = x.at(group, slot);
    switch (width) {
      case 1: from_bytes<V, kSigned, kOf, 1>(w, units, at, c, to, slot, multiply); break;
      case 2: from_bytes<V, kSigned, kOf, 2>(w, units, at, c, to, slot, multiply); break;
      case 3: from_bytes<V, kSigned, kOf, 3>(w, units, at, c, to, slot, multiply); break;
      case 4: from_bytes<V, kSigned, kOf, 4>(w, units, at, c, to, slot, multiply); break;
      case 5: from_bytes<V, kSigned, kOf, V::kSlots >= 5 ? 5 : 1>(w, units, at, c, to, slot, multiply); break;
      default: from_bytes<V, kSigned, kOf, V::kSlots >= 6 ? 6 : 1>(w, units, at, c, to, slot, multiply); break;
    }
  }
}

// or with a matrix unit, 16 slots at a time.
template <class V, bool kSigned>
void all_matrix_tiles(const uint8_t* w, size_t units, const Activations& x, size_t group,
                      const Columns<V, V::kVectors>& c, const Target& to, bool multiply) {
  using I = typename V::I;
  const typename V::Unit unit(units);
  alignas(64) int32_t sums[V::kVectors][16][16];
  const Tiles tiles(x.slots(), 16);
  for (size_t i = 0; i < tiles.count; i++) {
    const size_t slot = tiles.begin(i), width = tiles.begin(i + 1) - slot;
    // Slots after the last of a tile are whatever follows in memory; their sums are not used.
    unit.template multiply<kSigned>(w, x.at(group, slot), sums);
    for (size_t t = 0; t < width; t++) {
      I acc[1][V::kVectors];
      begin_sums<V, 1, V::kVectors>(acc, c, to, slot + t, multiply);
      for (int n = 0; n < V::kVectors; n++) acc[0][n] = V::add32(acc[0][n], V::load(sums[n][t]));
      add_scaled<V, 1, V::kVectors>(acc, c, to, slot + t);
    }
  }
}

template <class V, bool kSigned, Form kOf>
RELU2_INLINE void multiply_bytes(const uint8_t* w, size_t units, const Activations& x, size_t group,
                                 const Columns<V, V::kVectors>& c, const Target& to, bool multiply) {
  if constexpr (V::kMatrix)
    all_matrix_tiles<V, kSigned>(w, units, x, group, c, to, multiply);
  else
    all_tiles<V, kSigned, kOf>(w, units, x, group, c, to, multiply);
}

// -- UP

// Where NV vectors of outputs from a block on have their weights, scales and zero points.
template <class V, int NV>
struct Records {
  const uint8_t* weights[NV];
  const uint16_t* scales[NV];
  const uint8_t* zeros[NV];
  int zero;

  // Behind the last block it stands again: its outputs are computed twice and not used.
  RELU2_INLINE Records(const UpMatrix& m, size_t block) : zero(m.zero()) {
    for (int n = 0; n < NV; n++) {
      const size_t wanted = block + n * V::kLanes / kBlock, lane = n * V::kLanes % kBlock;
      const size_t record = wanted < m.blocks() ? wanted : m.blocks() - 1;
      weights[n] = m.record(record) + lane * 4;
      scales[n] = m.scales(record) + lane;
      zeros[n] = m.asymmetric ? m.zeros(record) + lane : nullptr;
    }
  }

  RELU2_INLINE Columns<V, NV> columns(size_t group) const {
    Columns<V, NV> c;
    RELU2_UNROLL for (int n = 0; n < NV; n++) {
      c.scale[n] = V::load_half(scales[n] + group * kBlock);
      c.offset[n] = zeros[n] ? V::sub32(V::set1(0), V::load_u8(zeros[n] + group * kBlock)) : V::set1(-zero);
    }
    return c;
  }
};

template <class V, int kBits, bool kWords, int W, int NV>
RELU2_NOINLINE void up_few(const UpMatrix& m, size_t block, const Activations& x, float* sums, Fetch* next,
                           size_t lines) {
  Records<V, NV> records(m, block);
  constexpr size_t kBlocks = blocks_of<V>(NV);
  for (size_t g = 0; g < x.groups(); g++) {
    const size_t wg = g * x.group / m.group, pieces = x.group_units(g) / kUnitsOf<kBits, kWords>;
    const Columns<V, NV> c = records.columns(wg);
    // Scales lie behind the weights, where nothing else looks ahead.
    for (size_t b = 0; b < kBlocks; b++) V::prefetch(m.scales(block + kBlocks + b) + wg * kBlock);
    from_packed<V, kBits, kWords, W, NV>(records.weights, pieces, x.at(g, 0), c, Target(sums, NV * V::kLanes, x, g),
                                 kAhead / kBlocks, next, lines);
    for (int n = 0; n < NV; n++) records.weights[n] += pieces * kPiece;
  }
}

// A group of some blocks is decoded once, into 8 KiB at most, for all slots.
template <class V, int kBits, bool kWords>
void up_many(const UpMatrix& m, size_t block, const Activations& x, float* sums, Fetch* next, size_t lines) {
  constexpr int N = V::kVectors, kUnits = kUnitsOf<kBits, kWords>;
  alignas(64) uint8_t bytes[kMaxGroup * N * V::kLanes * (kWords ? 2 : 1)];
  Records<V, N> records(m, block);
  for (size_t g = 0; g < x.groups(); g++) {
    const size_t units = x.group_units(g), pieces = units / kUnits;
    for (int n = 0; n < N; n++) {
      const uint8_t* p = records.weights[n];
      for (size_t i = 0; i < pieces; i++) {
        V::prefetch(p + (i + pieces) * kPiece);
        if (lines && n * V::kLanes % kBlock == 0) fetch<V>(*next, lines);
        const typename V::I v = V::load(p + i * kPiece);
        RELU2_UNROLL for (int half = 0; half < kUnits; half++)
            V::store(bytes + ((i * kUnits + half) * N + n) * V::kLanes * 4, code<V, kBits, kWords>(v, half));
      }
      records.weights[n] += pieces * kPiece;
    }
    multiply_bytes<V, false, kForm<kBits, kWords>>(bytes, units, x, g, records.columns(g * x.group / m.group),
                                    Target(sums, N * V::kLanes, x, g), true);
  }
}

// z of NV vectors of outputs from a block on, of which `count` blocks are used.
template <class V, int kBits, bool kWords, int NV>
void up_panel(const UpMatrix& m, size_t block, size_t count, const Activations& x, float* z, size_t stride, Fetch* next,
              size_t lines) {
  constexpr size_t kOutputs = NV * V::kLanes;
  alignas(64) float sums[kChunk * kOutputs];  // not in z, whose rows may all lie in the same set of a cache
  for (size_t i = 0; i < x.tokens * kOutputs; i++) sums[i] = 0;
  switch (x.slots() <= static_cast<size_t>(V::kSlots) ? x.slots() : 0) {
    case 1: if constexpr (NV == 4) up_few<V, kBits, kWords, 1, NV>(m, block, x, sums, next, lines); break;
    case 2: if constexpr (NV == 4) up_few<V, kBits, kWords, 2, NV>(m, block, x, sums, next, lines); break;
    case 3: if constexpr (NV == V::kVectors) up_few<V, kBits, kWords, 3, NV>(m, block, x, sums, next, lines); break;
    case 4: if constexpr (NV == V::kVectors) up_few<V, kBits, kWords, 4, NV>(m, block, x, sums, next, lines); break;
    case 5: if constexpr (NV == V::kVectors && V::kSlots >= 5) up_few<V, kBits, kWords, 5, NV>(m, block, x, sums, next, lines); break;
    case 6: if constexpr (NV == V::kVectors && V::kSlots >= 6) up_few<V, kBits, kWords, 6, NV>(m, block, x, sums, next, lines); break;
    default: if constexpr (NV == V::kVectors) up_many<V, kBits, kWords>(m, block, x, sums, next, lines); break;
  }
  const size_t used = count * kBlock < kOutputs ? count * kBlock : kOutputs;
  for (size_t t = 0; t < x.tokens; t++)
    for (size_t i = 0; i < used; i++) z[t * stride + i] = sums[t * kOutputs + i];
}

template <class V, int kBits, bool kWords>
void up_bits(const UpMatrix& m, size_t block, size_t count, const Activations& x, float* z, size_t stride,
             Fetch* next) {
  const bool four = x.slots() <= 2;
  const size_t panel = blocks_of<V>(four ? 4 : V::kVectors), panels = (count + panel - 1) / panel;
  // The lines of `next` are spread over the pieces of 64 bytes, or the decoding of them.
  const size_t pieces = x.inputs * kBits / 32 * (x.slots() > static_cast<size_t>(V::kSlots) ? panel : 1);
  const size_t lines = next ? (next->lines() + panels * pieces - 1) / (panels * pieces) : 0;
  for (size_t b = 0; b < count; b += panel) {
    if (four)
      up_panel<V, kBits, kWords, 4>(m, block + b, count - b, x, z + b * kBlock, stride, next, lines);
    else
      up_panel<V, kBits, kWords, V::kVectors>(m, block + b, count - b, x, z + b * kBlock, stride, next, lines);
  }
}

template <class V>
void up(const UpMatrix& m, size_t block, size_t count, const Activations& x, float* z, size_t stride, Fetch* next) {
  if constexpr (V::kWords) {
    if (x.words)
      return m.bits == 4 ? up_bits<V, 4, true>(m, block, count, x, z, stride, next)
                         : up_bits<V, 8, true>(m, block, count, x, z, stride, next);
  }
  m.bits == 4 ? up_bits<V, 4, false>(m, block, count, x, z, stride, next)
              : up_bits<V, 8, false>(m, block, count, x, z, stride, next);
}

// -- DOWN

// Quad z (0..3) of the same bytes of four rows: every 32-bit lane is one output with four neurons.
template <class V>
RELU2_INLINE typename V::I quad(typename V::I a, typename V::I b, typename V::I c, typename V::I d, int z) {
  const typename V::I ab = z < 2 ? V::unpack_lo8(a, b) : V::unpack_hi8(a, b);
  const typename V::I cd = z < 2 ? V::unpack_lo8(c, d) : V::unpack_hi8(c, d);
  return z % 2 ? V::unpack_hi16(ab, cd) : V::unpack_lo16(ab, cd);
}

// Unit `i` of a quad vector: codes as they are for words, else signed bytes, V::kNibble * (code - 8) or code - 128.
template <class V, int kBits, bool kWords>
RELU2_INLINE typename V::I down_code(typename V::I v, int i) {
  if constexpr (kWords)
    return code<V, kBits, true>(v, i);
  else if constexpr (kBits == 8) return V::bit_xor(v, V::set1(static_cast<int32_t>(0x80808080)));
  else
    return i ? V::signed_high(v) : V::signed_low(v);
}

// Scale and offset of one vector of outputs. Whether the offset is anything but zero depends on the matrix and the form.
template <class V, int kBits, bool kWords>
RELU2_INLINE void set_column(const DownMatrix& m, size_t g, size_t output, typename V::F& scale, typename V::I& offset) {
  scale = V::load_half(m.scales(g) + output);
  const typename V::I zero = m.asymmetric ? V::load_u8(m.zeros(g) + output) : V::set1(m.zero());
  if constexpr (kWords)
    offset = V::sub32(V::set1(0), zero);
  else
    offset = V::mul32(V::sub32(V::set1(m.zero()), zero), V::set1(kBits == 4 ? V::kNibble : 1));
}

// Few slots. A tile of outputs stays in registers while all rows pass, so no sum goes to memory on the way. Rows are in
// the second-level cache, where the phase before fetched them: walking columns from memory would miss in each row.
template <class V, int kBits, bool kWords, int W, int NV>
RELU2_NOINLINE void down_few(const DownMatrix& m, size_t g, const uint8_t* list, const Activations& h, float* y,
                             size_t stride, Fetch* next) {
  using I = typename V::I;
  constexpr int kQuads = 8 / kBits, kZ = NV / kQuads;  // quads of 16 outputs in a vector; vectors z of one pass
  constexpr int kUnits = kWords ? 2 : 1;               // of four rows
  const size_t row_bytes = m.row_bytes(), fours = h.inputs / 4, lines = next ? (fours < 8 ? 2 : 1) : 0;
  const uint8_t* rows[kMaxGroup];
  for (size_t i = 0; i < h.inputs; i++) rows[i] = m.record(g) + list[i] * row_bytes;
  const Target to(y, stride, h, 0);
  for (size_t at = 0; at < row_bytes; at += V::kLanes * 4)
    RELU2_UNROLL for (int part = 0; part < 4 / kZ; part++) {
      const size_t first = at / kPiece * (kPiece * kQuads) + at % kPiece / 4;
      const auto output = [&](int v) {  // of vector v of this pass
        return first + (part * kZ + v / kQuads) * 16 * kQuads + v % kQuads * 16;
      };
      Columns<V, NV> c;
      RELU2_UNROLL for (int v = 0; v < NV; v++) set_column<V, kBits, kWords>(m, g, output(v), c.scale[v], c.offset[v]);
      I acc[W][NV];
      begin_sums<V, W, NV>(acc, c, to, 0, m.asymmetric || kWords);
      const int32_t* x = h.units;
      for (size_t u = 0; u < fours; u++, x += kUnits * W) {
        const uint8_t* const* r = rows + 4 * u;
        const I a = V::load(r[0] + at), b = V::load(r[1] + at), cc = V::load(r[2] + at), d = V::load(r[3] + at);
        if (lines) fetch<V>(*next, lines);
        RELU2_UNROLL for (int k = 0; k < kZ; k++) {
          const I z = quad<V>(a, b, cc, d, part * kZ + k);
          RELU2_UNROLL for (int q = 0; q < kQuads; q++) RELU2_UNROLL for (int i = 0; i < kUnits; i++) {
            const I w = down_code<V, kBits, kWords>(z, q * kUnits + i);
            RELU2_UNROLL for (int t = 0; t < W; t++) acc[t][k * kQuads + q] =
                dot<V, kForm<kBits, kWords>>(acc[t][k * kQuads + q], V::keep(V::set1(x[i * W + t])), w);
          }
        }
      }
      RELU2_UNROLL for (int t = 0; t < W; t++) {
        const typename V::F s = V::set1_float(to.scales[t]);
        RELU2_UNROLL for (int v = 0; v < NV; v++) {
          float* p = y + (static_cast<size_t>(t) >> to.shift) * stride + output(v);
          V::store_float(p, V::mul_add(V::to_float(acc[t][v]), V::mul(c.scale[v], s), V::load_float(p)));
        }
      }
    }
}

// Many slots. 64 bytes of each row are interleaved and decoded once, into 16 KiB; then the microkernel of UP with
// unsigned activations.
template <class V, int kBits, bool kWords>
void down_many(const DownMatrix& m, size_t g, const uint8_t* list, const Activations& h, float* y, size_t stride,
               Fetch* next) {
  constexpr int N = V::kVectors, kQuads = 8 / kBits, kUnits = kWords ? 2 : 1;
  constexpr size_t kOutputs = kPiece * kQuads;
  alignas(64) uint8_t bytes[kOutputs * kMaxGroup * kUnits];
  const size_t row_bytes = m.row_bytes(), fours = h.inputs / 4, units = fours * kUnits;
  const uint8_t* base = m.record(g);
  for (size_t at = 0; at < row_bytes; at += kPiece) {
    for (size_t i = 0; i < fours; i++) {
      const uint8_t* r[4];
      for (int k = 0; k < 4; k++) {
        r[k] = base + list[4 * i + k] * row_bytes + at;
        if (!next) V::prefetch(r[k] + 2 * kPiece);
      }
      if (next) fetch<V>(*next, 2);
      RELU2_UNROLL for (int part = 0; part < 16 / V::kLanes; part++) {
        const size_t byte = part * V::kLanes * 4;
        const typename V::I a = V::load(r[0] + byte), b = V::load(r[1] + byte), c = V::load(r[2] + byte),
                            d = V::load(r[3] + byte);
        RELU2_UNROLL for (int z = 0; z < 4; z++) {
          const typename V::I v = quad<V>(a, b, c, d, z);
          RELU2_UNROLL for (int q = 0; q < kQuads; q++) {
            const int vector = (z * 16 * kQuads + q * 16) / V::kLanes + part;
            RELU2_UNROLL for (int u = 0; u < kUnits; u++)
                V::store(bytes + ((vector / N * units + i * kUnits + u) * N + vector % N) * V::kLanes * 4,
                         down_code<V, kBits, kWords>(v, q * kUnits + u));
          }
        }
      }
    }
    for (size_t panel = 0; panel < kOutputs / (N * V::kLanes); panel++) {
      const size_t o = at * kQuads + panel * N * V::kLanes;
      Columns<V, N> c;
      for (int n = 0; n < N; n++) set_column<V, kBits, kWords>(m, g, o + n * V::kLanes, c.scale[n], c.offset[n]);
      multiply_bytes<V, !kWords, kForm<kBits, kWords>>(bytes + panel * units * N * V::kLanes * 4, units, h, 0, c,
                                                       Target(y + o, stride, h, 0), m.asymmetric || kWords);
    }
  }
}

template <class V, int kBits, bool kWords>
void down_bits(const DownMatrix& m, size_t g, const uint8_t* rows, const Activations& h, float* y, size_t stride,
               Fetch* next) {
  constexpr int N = V::kVectors;
  switch (h.slots() <= static_cast<size_t>(V::kSlots) ? h.slots() : 0) {
    case 1: return down_few<V, kBits, kWords, 1, 4>(m, g, rows, h, y, stride, next);
    case 2: return down_few<V, kBits, kWords, 2, 4>(m, g, rows, h, y, stride, next);
    case 3: return down_few<V, kBits, kWords, 3, N>(m, g, rows, h, y, stride, next);
    case 4: return down_few<V, kBits, kWords, 4, N>(m, g, rows, h, y, stride, next);
    case 5: if constexpr (V::kSlots >= 5) return down_few<V, kBits, kWords, 5, N>(m, g, rows, h, y, stride, next); break;
    case 6: if constexpr (V::kSlots >= 6) return down_few<V, kBits, kWords, 6, N>(m, g, rows, h, y, stride, next); break;
    default: return down_many<V, kBits, kWords>(m, g, rows, h, y, stride, next);
  }
}

template <class V>
void down(const DownMatrix& m, size_t g, const uint8_t* rows, const Activations& h, float* y, size_t stride,
          Fetch* next) {
  if (h.inputs == 0) return;
  if constexpr (V::kWords) {
    if (h.words)
      return m.bits == 4 ? down_bits<V, 4, true>(m, g, rows, h, y, stride, next)
                         : down_bits<V, 8, true>(m, g, rows, h, y, stride, next);
  }
  m.bits == 4 ? down_bits<V, 4, false>(m, g, rows, h, y, stride, next)
              : down_bits<V, 8, false>(m, g, rows, h, y, stride, next);
}

// -- Quantization

// A matrix unit reads the slots of a wide tile as rows.
template <class V>
bool quantize_slots(const float* x, size_t stride, size_t size, const Activations& to, size_t slot, size_t width) {
  if (V::kMatrix && to.slots() > static_cast<size_t>(V::kSlots)) return quantize<true>(x, stride, size, to, slot, width);
  return quantize<false>(x, stride, size, to, slot, width);
}

template <class V>
void square_slots(const float* z, size_t stride, float threshold, const uint8_t* rows, size_t count, int bits,
                  const Activations& to, bool* finite) {
  const float unit = bits == 4 ? 1.f / V::kNibble : 1.f;
  const size_t widest = widest_tile<V>(to.slots());
  if (V::kMatrix && to.slots() > static_cast<size_t>(V::kSlots))
    squares<true>(z, stride, threshold, rows, count, to, widest, unit, finite);
  else
    squares<false>(z, stride, threshold, rows, count, to, widest, unit, finite);
}

template <class V>
constexpr Kernels kernels(const char* name) {
  return {name, V::kWords, V::kSlots, V::kMatrix ? 16 : V::kSlots, V::kMatrix ? 32 : 4, quantize_slots<V>, up<V>, active, square_slots<V>, down<V>};
}

}  // namespace
