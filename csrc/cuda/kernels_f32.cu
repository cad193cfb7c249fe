#include "table.cuh"

namespace pyprune {

Kernels kernels_f32(int32_t tokens, bool gated) { return kernels_of<Type::f32>(tokens, gated); }

}  // namespace pyprune
