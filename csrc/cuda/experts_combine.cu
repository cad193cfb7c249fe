// The last kernel of a call of experts: the sum of each token's, weighted.

#include "experts.h"
#include "sums.cuh"

namespace pyprune {

__global__ void __launch_bounds__(kTwoPassThreads) expert_combine(const __grid_constant__ ExpertParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const Call& call = p.base.call;
  int64_t d = call.hidden_size, width = padded(call);
  auto pieces = static_cast<uint32_t>((d + kCombineChannels - 1) / kCombineChannels);
  int64_t token = blockIdx.x / pieces, first = static_cast<int64_t>(blockIdx.x % pieces) * kCombineChannels;
  int32_t addends = p.picked * p.splits;
  uint32_t ways = threads_of_a_quad(kCombineChannels / 4, addends), own = threadIdx.x % ways;
  int64_t channel = first + static_cast<int64_t>(threadIdx.x / ways) * 4;
  bool here = threadIdx.x / ways < kCombineChannels / 4 && channel < d;
  auto load = [&](int g) {
    float4 v{0.0f, 0.0f, 0.0f, 0.0f};
    if (!here) return v;
    int64_t pair = token * p.picked + g / p.splits, e = p.index[pair];
    float weight = load_value(p.weights_type, p.weights, pair);
    if (e < 0 || e >= p.experts)
      weight = __uint_as_float(0x7fc00000u);  // a NaN is seen; a wrong number would not be
    else
      v = *reinterpret_cast<const float4*>(p.base.partials + (g % p.splits * p.pairs + pair) * width + channel);
    return float4{v.x * weight, v.y * weight, v.z * weight, v.w * weight};
  };
  float sums[4];
  add_up(addends, own, ways, load, sums);
  if (here && own == 0) store_four(call.x_type, call.out, token * d + channel, d - channel, sums);
}

Failure start_combine(const ExpertParams& params, const Grid& grid, Stream stream) {
  return start(expert_combine, grid, params, stream);
}

}  // namespace pyprune
