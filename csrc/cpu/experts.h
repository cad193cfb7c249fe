// One call of a mixture's experts, after their router.
#pragma once

#include "../common/routed.h"
#include "threads.h"

namespace pyprune {

// Compute `routed`, which must be valid and weighted by float32, on at most `threads` threads.
void run_experts(const RoutedCall& routed, const Kernels& kernels, int64_t threads, ParallelFor parallel_for);

}  // namespace pyprune
