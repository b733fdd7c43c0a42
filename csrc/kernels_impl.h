// The kernels, written once over a vector type V (simd_*.h). Every kernels_<isa>.cpp includes this file under the
// compiler flags of its instruction set, so nothing here may have external linkage or call the standard library.
#pragma once

#include "kernels.h"
#include "quantize_impl.h"

// Without unrolling, arrays of vectors do not become registers.
#if defined(_MSC_VER) || defined(RELU2_PLAIN)
#define RELU2_UNROLL
#else
#define RELU2_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

using namespace relu2;

template <class V, int kActBits>
RELU2_INLINE typename V::I dot(typename V::I acc, typename V::I w, typename V::I x) {
  if constexpr (kActBits == 8)
    return V::dot8(acc, w, x);
  else
    return V::dot16(acc, w, x);
}

// Weights of a vector as the dot product wants them. A 32-bit lane of `v` holds one quad of codes (int8) or two
// (int4); each quad becomes one vector of bytes, or two of 16-bit values: (0, 2) and (1, 3).
template <class V, int kBits, int kActBits>
struct Decoded {
  static constexpr int kQuads = 8 / kBits;
  static constexpr int kUnits = kQuads * kActBits / 8;
  typename V::I unit[kUnits];

  RELU2_INLINE explicit Decoded(typename V::I v) {
    constexpr uint32_t kCode = (1u << kBits) - 1;
    const typename V::I low = V::set1(static_cast<int32_t>(kCode * (kActBits == 8 ? 0x01010101 : 0x00010001)));
    unit[0] = V::bit_and(v, low);
    if constexpr (kActBits == 16) unit[1] = V::bit_and(V::template srl16<8>(v), low);
    if constexpr (kBits == 4) unit[kUnits / 2] = V::bit_and(V::template srl16<4>(v), low);
    if constexpr (kBits == 4 && kActBits == 16) unit[3] = V::template srl16<12>(v);
  }
};

// Scales and zero points of 16 outputs.
template <class V>
struct Columns {
  static constexpr int kParts = 16 / V::kLanes;
  typename V::F scale[kParts];
  typename V::I zero[kParts];

  RELU2_INLINE Columns(const Matrix& m, const uint16_t* scales, const uint8_t* zeros) {
    RELU2_UNROLL for (int n = 0; n < kParts; n++) {
      scale[n] = V::load_half(scales + n * V::kLanes);
      zero[n] = m.asymmetric ? V::load_u8(zeros + n * V::kLanes) : V::set1(m.zero());
    }
  }
};

// out[token][16] += the dot products of `units` decoded weights with kTokens tokens, over one quantization group.
template <class V, int kActBits, int kTokens>
RELU2_INLINE void tile(const typename V::I* w, size_t units, const Columns<V>& columns, const Activations& x,
                       size_t first, size_t group, float* out, size_t stride) {
  constexpr int kParts = Columns<V>::kParts;
  const int32_t* xu = x.units + first * x.units_per_token() + group * (x.group * kActBits / 32) * kTokens;
  const float* scales = x.scales + first * x.groups() + group * kTokens;
  const int32_t* sums = x.sums + first * x.groups() + group * kTokens;
  typename V::I acc[kTokens][kParts];
  RELU2_UNROLL for (int t = 0; t < kTokens; t++) RELU2_UNROLL for (int n = 0; n < kParts; n++) acc[t][n] =
      V::mul32(columns.zero[n], V::set1(-sums[t]));
  for (size_t u = 0; u < units; u++) RELU2_UNROLL for (int t = 0; t < kTokens; t++) {
      const typename V::I b = V::set1(xu[u * kTokens + t]);
      RELU2_UNROLL for (int n = 0; n < kParts; n++) acc[t][n] = dot<V, kActBits>(acc[t][n], w[u * kParts + n], b);
    }
  RELU2_UNROLL for (int t = 0; t < kTokens; t++) RELU2_UNROLL for (int n = 0; n < kParts; n++) {
    float* p = out + (first + t) * stride + n * V::kLanes;
    const typename V::F scale = V::mul(columns.scale[n], V::set1_float(scales[t]));
    V::store_float(p, V::mul_add(V::to_float(acc[t][n]), scale, V::load_float(p)));
  }
}

// What multiplies the decoded weights of one quantization group with all tokens: dot products of V,
template <class V, int kBits>
struct Dots {
  static constexpr int kActBits = kBits;

  explicit Dots(const Activations&) {}

  void add(const typename V::I* w, size_t units, const Columns<V>& columns, const Activations& x, size_t group,
           float* out, size_t stride) const {
    for (size_t first = 0; first < x.tokens;) {
      const size_t width = next_tile(x.tokens - first, V::kTile);
      switch (width) {
        case 16:
          tile<V, kBits, V::kTile >= 16 ? 16 : 1>(w, units, columns, x, first, group, out, stride);
          break;
        case 8:
          tile<V, kBits, V::kTile >= 8 ? 8 : 1>(w, units, columns, x, first, group, out, stride);
          break;
        case 4:
          tile<V, kBits, 4>(w, units, columns, x, first, group, out, stride);
          break;
        case 2:
          tile<V, kBits, 2>(w, units, columns, x, first, group, out, stride);
          break;
        default:
          tile<V, kBits, 1>(w, units, columns, x, first, group, out, stride);
          break;
      }
      first += width;
    }
  }
};

// or a matrix unit, which takes weights as bytes and int16 activations as two planes of bytes. That is exact, and by the
// throughput of its instructions no slower than int8: scaling the sums takes longer than making them, and int16 needs a
// scale for each 128 inputs only, int8 one for each 32.
template <class V>
class Planes {
 public:
  static constexpr int kActBits = 8;

  explicit Planes(const Activations& x) : unit_(x.inputs, x.group) {}

  void add(const typename V::I* w, size_t units, const Columns<V>& columns, const Activations& x, size_t group,
           float* out, size_t stride) const {
    const size_t inputs = units * 4;
    alignas(64) int32_t high_sums[16][16], low_sums[16][16];
    for (size_t first = 0; first < x.tokens;) {
      const size_t width = next_tile(x.tokens - first, V::kTile), groups = first * x.groups() + group * width;
      const int32_t* bytes = x.units + first * x.units_per_token() + group * x.group / 2 * width;
      const auto* high = reinterpret_cast<const uint8_t*>(bytes);
      // Rows after the last token are whatever follows in memory; their sums are not used.
      unit_.multiply(high, high + width * inputs, w, inputs, high_sums, low_sums);
      for (size_t t = 0; t < width; t++) {
        float* p = out + (first + t) * stride;
        const typename V::I zero = V::mul32(columns.zero[0], V::set1(x.sums[groups + t]));
        const typename V::I sum = V::sub32(V::join(V::load(high_sums[t]), V::load(low_sums[t])), zero);
        const typename V::F scale = V::mul(columns.scale[0], V::set1_float(x.scales[groups + t]));
        V::store_float(p, V::mul_add(V::to_float(sum), scale, V::load_float(p)));
      }
      first += width;
    }
  }

 private:
  typename V::Unit unit_;
};

// What multiplies int16 activations of several tokens.
template <class V, bool = V::kMatrix>
struct Wide {
  using Product = Dots<V, 16>;
};
template <class V>
struct Wide<V, true> {
  using Product = Planes<V>;
};

// Bytes between what is computed and what is fetched: a few microseconds of memory at full speed. The hardware's own
// prefetching stops at every page of 4 KiB and leaves half of the bandwidth unused.
constexpr size_t kAhead = 2048;

// One token: weights go from memory through registers once.
template <class V, int kBits, int kActBits>
void up_stream(const UpMatrix& m, size_t block, const Activations& x, float* z) {
  constexpr int kParts = Columns<V>::kParts;
  constexpr size_t kInputs = kPiece * 8 / kBits / kBlock;
  const uint8_t* p = m.record(block);
  const int32_t* xu = x.units;
  typename V::F total[kParts];
  RELU2_UNROLL for (int n = 0; n < kParts; n++) total[n] = V::set1_float(0);
  for (size_t group = 0, input = 0; input < x.inputs; group++) {
    const size_t wg = input / m.group;
    const Columns<V> columns(m, m.scales(block) + wg * kBlock, m.zeros(block) + wg * kBlock);
    V::prefetch(m.scales(block + 1) + wg * kBlock);  // they lie behind the weights, where nothing else looks ahead
    typename V::I acc[kParts];
    RELU2_UNROLL for (int n = 0; n < kParts; n++) acc[n] = V::mul32(columns.zero[n], V::set1(-x.sums[group]));
    const size_t end = input + x.group < x.inputs ? input + x.group : x.inputs;
    for (; input < end; input += kInputs, p += kPiece) {
      using Codes = Decoded<V, kBits, kActBits>;
      V::prefetch(p + kAhead);
      RELU2_UNROLL for (int n = 0; n < kParts; n++) {
        const Codes codes(V::load(p + n * V::kLanes * 4));
        RELU2_UNROLL for (int u = 0; u < Codes::kUnits; u++) acc[n] =
            dot<V, kActBits>(acc[n], codes.unit[u], V::set1(xu[u]));
      }
      xu += Codes::kUnits;
    }
    RELU2_UNROLL for (int n = 0; n < kParts; n++) total[n] =
        V::mul_add(V::to_float(acc[n]), V::mul(columns.scale[n], V::set1_float(x.scales[group])), total[n]);
  }
  RELU2_UNROLL for (int n = 0; n < kParts; n++) V::store_float(z + n * V::kLanes, total[n]);
}

// Several tokens: one quantization group of a block is decoded once, into 8 KiB at most, for all of them.
template <class V, int kBits, class Product>
void up_tiled(const UpMatrix& m, size_t block, const Activations& x, float* z, size_t stride) {
  constexpr int kParts = Columns<V>::kParts;
  constexpr size_t kInputs = kPiece * 8 / kBits / kBlock;
  using Codes = Decoded<V, kBits, Product::kActBits>;
  const Product product(x);
  const uint8_t* p = m.record(block);
  alignas(64) float sums[kChunk * kBlock];  // not in z, whose rows may all lie in the same set of a cache
  for (size_t i = 0; i < x.tokens * kBlock; i++) sums[i] = 0;
  typename V::I scratch[kMaxGroup * Product::kActBits / 32 * kParts];
  for (size_t group = 0, input = 0; input < x.inputs; group++) {
    const size_t wg = input / m.group;
    const Columns<V> columns(m, m.scales(block) + wg * kBlock, m.zeros(block) + wg * kBlock);
    V::prefetch(m.scales(block + 1) + wg * kBlock);
    const size_t end = input + x.group < x.inputs ? input + x.group : x.inputs;
    size_t units = 0;
    for (; input < end; input += kInputs, p += kPiece, units += Codes::kUnits) {
      V::prefetch(p + kAhead);
      RELU2_UNROLL for (int n = 0; n < kParts; n++) {
        const Codes codes(V::load(p + n * V::kLanes * 4));
        RELU2_UNROLL for (int u = 0; u < Codes::kUnits; u++) scratch[(units + u) * kParts + n] = codes.unit[u];
      }
    }
    product.add(scratch, units, columns, x, group, sums, kBlock);
  }
  for (size_t t = 0; t < x.tokens; t++)
    for (size_t i = 0; i < kBlock; i++) z[t * stride + i] = sums[t * kBlock + i];
}

template <class V, int kBits>
void up_bits(const UpMatrix& m, size_t block, const Activations& x, float* z, size_t stride) {
  if (x.tokens == 1)
    x.bits == 8 ? up_stream<V, kBits, 8>(m, block, x, z) : up_stream<V, kBits, 16>(m, block, x, z);
  else
    x.bits == 8 ? up_tiled<V, kBits, Dots<V, 8>>(m, block, x, z, stride)
                : up_tiled<V, kBits, typename Wide<V>::Product>(m, block, x, z, stride);
}

template <class V>
void up(const UpMatrix& m, size_t block, const Activations& x, float* z, size_t stride) {
  m.bits == 4 ? up_bits<V, 4>(m, block, x, z, stride) : up_bits<V, 8>(m, block, x, z, stride);
}

// Outputs whose sums are held while rows pass: 16 KiB, half of a first-level cache.
constexpr size_t kTileOutputs = 4096;

// The same bytes of the rows of four neurons, interleaved: every 32-bit lane is one output with four neurons.
template <class V>
struct Quad {
  typename V::I z[4];

  RELU2_INLINE Quad() {}

  RELU2_INLINE Quad(const uint8_t* const* rows, size_t at)
      : Quad(rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at) {}

  RELU2_INLINE Quad(const uint8_t* r0, const uint8_t* r1, const uint8_t* r2, const uint8_t* r3) {
    const typename V::I a = V::load(r0), b = V::load(r1), c = V::load(r2), d = V::load(r3);
    const typename V::I ab = V::unpack_lo8(a, b), cd = V::unpack_lo8(c, d);
    z[0] = V::unpack_lo16(ab, cd);
    z[1] = V::unpack_hi16(ab, cd);
    const typename V::I ab2 = V::unpack_hi8(a, b), cd2 = V::unpack_hi8(c, d);
    z[2] = V::unpack_lo16(ab2, cd2);
    z[3] = V::unpack_hi16(ab2, cd2);
  }
};

// Where the outputs of byte `at` of a row begin, for vectors of V.
template <int kBits>
RELU2_INLINE size_t column_of(size_t at) {
  return at / kPiece * (kPiece * 8 / kBits) + at % kPiece / 4;
}

// sums += rows[0 .. 4 * kRowQuads) from byte `from` to `to`, times their neurons. As many rows after them are fetched.
template <class V, int kBits, int kRowQuads>
RELU2_INLINE void add_rows(const uint8_t* const* rows, const int32_t* h, size_t from, size_t to, int32_t* sums) {
  using Codes = Decoded<V, kBits, 16>;
  for (size_t piece = from; piece < to; piece += kPiece) {
    RELU2_UNROLL for (int r = 0; r < 4 * kRowQuads; r++) V::prefetch(rows[4 * kRowQuads + r] + piece);
    RELU2_UNROLL for (size_t at = piece; at < piece + kPiece; at += V::kLanes * 4) {
      int32_t* out = sums + column_of<kBits>(at) - column_of<kBits>(from);
      Quad<V> quads[kRowQuads];
      RELU2_UNROLL for (int r = 0; r < kRowQuads; r++) quads[r] = Quad<V>(rows + 4 * r, at);
      RELU2_UNROLL for (int z = 0; z < 4; z++) {
        typename V::I sum[Codes::kQuads];
        RELU2_UNROLL for (int q = 0; q < Codes::kQuads; q++) sum[q] = V::load(out + (z * Codes::kQuads + q) * 16);
        RELU2_UNROLL for (int r = 0; r < kRowQuads; r++) {
          const Codes codes(quads[r].z[z]);
          RELU2_UNROLL for (int u = 0; u < Codes::kUnits; u++) sum[u / 2] =
              V::dot16(sum[u / 2], codes.unit[u], V::set1(h[2 * r + u % 2]));
        }
        RELU2_UNROLL for (int q = 0; q < Codes::kQuads; q++) V::store(out + (z * Codes::kQuads + q) * 16, sum[q]);
      }
    }
  }
}

// The sums of one group begin with what zero points take away.
template <class V, bool kAsymmetric>
RELU2_INLINE void begin(const DownMatrix& m, const uint8_t* zeros, size_t outputs, int32_t h_sum, int32_t* sums) {
  typename V::I start = V::set1(-m.zero() * h_sum);
  for (size_t o = 0; o < outputs; o += V::kLanes) {
    if constexpr (kAsymmetric) start = V::mul32(V::load_u8(zeros + o), V::set1(-h_sum));
    V::store(sums + o, start);
  }
}

template <class V, int kBits>
void down_sparse_bits(const DownMatrix& m, size_t g, const Active& active, float* y) {
  constexpr size_t kTileBytes = kTileOutputs * kBits / 8;
  const uint8_t* rows[kMaxGroup + 4 + 8];
  const size_t padded = (active.count + 3) / 4 * 4, row_bytes = m.row_bytes();
  for (size_t i = 0; i < padded; i++) rows[i] = m.record(g) + active.rows[i] * row_bytes;
  // Fetched after the last row: scales and zero points, which lie behind the rows.
  for (size_t i = 0; i < 8; i++) rows[padded + i] = m.record(g) + (m.group + i) * row_bytes;
  alignas(64) int32_t sums[kTileOutputs];
  for (size_t from = 0; from < row_bytes; from += kTileBytes) {
    const size_t to = from + kTileBytes < row_bytes ? from + kTileBytes : row_bytes;
    const size_t first = column_of<kBits>(from), outputs = column_of<kBits>(to) - first;
    if (m.asymmetric)
      begin<V, true>(m, m.zeros(g) + first, outputs, active.sum, sums);
    else
      begin<V, false>(m, nullptr, outputs, active.sum, sums);
    size_t i = 0;
    for (; i + 8 <= padded; i += 8) add_rows<V, kBits, 2>(rows + i, active.values + i / 2, from, to, sums);
    if (i < padded) add_rows<V, kBits, 1>(rows + i, active.values + i / 2, from, to, sums);
    const typename V::F scale = V::set1_float(active.scale);
    const uint16_t* scales = m.scales(g) + first;
    float* out = y + first;
    RELU2_UNROLL for (size_t o = 0; o < outputs; o += V::kLanes) {
      const typename V::F sum = V::to_float(V::load(sums + o));
      V::store_float(out + o, V::mul_add(sum, V::mul(scale, V::load_half(scales + o)), V::load_float(out + o)));
    }
  }
}

template <class V>
void down_sparse(const DownMatrix& m, size_t g, const Active& active, float* y) {
  if (active.count == 0) return;
  m.bits == 4 ? down_sparse_bits<V, 4>(m, g, active, y) : down_sparse_bits<V, 8>(m, g, active, y);
}

template <class V, int kBits, class Product>
void down_dense_bits(const DownMatrix& m, size_t g, const Activations& h, float* y, size_t stride) {
  using Codes = Decoded<V, kBits, Product::kActBits>;
  constexpr int kParts = Columns<V>::kParts;
  constexpr int kVectors = 4 * Codes::kQuads;
  constexpr int kUnitsPerQuad = Product::kActBits / 8;
  constexpr size_t kUnits = kMaxGroup / 4 * kUnitsPerQuad;
  typename V::I scratch[kVectors][kUnits * kParts];  // 32 KiB at most
  const size_t row_bytes = m.row_bytes();
  const Product product(h);
  for (size_t at = 0; at < row_bytes; at += kPiece) {
    for (size_t i = 0; i < m.group; i += 4) {
      const uint8_t* row = m.record(g) + i * row_bytes + at;
      for (int r = 0; r < 4; r++) V::prefetch(row + r * row_bytes + kPiece);
      for (int n = 0; n < kParts; n++) {
        const uint8_t* r = row + n * V::kLanes * 4;
        const Quad<V> quad(r, r + row_bytes, r + 2 * row_bytes, r + 3 * row_bytes);
        RELU2_UNROLL for (int z = 0; z < 4; z++) {
          const Codes codes(quad.z[z]);
          RELU2_UNROLL for (int u = 0; u < Codes::kUnits; u++)
              scratch[z * Codes::kQuads + u / kUnitsPerQuad][(i / 4 * kUnitsPerQuad + u % kUnitsPerQuad) * kParts + n] =
                  codes.unit[u];
        }
      }
    }
    for (int v = 0; v < kVectors; v++) {
      const size_t o = at / kPiece * (kPiece * 8 / kBits) + v * 16;
      const Columns<V> columns(m, m.scales(g) + o, m.zeros(g) + o);
      const size_t units = h.group / 4 * kUnitsPerQuad;
      for (size_t group = 0; group < h.groups(); group++)
        product.add(scratch[v] + group * units * kParts, units, columns, h, group, y + o, stride);
    }
  }
}

template <class V, int kBits>
void down_dense_of(const DownMatrix& m, size_t g, const Activations& h, float* y, size_t stride) {
  h.bits == 8 ? down_dense_bits<V, kBits, Dots<V, 8>>(m, g, h, y, stride)
              : down_dense_bits<V, kBits, typename Wide<V>::Product>(m, g, h, y, stride);
}

template <class V>
void down_dense(const DownMatrix& m, size_t g, const Activations& h, float* y, size_t stride) {
  m.bits == 4 ? down_dense_of<V, 4>(m, g, h, y, stride) : down_dense_of<V, 8>(m, g, h, y, stride);
}

template <class V>
constexpr Kernels kernels(const char* name) {
  return {name, V::kTile, quantize<V::kMatrix>, up<V>, select, down_sparse<V>, down_dense<V>};
}

}  // namespace
