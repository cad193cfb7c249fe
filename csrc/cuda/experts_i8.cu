#include "experts.cuh"

namespace pyprune {

ExpertKernels expert_kernels_i8(int32_t tokens, bool gated) { return expert_kernels_of<Type::i8>(tokens, gated); }

}  // namespace pyprune
