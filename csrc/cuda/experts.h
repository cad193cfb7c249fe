// A call of experts on a device: what its kernels are given, its plan, and how it is started.
#pragma once

#include <string>

#include "../common/routed.h"
#include "kernels.h"
#include "layout.h"
#include "run.h"

namespace pyprune {

// Most pairs of token and expert of one call: as many as a block has threads, each of which looks at one.
constexpr int32_t kMostPairs = kTwoPassThreads;

// Shared memory in which a block finds its pairs: the experts of all, then its own, how many, and their tokens.
constexpr uint32_t kFindBytes = kMostPairs * 4 + 2 * 16 * 4;

// Channels of one token that a block of the last kernel writes, four by up to eight threads.
constexpr int32_t kCombineChannels = kTwoPassThreads / 8 * 4;

// `base` with the records of the first expert, and what the experts need besides. Passed to kernels by value.
struct ExpertParams {
  Params base;  // `partials` [splits, pairs, padded], `hidden` [pairs, neurons]
  int64_t expert_stride;
  int64_t experts;
  int32_t picked;
  int32_t pairs;
  const int64_t* index;
  const void* weights;
  Type weights_type;
  const int32_t* counts;
  int32_t blocks;  // of each pair in the first pass
  int32_t splits;  // of the neurons in the second
};

// Everything that a plan can choose; zero, or less where zero means something, leaves a choice to the analysis.
struct ExpertOptions {
  int32_t tokens = 0;  // of one expert that a block computes together
  int32_t blocks = 0;  // of each pair in the first pass
  int32_t splits = 0;  // of the neurons in the second pass
  int32_t evict_first = -1;
  int32_t overlap = -1;  // kernels may begin before the one before has ended
};

constexpr int32_t kExpertOptions = 5;  // members of ExpertOptions, in their order

struct ExpertSizes {
  int64_t tokens, picked, experts, hidden_size, neurons;
  bool gated;
  Type weights;
};

struct ExpertPlan {
  int32_t tokens, blocks, splits;
  bool evict_first, overlap;
  Grid hidden, down, combine;
};

// Raises Refusal when `chosen` does not fit. Splits, which fix the order of sums, do not depend on the tokens.
ExpertPlan plan_experts(const ExpertSizes& sizes, const ExpertOptions& chosen, const Device& device);

// The plan as JSON.
std::string describe(const ExpertPlan& plan);

using ExpertKernel = void (*)(ExpertParams);

struct ExpertKernels {
  ExpertKernel hidden, down;
};

// `tokens` is one of 1, 4, 8.
ExpertKernels expert_kernels_f32(int32_t tokens, bool gated);
ExpertKernels expert_kernels_bf16(int32_t tokens, bool gated);
ExpertKernels expert_kernels_f16(int32_t tokens, bool gated);
ExpertKernels expert_kernels_i8(int32_t tokens, bool gated);

Failure start_combine(const ExpertParams& params, const Grid& grid, Stream stream);

// Starts the kernels of up to kMostPairs pairs, and at least one. Raises Refusal, or returns what CUDA said went wrong.
Failure run_experts(const RoutedCall& routed, const ExpertOptions& chosen, const Device& device, const Memory& memory,
                    Stream stream);

}  // namespace pyprune
