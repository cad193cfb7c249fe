#include "table.cuh"

namespace pyprune {

Kernels kernels_f16(int32_t tokens, bool gated) { return kernels_of<Type::f16>(tokens, gated); }

}  // namespace pyprune
