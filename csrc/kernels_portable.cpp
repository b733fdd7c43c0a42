#ifndef RELU2_PLAIN
#define RELU2_PLAIN
#endif
#include "kernels_impl.h"
#include "simd_portable.h"

namespace relu2 {
const Kernels kPortable4 = kernels<Portable<4>>("portable");
const Kernels kPortable8 = kernels<Portable<8>>("portable8");
const Kernels kPortable16 = kernels<Portable<16>>("portable16");
}  // namespace relu2
