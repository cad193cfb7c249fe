#include "experts.cuh"

namespace pyprune {

ExpertKernels expert_kernels_bf16(int32_t tokens, bool gated) { return expert_kernels_of<Type::bf16>(tokens, gated); }

}  // namespace pyprune
