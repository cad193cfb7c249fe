// Contextual gather with a list of neurons for each token: one block writes their union, in order, and which tokens
// each row of the record serves.
#pragma once

#include "before.h"
#include "sums.cuh"

namespace pyprune {

// The sum of `value` over the threads before this one, and over all of them.
struct Before {
  uint32_t sum, total;
};

__device__ inline Before sum_before(uint32_t value, uint32_t* warps) {
  uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, sum = value;
#pragma unroll
  for (uint32_t offset = 1; offset < kWarp; offset *= 2) {
    uint32_t other = __shfl_up_sync(kAll, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  uint32_t before = 0, total = 0;
  for (uint32_t w = 0; w < blockDim.x / kWarp; ++w) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  return {before + sum - value, total};
}

// A row that is none is a single entry of the union, -1, at its front: the kernels make it a NaN in every token.
__global__ void __launch_bounds__(kUniteThreads) unite(const __grid_constant__ Lists p) {
  auto* warps = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t *foreign = warps + kWarp, *words = warps + 2 * kWarp;
  wait_for_previous_kernel();
  int64_t count = (p.rows + 3) / 4;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) words[i] = 0;
  if (threadIdx.x == 0) *foreign = 0;
  __syncthreads();
  for (int64_t t = 0; t < p.tokens; ++t) {
    int64_t length = p.counts[t];
    length = length < 0 ? 0 : length > p.longest ? p.longest : length;
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
      int32_t row = p.index[t * p.longest + i];
      if (row < 0 || row >= p.rows)
        atomicOr(foreign, 1u);
      else
        atomicOr(words + row / 4, 1u << (row % 4 * 8 + static_cast<int32_t>(t)));
    }
  }
  __syncthreads();
  // A run of words for each thread, so that the union is in the order of the record.
  int64_t begin = count * threadIdx.x / blockDim.x, end = count * (threadIdx.x + 1) / blockDim.x;
  uint32_t own = 0;
  for (int64_t i = begin; i < end; ++i)
    for (int b = 0; b < 4; ++b) own += (words[i] >> (8 * b) & 0xffu) != 0;
  Before before = sum_before(own, warps);
  int64_t at = static_cast<int64_t>(before.sum) + *foreign;
  for (int64_t i = begin; i < end; ++i) {
    reinterpret_cast<uint32_t*>(p.members)[i] = words[i];
    for (int b = 0; b < 4; ++b)
      if (words[i] >> (8 * b) & 0xffu) p.united[at++] = static_cast<int32_t>(i * 4 + b);
  }
  if (threadIdx.x == 0) {
    if (*foreign) p.united[0] = -1;
    *p.count = static_cast<int32_t>(before.total + *foreign);
  }
}

}  // namespace pyprune
