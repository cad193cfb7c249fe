#include "table.cuh"

namespace pyprune {

Kernels kernels_bf16(int32_t tokens, bool gated) { return kernels_of<Type::bf16>(tokens, gated); }

}  // namespace pyprune
