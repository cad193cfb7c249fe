#include "table.cuh"

namespace pyprune {

Kernels kernels_i8(int32_t tokens, bool gated) { return kernels_of<Type::i8>(tokens, gated); }

}  // namespace pyprune
