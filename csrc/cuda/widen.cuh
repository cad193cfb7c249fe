// x in the form that kernels read, where it is not already: float32, in rows that begin on 16 bytes and end in zeros.
#pragma once

#include "widen.h"
#include "weights.cuh"

namespace pyprune {

__global__ void __launch_bounds__(kWidenThreads) widen(const __grid_constant__ Widening p) {
  wait_for_previous_kernel();
  int64_t pieces = (p.width + kWidenThreads - 1) / kWidenThreads, token = blockIdx.x / pieces;
  int64_t d = blockIdx.x % pieces * kWidenThreads + threadIdx.x;
  if (d >= p.width) return;
  p.out[token * p.width + d] = d < p.hidden_size ? load_value(p.type, p.x, token * p.stride + d) : 0.0f;
}

}  // namespace pyprune
