// The rival of the single pass: two kernels, the first from x to hidden activations, the second from these to the
// output. No thread keeps more than its share of either, so it takes any D and any number of tokens up to eight.
//
//     hidden   a warp computes one neuron after another; its lanes share out the channels
//     down     a block has a tile of channels and a split of the neurons; its warps share out the neurons
//
// Each split leaves a partial of its tile, and the last block of a tile adds them up.
#pragma once

#include "layout.h"
#include "neuron.cuh"
#include "sums.cuh"

namespace pyprune {

// Pieces that a lane asks for before it uses the first.
constexpr int kAhead = 4;

// The rows of the record that a warp visits: each lane looks up one of the next 32, and all get it in turn.
struct Visits {
  const Params& p;
  int64_t first, stride, end;  // neurons first, first + stride, ... below end

  template <class Visit>
  __device__ void each(Visit visit) const {
    uint32_t lane = threadIdx.x % kWarp;
    for (int64_t base = first; base < end; base += stride * kWarp) {
      int64_t own = base + stride * lane, row = 0;
      if (own < end) row = p.call.index ? p.call.index[own] : own;
      for (uint32_t i = 0; i < kWarp && base + stride * i < end; ++i)
        visit(base + stride * i, __shfl_sync(kAll, row, i));
    }
  }
};

template <Type W, int T, bool GATED>
__device__ inline void dots(const Params& p, const typename Element<W>::Bits* record, uint64_t policy,
                            float (&values)[(GATED ? 2 : 1) * T]) {
  constexpr int n = piece(W), parts = GATED ? 2 : 1;
  const Call& call = p.call;
  int64_t d = call.hidden_size, lane = threadIdx.x % kWarp;
  for (int64_t begin = lane * n; begin < d; begin += kWarp * n * kAhead) {
    Piece pieces[kAhead][parts];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      int64_t c = begin + i * kWarp * n;
#pragma unroll
      for (int part = 0; part < parts; ++part)
        if (c < d) pieces[i][part] = load_weights_at<W>(record, part * d + c, d - c, p.aligned, policy);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      int64_t c = begin + i * kWarp * n;
      if (c >= d) break;
      float w[parts][n];
#pragma unroll
      for (int part = 0; part < parts; ++part) unpack<W>(pieces[i][part], w[part]);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        float x[n] = {};
        if (t < call.tokens) load_x(p, t, c, x);
#pragma unroll
        for (int part = 0; part < parts; ++part)
#pragma unroll
          for (int e = 0; e < n; ++e) values[part * T + t] = fmaf(w[part][e], x[e], values[part * T + t]);
      }
    }
  }
}

template <Type W, int T, bool GATED>
__global__ void __launch_bounds__(kTwoPassThreads, two_pass_blocks(W, T))
    hidden_pass(const __grid_constant__ Params p) {
  using Bits = typename Element<W>::Bits;
  allow_next_kernel();
  wait_for_previous_kernel();
  uint64_t policy = weight_policy(p.evict_first);
  uint32_t lane = threadIdx.x % kWarp;
  int64_t warp = static_cast<int64_t>(blockIdx.x) * kTwoPassWarps + threadIdx.x / kWarp;
  Visits visits{p, warp, static_cast<int64_t>(gridDim.x) * kTwoPassWarps, p.call.neurons};
  visits.each([&](int64_t neuron, int64_t row) {
    constexpr int count = (GATED ? 2 : 1) * T;
    Terms terms = load_terms<W, GATED>(p, row);
    int64_t inside = terms.foreign ? 0 : row;
    float values[count] = {};
    dots<W, T, GATED>(p, static_cast<const Bits*>(p.call.record) + inside * p.call.record_stride, policy, values);
    float sum = sum_over_warp(values), second = 0.0f;
    uint32_t token = lane % T;
    float first = __shfl_sync(kAll, sum, token * kWarp / count);
    if constexpr (GATED) second = __shfl_sync(kAll, sum, (T + token) * kWarp / count);
    float hidden = hidden_activation<W, GATED>(p, terms, first, second);
    if (lane < T) p.hidden[neuron * T + lane] = hidden;
  });
}

template <Type W, int T>
__global__ void __launch_bounds__(kTwoPassThreads, two_pass_blocks(W, T)) down_pass(const __grid_constant__ Params p) {
  using Bits = typename Element<W>::Bits;
  constexpr int n = piece(W), tile = tile_channels(W);
  const Call& call = p.call;
  allow_next_kernel();
  wait_for_previous_kernel();
  int64_t d = call.hidden_size, width = padded(call);
  uint32_t tiles = gridDim.x / static_cast<uint32_t>(p.groups), split = blockIdx.x / tiles;
  int64_t first_channel = static_cast<int64_t>(blockIdx.x % tiles) * tile;
  int64_t channel = first_channel + threadIdx.x % kWarp * n;
  int parts = call.gated ? 3 : 2;
  int64_t begin = call.neurons * split / p.groups, end = call.neurons * (split + 1) / p.groups;
  uint64_t policy = weight_policy(p.evict_first);
  uint32_t warp = threadIdx.x / kWarp;
  float sums[T][n] = {};

  for (int64_t base = begin + warp; base < end; base += kTwoPassWarps * kAhead) {
    Piece pieces[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      int64_t k = base + i * kTwoPassWarps;
      if (k >= end || channel >= d) continue;
      int64_t row = call.index ? call.index[k] : k;
      if (row < 0 || row >= p.call.rows) row = 0;
      auto* record = static_cast<const Bits*>(call.record) + row * call.record_stride;
      pieces[i] = load_weights_at<W>(record, (parts - 1) * d + channel, d - channel, p.aligned, policy);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      int64_t k = base + i * kTwoPassWarps;
      if (k >= end || channel >= d) break;
      float w[n];
      unpack<W>(pieces[i], w);
#pragma unroll
      for (int t = 0; t < T; ++t) {
        float a = p.hidden[k * T + t];
#pragma unroll
        for (int e = 0; e < n; ++e) sums[t][e] = fmaf(a, w[e], sums[t][e]);
      }
    }
  }

  auto* rows = reinterpret_cast<float*>(shared_memory() + 16);
  for (int64_t t = 0; t < call.tokens; ++t) {
    float* own = rows + warp * tile + threadIdx.x % kWarp * n;
#pragma unroll
    for (int u = 0; u < T; ++u)
      if (u == t)
#pragma unroll
        for (int e = 0; e < n; ++e) own[e] = sums[u][e];
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < tile && first_channel + c < width; c += kTwoPassThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kTwoPassWarps; ++w) sum += rows[w * tile + c];
      p.partials[(split * call.tokens + t) * width + first_channel + c] = sum;
    }
    __syncthreads();
  }
  int64_t last = first_channel + tile < d ? first_channel + tile : d;
  if (is_last_block(p.tickets + blockIdx.x % tiles, static_cast<uint32_t>(p.groups),
                    reinterpret_cast<uint32_t*>(shared_memory())))
    finish(p, first_channel, last);
}

}  // namespace pyprune
