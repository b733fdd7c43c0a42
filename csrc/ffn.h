// y = down(relu(up(x))²): the whole MLP of some tokens, in the caller's TBB arena.
#pragma once

#include "kernels.h"

namespace relu2 {

struct Ffn {
  UpMatrix up;
  DownMatrix down;
  float threshold = 0;      // neurons at or below it are skipped; 0 is exact, less is wrong and only for benchmarks
  int activation_bits = 0;  // of products that are not by lists: 8, 16, or 0 for what suits the kernels and the tokens
};

// x is tokens x up.inputs, y is tokens x down.outputs. A row of x with a NaN or an infinity, or whose squares overflow,
// gives a row of NaN. Results depend on the number of threads of the arena, but not on their timing.
void run(const Kernels& kernels, const Ffn& ffn, const float* x, size_t tokens, float* y);

}  // namespace relu2
