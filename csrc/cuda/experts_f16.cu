#include "experts.cuh"

namespace pyprune {

ExpertKernels expert_kernels_f16(int32_t tokens, bool gated) { return expert_kernels_of<Type::f16>(tokens, gated); }

}  // namespace pyprune
