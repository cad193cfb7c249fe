#include "experts.cuh"

namespace pyprune {

ExpertKernels expert_kernels_f32(int32_t tokens, bool gated) { return expert_kernels_of<Type::f32>(tokens, gated); }

}  // namespace pyprune
