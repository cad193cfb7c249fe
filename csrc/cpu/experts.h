// One call of a mixture's experts, after their router.
#pragma once

#include "threads.h"

namespace pyprune {

struct RoutedCall {
  Call call;              // x and out of all tokens, and the record of the first expert; without index and biases
  int64_t experts;        // E
  int64_t expert_stride;  // elements between two experts' records
  int64_t picked;         // K, of each token
  const int64_t* index;   // [M, K] in [0, E)
  const float* weights;   // [M, K]
};

// Compute `routed`, which must be valid, on at most `threads` threads.
void run_experts(const RoutedCall& routed, const Kernels& kernels, int64_t threads, ParallelFor parallel_for);

}  // namespace pyprune
