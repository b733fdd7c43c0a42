#define RELU2_AVXVNNI_PRIMITIVE
#include "kernels_impl.h"
#include "simd_avx2.h"

namespace relu2 {
const Kernels kAvx2Vnni = kernels<Avx2>("avx2vnni");
}  // namespace relu2
