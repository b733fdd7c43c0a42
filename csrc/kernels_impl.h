// The kernels, written once over a vector type V (simd_*.h). Every kernels_<isa>.cpp includes this file under the
// compiler flags of its instruction set, so nothing here may have external linkage or call the standard library.
//
// Three microkernels do all the arithmetic. Each holds the sums of a tile, some vectors of outputs times some slots, in
// registers over one quantization group, and adds them to memory once per group, with the scales of both sides:
//   packed_group  few slots: weights go from memory through registers, decoded on the way
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
  return slots <= static_cast<size_t>(V::kSlots) || !V::kMatrix ? V::kSlots : kMatrixSlots;
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

// Groups of activations that meet one group of weights, or a part of it that is decoded at a time.
struct Span {
  size_t group, length;  // the first, and how many
  size_t units, last;    // of every group, and of the last of this span

  RELU2_INLINE size_t units_of(size_t j) const { return j + 1 == length ? last : units; }
  RELU2_INLINE size_t all_units() const { return (length - 1) * units + last; }
};

// The slots of a tile in one span, and where their outputs go.
struct Tile {
  const int32_t* units;
  const float *scales, *offsets;
  size_t slots, slot;
  float* out;            // of the first token of all
  size_t stride, shift;  // slot s goes to row s >> shift

  RELU2_INLINE Tile(const Activations& x, const Span& span, size_t slot_, float* out_, size_t stride_)
      : units(x.units + span.group * x.slots() * span.units),
        scales(x.scales + span.group * x.slots() + slot_),
        offsets(x.offsets + span.group * x.slots() + slot_),
        slots(x.slots()),
        slot(slot_),
        out(out_),
        stride(stride_),
        shift(x.planes - 1) {}
  RELU2_INLINE const int32_t* units_of(const Span& span, size_t j) const {
    return units + j * slots * span.units + slot * span.units_of(j);
  }
  RELU2_INLINE float* row(int t) const { return out + ((slot + t) >> shift) * stride; }
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

// Scales and zero points of NV vectors of outputs. A sum of codes times activations becomes
// scale * (sum + zero * offset), with the offset of the activations that it took.
template <class V, int NV>
struct Columns {
  typename V::F scale[NV], zero[NV];
  bool zeros = true;  // whether any is not 0
};

// The sums of the groups of a span, in memory: registers are for integers.
template <class V, int W, int NV>
struct Totals {
  alignas(64) float at[W][NV][V::kLanes] = {};

  RELU2_INLINE void add(const typename V::I (&acc)[W][NV], const float* scales) {
    RELU2_UNROLL for (int t = 0; t < W; t++) {
      const typename V::F s = V::set1_float(scales[t]);
      RELU2_UNROLL for (int n = 0; n < NV; n++)
          V::store_float(at[t][n], V::mul_add(V::to_float(acc[t][n]), s, V::load_float(at[t][n])));
    }
  }

  // To the outputs. Vector n of a row goes to row + place(n).
  template <class Place>
  RELU2_INLINE void finish(const Columns<V, NV>& c, const Tile& tile, const Span& span, const Place& place) const {
    c.zeros ? finish_as<true>(c, tile, span, place) : finish_as<false>(c, tile, span, place);
  }

 private:
  template <bool kZeros, class Place>
  RELU2_INLINE void finish_as(const Columns<V, NV>& c, const Tile& tile, const Span& span, const Place& place) const {
    const Tile to = tile;
    float offset[W] = {};
    if (kZeros)
      for (size_t j = 0; j < span.length; j++)
        RELU2_UNROLL for (int t = 0; t < W; t++) offset[t] += to.offsets[j * to.slots + t];
    RELU2_UNROLL for (int n = 0; n < NV; n++) {
      const typename V::F scale = c.scale[n], zero = c.zero[n];
      RELU2_UNROLL for (int t = 0; t < W; t++) {
        typename V::F total = V::load_float(at[t][n]);
        if (kZeros) total = V::mul_add(zero, V::set1_float(offset[t]), total);
        float* p = to.row(t) + place(n);
        V::store_float(p, V::mul_add(total, scale, V::load_float(p)));
      }
    }
  }
};

template <class V>
RELU2_INLINE size_t side_by_side(int n) {
  return static_cast<size_t>(n) * V::kLanes;
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
    return V::low_nibbles(i ? V::template srl16<4>(v) : v);
  }
}

// The same as signed bytes: V::kNibble * (code - 8) or code - 128.
template <class V, int kBits>
RELU2_INLINE typename V::I signed_code(typename V::I v, int i) {
  if constexpr (kBits == 8)
    return V::bit_xor(v, V::set1(static_cast<int32_t>(0x80808080)));
  else
    return i ? V::signed_high(v) : V::signed_low(v);
}

// One group of activations for W slots and NV vectors of outputs, from packed records. p[n] is where vector n has its
// first inputs. A function of its own: inlined in the loop over groups, GCC keeps its sums in memory.
template <class V, int kBits, bool kWords, int W, int NV>
RELU2_NOINLINE void packed_group(const uint8_t* const* p, size_t pieces, const int32_t* x, const float* scales,
                                 Totals<V, W, NV>& totals, size_t ahead, Fetch* next, size_t lines) {
  using I = typename V::I;
  constexpr int kUnits = kUnitsOf<kBits, kWords>;
  constexpr bool kPairs = kForm<kBits, kWords> == Form::kSmallBytes && V::kPairs;
  constexpr bool kTwoChains = W * NV <= kFewSums && kUnits > 1 && !kPairs && V::kLanes == 16;
  I acc[W][NV], more[W][NV];
  RELU2_UNROLL for (int t = 0; t < W; t++) RELU2_UNROLL for (int n = 0; n < NV; n++) acc[t][n] = more[t][n] = V::keep(V::set1(0));
  for (size_t i = 0; i < pieces; i++, x += kUnits * W) {
    RELU2_UNROLL for (int n = 0; n < NV; n++) if (n * V::kLanes % 16 == 0) V::prefetch(p[n] + i * kPiece + ahead);
    if constexpr (kPairs) {
      RELU2_UNROLL for (int n = 0; n < NV; n++) {
        const I v = V::load(p[n] + i * kPiece), w0 = V::keep(code<V, kBits, false>(v, 0)),
                w1 = V::keep(code<V, kBits, false>(v, 1));
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
        RELU2_UNROLL for (int n = 0; n < NV; n++) w[n] = V::keep(code<V, kBits, kWords>(V::load(p[n] + i * kPiece), half));
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
  totals.add(acc, scales);
}

// All groups of a span; p moves on to the next.
template <class V, int kBits, bool kWords, int W, int NV>
RELU2_INLINE void from_packed(const uint8_t** p, const Span& span, const Columns<V, NV>& c, const Tile& tile,
                              size_t ahead, Fetch* next, size_t lines) {
  Totals<V, W, NV> totals;
  for (size_t j = 0; j < span.length; j++) {
    const size_t pieces = span.units_of(j) / kUnitsOf<kBits, kWords>;
    packed_group<V, kBits, kWords, W, NV>(p, pieces, tile.units_of(span, j), tile.scales + j * tile.slots, totals, ahead,
                                          next, lines);
    for (int n = 0; n < NV; n++) p[n] += pieces * kPiece;
  }
  totals.finish(c, tile, span, side_by_side<V>);
}

// One group of weights for W slots and V::kVectors vectors of outputs, from decoded bytes [unit][vector]. kSigned:
// weights are the signed side and activations the unsigned one.
template <class V, bool kSigned, Form kOf, int W>
RELU2_NOINLINE void from_bytes(const uint8_t* w, const Span& span, const Columns<V, V::kVectors>& c, const Tile& tile) {
  using I = typename V::I;
  constexpr int N = V::kVectors;
  Totals<V, W, N> totals;
  for (size_t j = 0; j < span.length; j++) {
    I acc[W][N];
    RELU2_UNROLL for (int t = 0; t < W; t++) RELU2_UNROLL for (int n = 0; n < N; n++) acc[t][n] = V::keep(V::set1(0));
    const int32_t* x = tile.units_of(span, j);
    const size_t units = span.units_of(j);
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
    totals.add(acc, tile.scales + j * tile.slots);
  }
  totals.finish(c, tile, span, side_by_side<V>);
}

// The same for all tiles of slots,
template <class V, bool kSigned, Form kOf>
void all_tiles(const uint8_t* w, const Span& span, const Activations& x, const Columns<V, V::kVectors>& c, float* out,
               size_t stride) {
  const Tiles tiles(x.slots(), V::kSlots);
  for (size_t i = 0; i < tiles.count; i++) {
    const Tile tile(x, span, tiles.begin(i), out, stride);
    switch (tiles.begin(i + 1) - tile.slot) {
      case 1: from_bytes<V, kSigned, kOf, 1>(w, span, c, tile); break;
      case 2: from_bytes<V, kSigned, kOf, 2>(w, span, c, tile); break;
      case 3: from_bytes<V, kSigned, kOf, 3>(w, span, c, tile); break;
      case 4: from_bytes<V, kSigned, kOf, 4>(w, span, c, tile); break;
      case 5: from_bytes<V, kSigned, kOf, V::kSlots >= 5 ? 5 : 1>(w, span, c, tile); break;
      default: from_bytes<V, kSigned, kOf, V::kSlots >= 6 ? 6 : 1>(w, span, c, tile); break;
    }
  }
}

// or with a matrix unit, 16 slots at a time. Here weights are always the signed side. The two planes of a 16-bit token are
// put together as integers.
template <class V, bool kSquares, int kPlanes>
void all_matrix_tiles(const uint8_t* w, const Span& span, const Activations& x, const Columns<V, V::kVectors>& c,
                      float* out, size_t stride) {
  constexpr int N = V::kVectors;
  const Tiles tiles(x.slots(), kMatrixSlots);
  alignas(64) int32_t sums[2][N][16][16];  // in turns: the unit fills one while the other is added
  for (size_t j = 0, done = 0; j < span.length; j++) {
    const size_t units = span.units_of(j);
    const typename V::Unit unit(units);
    for (size_t i = 0; i < tiles.count; i++) {
      const size_t slot = tiles.begin(i), width = tiles.begin(i + 1) - slot;
      const Tile tile(x, span, slot, out, stride);
      int32_t (*const sum)[16][16] = sums[i % 2];
      // Slots after the last of a tile are whatever follows in memory; their sums are not used.
      unit.template multiply<kSquares>(w + done * N * V::kLanes * 4, tile.units_of(span, j), sum);
      const float *scales = tile.scales + j * tile.slots, *offsets = tile.offsets + j * tile.slots;
      for (size_t t = 0; t < width; t += kPlanes) {
        const typename V::F s = V::set1_float(scales[t + kPlanes - 1]);
        float* row = out + (slot + t) / kPlanes * stride;
        RELU2_UNROLL for (int n = 0; n < N; n++) {
          typename V::I a = V::load(sum[n][t]);
          if (kPlanes == 2) a = V::add32(V::times256(a), V::load(sum[n][t + 1]));
          typename V::F total = V::mul(V::to_float(a), s);
          if (c.zeros) {
            const float offset = kPlanes == 2 ? offsets[t] + offsets[t + 1] : offsets[t];
            total = V::mul_add(c.zero[n], V::set1_float(offset), total);
          }
          float* p = row + n * V::kLanes;
          V::store_float(p, V::mul_add(total, c.scale[n], V::load_float(p)));
        }
      }
    }
    done += units;
  }
}

template <class V, bool kSigned, Form kOf>
RELU2_INLINE void multiply_bytes(const uint8_t* w, const Span& span, const Activations& x,
                                 const Columns<V, V::kVectors>& c, float* out, size_t stride) {
  if constexpr (V::kMatrix)
    x.planes == 2 ? all_matrix_tiles<V, kSigned, 2>(w, span, x, c, out, stride)
                  : all_matrix_tiles<V, kSigned, 1>(w, span, x, c, out, stride);
  else
    all_tiles<V, kSigned, kOf>(w, span, x, c, out, stride);
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

  // kBits is that of signed weights, V::kNibble * (code - 8) or code - 128; 0 where codes are as they are.
  template <int kBits>
  RELU2_INLINE Columns<V, NV> columns(size_t group) const {
    constexpr float kUnit = kBits == 4 ? V::kNibble : 1;
    Columns<V, NV> c;
    c.zeros = kBits == 0 || zeros[0];
    RELU2_UNROLL for (int n = 0; n < NV; n++) {
      const typename V::I z = zeros[n] ? V::load_u8(zeros[n] + group * kBlock) : V::set1(zero);
      c.zero[n] = V::mul(V::to_float(V::sub32(V::set1(kBits ? zero : 0), z)), V::set1_float(kUnit));
      c.scale[n] = V::mul(V::load_half(scales[n] + group * kBlock), V::set1_float(1 / kUnit));
    }
    return c;
  }
};

// All spans of UP's inputs.
struct Spans {
  size_t groups, each, weight_group, units, last;

  RELU2_INLINE Spans(const UpMatrix& m, const Activations& x)
      : groups(x.groups()),
        each((m.group < kMaxGroup ? m.group : kMaxGroup) / x.group),
        weight_group((m.group + x.group - 1) / x.group),  // a row of odd length is one group: round up
        units(x.group_units(0)),
        last(x.group_units(groups - 1)) {}
  RELU2_INLINE Span at(size_t group) const {
    return group + each < groups ? Span{group, each, units, units} : Span{group, groups - group, units, last};
  }
};

template <class V, int kBits, bool kWords, int W, int NV>
RELU2_NOINLINE void up_few(const UpMatrix& m, size_t block, const Activations& x, float* sums, Fetch* next,
                           size_t lines) {
  Records<V, NV> records(m, block);
  constexpr size_t kBlocks = blocks_of<V>(NV);
  const Spans spans(m, x);
  for (size_t g = 0; g < spans.groups; g += spans.each) {
    const Span span = spans.at(g);
    const size_t wg = g / spans.weight_group;
    const Columns<V, NV> c = records.template columns<0>(wg);
    // Scales lie behind the weights, where nothing else looks ahead.
    for (size_t b = 0; b < kBlocks; b++) V::prefetch(m.scales(block + kBlocks + b) + wg * kBlock);
    from_packed<V, kBits, kWords, W, NV>(records.weights, span, c, Tile(x, span, 0, sums, NV * V::kLanes),
                                         kAhead / kBlocks, next, lines);
  }
}

// A group of some blocks is decoded once, into 8 KiB at most, for all slots.
template <class V, int kBits, bool kWords>
void up_many(const UpMatrix& m, size_t block, const Activations& x, float* sums, Fetch* next, size_t lines) {
  constexpr int N = V::kVectors, kUnits = kUnitsOf<kBits, kWords>;
  alignas(64) uint8_t bytes[kMaxGroup * N * V::kLanes * (kWords ? 2 : 1)];
  Records<V, N> records(m, block);
  const Spans spans(m, x);
  for (size_t g = 0; g < spans.groups; g += spans.each) {
    const Span span = spans.at(g);
    const size_t pieces = span.all_units() / kUnits;
    for (int n = 0; n < N; n++) {
      const uint8_t* p = records.weights[n];
      for (size_t i = 0; i < pieces; i++) {
        V::prefetch(p + (i + pieces) * kPiece);
        if (lines && n * V::kLanes % kBlock == 0) fetch<V>(*next, lines);
        const typename V::I v = V::load(p + i * kPiece);
        RELU2_UNROLL for (int half = 0; half < kUnits; half++)
            V::store(bytes + ((i * kUnits + half) * N + n) * V::kLanes * 4,
                     V::kMatrix ? signed_code<V, kBits>(v, half) : code<V, kBits, kWords>(v, half));
      }
      records.weights[n] += pieces * kPiece;
    }
    const Columns<V, N> c = records.template columns<V::kMatrix ? kBits : 0>(g / spans.weight_group);
    multiply_bytes<V, false, kForm<kBits, kWords>>(bytes, span, x, c, sums, N * V::kLanes);
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

// Unit `i` of a quad vector: codes as they are for words, else signed bytes.
template <class V, int kBits, bool kWords>
RELU2_INLINE typename V::I down_code(typename V::I v, int i) {
  if constexpr (kWords)
    return code<V, kBits, true>(v, i);
  else
    return signed_code<V, kBits>(v, i);
}

// Scale and zero point of vector n of outputs.
template <class V, int kBits, bool kWords, int NV>
RELU2_INLINE void set_column(const DownMatrix& m, size_t g, size_t output, int n, Columns<V, NV>& c) {
  c.scale[n] = V::load_half(m.scales(g) + output);
  const typename V::I zero = m.asymmetric ? V::load_u8(m.zeros(g) + output) : V::set1(m.zero());
  if constexpr (kWords)
    c.zero[n] = V::to_float(V::sub32(V::set1(0), zero));
  else  // the codes are signed already
    c.zero[n] = V::mul(V::to_float(V::sub32(V::set1(m.zero()), zero)), V::set1_float(kBits == 4 ? V::kNibble : 1));
  c.zeros = m.asymmetric || kWords;
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
  const size_t units = fours * kUnits;
  const Span span{0, 1, units, units};
  const Tile tile(h, span, 0, y, stride);
  for (size_t at = 0; at < row_bytes; at += V::kLanes * 4)
    RELU2_UNROLL for (int part = 0; part < 4 / kZ; part++) {
      const size_t first = at / kPiece * (kPiece * kQuads) + at % kPiece / 4;
      const auto output = [&](int v) {  // of vector v of this pass
        return first + (part * kZ + v / kQuads) * 16 * kQuads + v % kQuads * 16;
      };
      Columns<V, NV> c;
      RELU2_UNROLL for (int v = 0; v < NV; v++) set_column<V, kBits, kWords>(m, g, output(v), v, c);
      I acc[W][NV];
      RELU2_UNROLL for (int t = 0; t < W; t++) RELU2_UNROLL for (int v = 0; v < NV; v++) acc[t][v] = V::keep(V::set1(0));
      const int32_t* x = h.units;
      for (size_t u = 0; u < fours; u++, x += kUnits * W) {
        const uint8_t* const* r = rows + 4 * u;
        const I a = V::load(r[0] + at), b = V::load(r[1] + at), cc = V::load(r[2] + at), d = V::load(r[3] + at);
        if (lines) fetch<V>(*next, lines);
        I z[kZ];
        RELU2_UNROLL for (int k = 0; k < kZ; k++) z[k] = V::keep(quad<V>(a, b, cc, d, part * kZ + k));
        RELU2_UNROLL for (int i = 0; i < kUnits; i++) {
          I w[NV];
          RELU2_UNROLL for (int v = 0; v < NV; v++)
              w[v] = V::keep(down_code<V, kBits, kWords>(z[v / kQuads], v % kQuads * kUnits + i));
          RELU2_UNROLL for (int t = 0; t < W; t++) {
            const I b = V::keep(V::set1(x[i * W + t]));
            RELU2_UNROLL for (int v = 0; v < NV; v++) acc[t][v] = dot<V, kForm<kBits, kWords>>(acc[t][v], b, w[v]);
          }
        }
      }
      Totals<V, W, NV> totals;
      totals.add(acc, tile.scales);
      totals.finish(c, tile, span, output);
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
      for (int n = 0; n < N; n++) set_column<V, kBits, kWords>(m, g, o + n * V::kLanes, n, c);
      multiply_bytes<V, !kWords, kForm<kBits, kWords>>(bytes + panel * units * N * V::kLanes * 4, {0, 1, units, units}, h,
                                                       c, y + o, stride);
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
  constexpr size_t kNever = ~size_t{0};
  return {name,
          V::kWords,
          V::kSlots,
          V::kMatrix ? kMatrixSlots : V::kSlots,
          V::kMatrix ? 32 : 4,
          V::kMatrix ? V::kSlots + 1 : kNever,
          quantize_slots<V>,
          up<V>,
          active,
          square_slots<V>,
          down<V>};
}

}  // namespace
