#include "kernels_impl.h"
#include "simd_amx.h"

namespace relu2 {
const Kernels kAmx = kernels<Amx>("amx");
}  // namespace relu2
