#include "kernels_impl.h"
#include "simd_avx512.h"

namespace relu2 {
const Kernels kAvx512Vnni = kernels<Avx512Vnni>("avx512vnni");
}  // namespace relu2
