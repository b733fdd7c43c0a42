// AVX-512 with VNNI, and for several tokens the matrix unit (AMX-INT8) of server CPUs since Sapphire Rapids.
#pragma once

#include <cstddef>

#include "simd_avx512.h"

namespace {

// The numbers of tile registers must be literals. Weights are signed, and activations but for squares.
#define RELU2_ADD_VECTOR(n, b)              \
  if (kSquares)                             \
    _tile_dpbusd(n, 4, b);                  \
  else                                      \
    _tile_dpbssd(n, 4, b)

struct Amx : Avx512Vnni {
  static constexpr bool kMatrix = true;

  // Shapes of the tile registers in the CPU's format: four of 16 x 16 sums, one of 16 slots, three of 16
  // outputs in turns.
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16];
    uint8_t rows[16];

    constexpr explicit Shapes(int inputs)
        : row_bytes{64, 64, 64, 64, static_cast<uint16_t>(inputs), 64, 64, 64},
          rows{16, 16, 16, 16, 16, static_cast<uint8_t>(inputs / 4), static_cast<uint8_t>(inputs / 4), static_cast<uint8_t>(inputs / 4)} {}
  };

  // The unit, in shape for quantization groups of so many units, a multiple of 8.
  class Unit {
   public:
    RELU2_INLINE explicit Unit(size_t units) : units_(units), step_(units % 16 ? 8 : 16) {
      static constexpr Shapes narrow(32), wide(64);
      _tile_loadconfig(step_ == 8 ? &narrow : &wide);
    }
    RELU2_INLINE ~Unit() { _tile_release(); }
    Unit(const Unit&) = delete;
    Unit& operator=(const Unit&) = delete;

    // Sums of 16 slots [slot][unit] with decoded weights [unit][vector].
    template <bool kSquares>
    RELU2_INLINE void multiply(const uint8_t* weights, const int32_t* x, int32_t (*sums)[16][16]) const {
      __asm__ volatile("" ::: "memory");  // GCC does not know that tiles are loaded from memory
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (size_t u = 0; u < units_; u += step_) {
        const uint8_t* w = weights + u * kVectors * 64;
        _tile_loadd(4, x + u, units_ * 4);
        _tile_loadd(5, w, kVectors * 64);
        _tile_loadd(6, w + 64, kVectors * 64);
        _tile_loadd(7, w + 128, kVectors * 64);
        RELU2_ADD_VECTOR(0, 5);
        _tile_loadd(5, w + 192, kVectors * 64);
        RELU2_ADD_VECTOR(1, 6);
        RELU2_ADD_VECTOR(2, 7);
        RELU2_ADD_VECTOR(3, 5);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
    }

   private:
    size_t units_, step_;
  };
};

#undef RELU2_ADD_VECTOR

}  // namespace
