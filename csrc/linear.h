// y = x · Wᵀ for one or more matrices that share their input, as a projection to queries, keys and values does.
#pragma once

#include <vector>

#include "kernels.h"

namespace relu2 {

struct Linear {
  std::vector<UpMatrix> matrices;  // with the same inputs, bits and group
  int activation_bits = 0;         // 8, 16, or 0 for what suits the kernels and the tokens
};

// x is tokens x inputs, y[i] is tokens x matrices[i].outputs. A row of x with a NaN or an infinity gives rows of NaN.
void run(const Kernels& kernels, const Linear& linear, const float* x, size_t tokens, const std::vector<float*>& y);

}  // namespace relu2
