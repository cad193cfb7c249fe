// From PyTorch's tensors to `run_experts`, for the device and for its simulator.
#pragma once

#include "../common/routed_operands.h"
#include "compute.h"
#include "experts.h"

namespace pyprune {
namespace {

// What `plan` gives, in the order of ExpertOptions.
inline ExpertOptions expert_options_of(const std::vector<int64_t>& plan) {
  ExpertOptions c;
  int32_t* members[] = {&c.tokens, &c.blocks, &c.splits, &c.evict_first, &c.overlap};
  static_assert(std::size(members) == kExpertOptions, "every choice can be given");
  check(plan.size() <= kExpertOptions, "plan", "have at most five numbers");
  for (size_t i = 0; i < plan.size(); ++i) {
    check(plan[i] >= -1 && plan[i] < 1 << 24, "plan", "hold numbers from -1 to 2^24");
    *members[i] = static_cast<int32_t>(plan[i]);
  }
  return c;
}

// The experts on `device`, in chunks of as many pairs as kernels take, each of which reads its experts' rows again.
inline Tensor compute_experts(RoutedOperands& operands, const Tensor& x, const std::vector<int64_t>& plan,
                              const Device& device, const Memory& memory, Stream stream) {
  ExpertOptions options = expert_options_of(plan);
  const RoutedCall& whole = operands.routed();
  Tensor out = output_like(x);
  const Call& call = whole.call;
  if (call.hidden_size == 0 || call.tokens == 0) return out;
  check(whole.picked >= 1 && whole.picked <= kMostPairs, "index", "have 1 to 256 experts of each token");
  int64_t step = kMostPairs / whole.picked;
  OfChunks of_chunks(memory);
  for (int64_t first = 0; first < call.tokens; first += step) {
    RoutedCall part = whole;
    part.call.tokens = call.tokens - first < step ? call.tokens - first : step;
    part.call.x = after(call.x, first * call.x_stride, call.x_type);
    part.call.out = const_cast<void*>(after(out.mutable_data_ptr(), first * call.hidden_size, call.x_type));
    part.index += first * whole.picked;
    part.weights = after(whole.weights, first * whole.picked, whole.weights_type);
    Failure failure = nullptr;
    try {
      failure = run_experts(part, options, device, of_chunks.memory(), stream);
    } catch (const Refusal& refusal) {
      refuse(refusal);
    }
    STD_TORCH_CHECK(!failure, "CUDA said: ", failure ? failure : "");
  }
  return out;
}

}  // namespace
}  // namespace pyprune
