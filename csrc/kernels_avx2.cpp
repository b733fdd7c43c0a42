#include "kernels_impl.h"
#include "simd_avx2.h"

namespace relu2 {
const Kernels kAvx2 = kernels<Avx2>("avx2");
}  // namespace relu2
