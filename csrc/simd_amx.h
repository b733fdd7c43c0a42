// AVX-512 with VNNI, and for several tokens the matrix unit (AMX-INT8) of server CPUs since Sapphire Rapids.
#pragma once

#include <cstddef>

#include "simd_avx512.h"

namespace {

struct Amx : Avx512Vnni {
  static constexpr bool kMatrix = true;

  // Shapes of the tile registers in the CPU's format: two of 16 x 16 sums, two of 16 tokens, one of 16 outputs.
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16];
    uint8_t rows[16];

    constexpr explicit Shapes(int inputs)
        : row_bytes{64, 64, static_cast<uint16_t>(inputs), static_cast<uint16_t>(inputs), 64},
          rows{16, 16, 16, 16, static_cast<uint8_t>(inputs / 4)} {}
  };

  // The unit, in shape for as many inputs at a time as divide every quantization group.
  class Unit {
   public:
    RELU2_INLINE Unit(size_t inputs, size_t group) : step_(inputs % 64 || group % 64 ? 32 : 64) {
      static constexpr Shapes narrow(32), wide(64);
      _tile_loadconfig(step_ == 32 ? &narrow : &wide);
    }
    RELU2_INLINE ~Unit() { _tile_release(); }
    Unit(const Unit&) = delete;
    Unit& operator=(const Unit&) = delete;

    // Sums over `inputs` inputs of 16 tokens with 16 outputs: of signed high bytes and of unsigned low bytes, each
    // [token][inputs], with weights [inputs / 4][output][4].
    RELU2_INLINE void multiply(const uint8_t* high, const uint8_t* low, const void* weights, size_t inputs,
                               int32_t (*high_sums)[16], int32_t (*low_sums)[16]) const {
      __asm__ volatile("" ::: "memory");  // GCC does not know that tiles are loaded from memory
      _tile_zero(0);
      _tile_zero(1);
      for (size_t i = 0; i < inputs; i += step_) {
        _tile_loadd(2, high + i, inputs);
        _tile_loadd(3, low + i, inputs);
        _tile_loadd(4, static_cast<const uint8_t*>(weights) + i * kLanes, 64);
        _tile_dpbsud(0, 2, 4);
        _tile_dpbuud(1, 3, 4);
      }
      _tile_stored(0, high_sums, 64);
      _tile_stored(1, low_sums, 64);
    }

   private:
    size_t step_;
  };

  static I join(I high, I low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
};

}  // namespace
