// Sums over threads and blocks, in orders that depend neither on the number of tokens nor on who comes first.
#pragma once

#include "weights.cuh"

namespace pyprune {

constexpr uint32_t kAll = 0xffffffffu;

// Sum each of V values over a warp; lane l gets the sum of value l * V / 32. V is a power of two.
//
// While there are several values, lanes that differ in one bit part them: each keeps one half and adds what the other
// has of it. That costs V - 1 shuffles and a few, and every value is summed over the same pairs of lanes in the same
// order, whatever V is.
template <int V>
__device__ inline float sum_over_warp(float (&values)[V]) {
  static_assert(V >= 1 && V <= 32 && (V & (V - 1)) == 0, "a power of two");
  uint32_t lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 16, count = V; offset > 0; offset /= 2, count = count > 1 ? count / 2 : 1) {
    if (count == 1) {
      values[0] += __shfl_xor_sync(kAll, values[0], offset);
      continue;
    }
    bool upper = lane & offset;
    int half = count / 2;
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if (i >= half) break;
      float sent = upper ? values[i] : values[i + half];
      float kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kAll, sent, offset);
    }
  }
  return values[0];
}

// Whether this block is the last of `expected` to come to `ticket`; it then sees what all others wrote before.
// `flag` is 4 bytes of shared memory. All threads call it.
__device__ inline bool is_last_block(uint32_t* ticket, uint32_t expected, uint32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    bool last = count_block(ticket) == expected - 1;
    if (last) *ticket = 0;
    *flag = last;
  }
  __syncthreads();
  return *flag;
}

// Adjacent threads that share out the addends of the same channels, a power of two; it must not depend on tokens.
__device__ inline uint32_t threads_of_a_quad(int64_t quads, int32_t addends) {
  uint32_t ways = 1;
  while (ways < 8 && quads * ways * 2 <= blockDim.x && static_cast<int32_t>(ways) * 2 <= addends) ways *= 2;
  return ways;
}

constexpr int kAtOnce = 8;

// The sum of the addends `own`, `own + ways`, ... below `addends`, in this order, and then over `ways` adjacent
// threads. Addends come from far, so many are asked for before the first is used. Whole warps call it.
template <class Load>
__device__ inline void add_up(int32_t addends, uint32_t own, uint32_t ways, Load load, float (&sums)[4]) {
  for (int j = 0; j < 4; ++j) sums[j] = 0.0f;
  for (int base = static_cast<int>(own); base < addends; base += kAtOnce * static_cast<int>(ways)) {
    float4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      int g = base + i * static_cast<int>(ways);
      v[i] = g < addends ? load(g) : float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sums[0] += v[i].x, sums[1] += v[i].y, sums[2] += v[i].z, sums[3] += v[i].w;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    for (uint32_t offset = 1; offset < ways; offset *= 2) sums[j] += __shfl_xor_sync(kAll, sums[j], offset);
}

// Channels [first, last) of the output, from the partials of all groups; `first` is a multiple of 4. All threads call
// it.
__device__ inline void finish(const Params& p, int64_t first, int64_t last) {
  const Call& call = p.call;
  int64_t width = padded(call), quads = (last - first + 3) / 4, stride = call.tokens * width / 4;
  uint32_t ways = threads_of_a_quad(quads, p.groups), own = threadIdx.x % ways;
  int64_t count = call.tokens * quads * ways;
  for (int64_t base = 0; base < count; base += blockDim.x) {
    int64_t i = base + threadIdx.x, t = i / ways / quads, d = first + i / ways % quads * 4;
    int64_t at = t * call.hidden_size + d;
    bool here = i < count, stores = here && own == 0;
    auto* partial = reinterpret_cast<const float4*>(p.partials + t * width + d);
    float bias[4] = {}, sums[4];
    if (stores && call.down_bias) load_four(call.x_type, call.down_bias, d, last - d, bias);
    add_up(
        p.groups, own, ways,
        [&](int g) { return here ? load_shared_by_blocks(partial + g * stride) : float4{0.0f, 0.0f, 0.0f, 0.0f}; },
        sums);
    for (int j = 0; j < 4; ++j) sums[j] += bias[j];
    if (stores) store_four(call.x_type, call.out, at, last - d, sums);
  }
}

}  // namespace pyprune
