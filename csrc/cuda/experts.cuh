// Few pairs of token and expert, in two passes over the weights and a sum; see two_pass.cuh for one FFN.
//
//     hidden    of each pair, [pairs, neurons]: a warp computes one neuron after another
//     down      of each pair, [splits, pairs, D]: a block has a tile of channels and a split of the neurons
//     combine   of each token: its pairs' splits, weighted
//
// A block belongs to a pair. It computes up to T pairs of the same expert together, that one and those after it, so
// that the expert's rows are read once for them; blocks of the pairs that others take along end at once. Which pairs
// those are every block finds by itself: the threads look at one pair each. Nothing waits for the host.
//
// An expert that there is not has no rows to read, and makes its token NaN. Every sum has one order, which depends on
// the layer and the device, not on the tokens; so a token has the same bits whatever the tokens beside it.
#pragma once

#include "experts.h"
#include "two_pass.cuh"

namespace pyprune {

// The pairs of one expert that a block computes together.
template <int T>
struct Together {
  int32_t expert;
  int32_t count = 0;      // none: there is nothing to do
  const int32_t* pairs;   // [count]
  const int32_t* tokens;  // [count]

  __device__ Together(const ExpertParams& p, int32_t slot, unsigned char* memory) {
    auto* experts = reinterpret_cast<int32_t*>(memory);
    int32_t *own = experts + kMostPairs, *of = own + 16;
    pairs = own;
    tokens = of;
    auto at = static_cast<int32_t>(threadIdx.x);
    // What is no number of an expert is one that no pair of an expert has.
    auto named = [&](int32_t pair) {
      int64_t e = p.index[pair];
      return e >= 0 && e < p.experts ? static_cast<int32_t>(e) : -1;
    };
    expert = named(slot);
    if constexpr (T == 1) {
      count = expert >= 0;
      if (at == 0) own[0] = slot, of[0] = slot / p.picked;
      __syncthreads();
      return;
    }
    if (at < p.pairs) experts[at] = named(at);
    if (at == 0) own[T] = 0;
    __syncthreads();
    if (at < p.pairs && at >= slot && experts[at] == expert) {
      int32_t before = 0, between = 0;  // pairs of this expert: before the slot, and from there to this thread's
      for (int32_t i = 0; i < at; ++i)
        if (experts[i] == expert) i < slot ? ++before : ++between;
      if (before % T == 0 && between < T) {
        own[between] = at;
        of[between] = at / p.picked;
        // The last of them says how many there are.
        bool more = false;
        for (int32_t i = at + 1; i < p.pairs && between + 1 < T; ++i) more = more || experts[i] == expert;
        if (!more) own[T] = between + 1;
      }
    }
    __syncthreads();
    count = expert >= 0 ? own[T] : 0;
  }

  // The FFN of the expert.
  __device__ Params of(const ExpertParams& p) const {
    Params own = p.base;
    Call& call = own.call;
    int64_t e = expert, parts = call.gated ? 3 : 2;
    call.record = static_cast<const char*>(call.record) + e * p.expert_stride * bytes_of(call.weight_type);
    if (call.scales) call.scales += e * call.rows * parts;
    if (call.index) {
      call.index += e * call.neurons;
      call.neurons = p.counts[e];
    }
    return own;
  }
};

template <Type W, int T, bool GATED>
__device__ inline void expert_dots(const Params& p, const Together<T>& own, const typename Element<W>::Bits* record,
                                   uint64_t policy, float (&values)[(GATED ? 2 : 1) * T]) {
  constexpr int n = piece(W), parts = GATED ? 2 : 1;
  int64_t d = p.call.hidden_size, lane = threadIdx.x % kWarp;
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
        if (t < own.count) load_x(p, own.tokens[t], c, x);
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
    expert_hidden(const __grid_constant__ ExpertParams given) {
  using Bits = typename Element<W>::Bits;
  allow_next_kernel();
  wait_for_previous_kernel();
  auto blocks = static_cast<uint32_t>(given.blocks);
  Together<T> own(given, static_cast<int32_t>(blockIdx.x / blocks), shared_memory());
  if (own.count == 0) return;
  Params p = own.of(given);
  uint64_t policy = weight_policy(p.evict_first);
  uint32_t lane = threadIdx.x % kWarp;
  int64_t warp = static_cast<int64_t>(blockIdx.x % blocks) * kTwoPassWarps + threadIdx.x / kWarp;
  int64_t most = given.base.call.neurons;
  Visits visits{p, warp, static_cast<int64_t>(blocks) * kTwoPassWarps, p.call.neurons};
  visits.each([&](int64_t neuron, int64_t row) {
    constexpr int count = (GATED ? 2 : 1) * T;
    Terms terms = load_terms<W, GATED>(p, row);
    int64_t inside = terms.foreign ? 0 : row;
    auto* record = static_cast<const Bits*>(p.call.record) + inside * p.call.record_stride;
    float values[count] = {};
    expert_dots<W, T, GATED>(p, own, record, policy, values);
    float sum = sum_over_warp(values), second = 0.0f;
    uint32_t token = lane % T;
    float first = __shfl_sync(kAll, sum, token * kWarp / count);
    if constexpr (GATED) second = __shfl_sync(kAll, sum, (T + token) * kWarp / count);
    float hidden = hidden_activation<W, GATED>(p, terms, first, second);
    if (lane < static_cast<uint32_t>(own.count)) p.hidden[own.pairs[lane] * most + neuron] = hidden;
  });
}

template <Type W, int T>
__global__ void __launch_bounds__(kTwoPassThreads, two_pass_blocks(W, T))
    expert_down(const __grid_constant__ ExpertParams given) {
  using Bits = typename Element<W>::Bits;
  constexpr int n = piece(W), tile = tile_channels(W);
  allow_next_kernel();
  wait_for_previous_kernel();
  int64_t d = given.base.call.hidden_size, width = padded(given.base.call), most = given.base.call.neurons;
  auto tiles = static_cast<uint32_t>((d + tile - 1) / tile), splits = static_cast<uint32_t>(given.splits);
  uint32_t split = blockIdx.x / tiles % splits;
  Together<T> own(given, static_cast<int32_t>(blockIdx.x / tiles / splits), shared_memory());
  if (own.count == 0) return;
  Params p = own.of(given);
  const Call& call = p.call;
  int64_t first_channel = static_cast<int64_t>(blockIdx.x % tiles) * tile;
  int64_t channel = first_channel + threadIdx.x % kWarp * n;
  int parts = call.gated ? 3 : 2;
  int64_t begin = call.neurons * split / splits, end = call.neurons * (split + 1) / splits;
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
      if (row < 0 || row >= call.rows) row = 0;
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
        if (t >= own.count) break;
        float a = p.hidden[own.pairs[t] * most + k];
#pragma unroll
        for (int e = 0; e < n; ++e) sums[t][e] = fmaf(a, w[e], sums[t][e]);
      }
    }
  }

  auto* rows = reinterpret_cast<float*>(shared_memory() + kFindBytes);
#pragma unroll
  for (int t = 0; t < T; ++t) {
    if (t >= own.count) break;
    float* row = rows + warp * tile + threadIdx.x % kWarp * n;
#pragma unroll
    for (int e = 0; e < n; ++e) row[e] = sums[t][e];
    __syncthreads();
    float* partial = p.partials + (static_cast<int64_t>(split) * given.pairs + own.pairs[t]) * width + first_channel;
    for (int c = static_cast<int>(threadIdx.x); c < tile && first_channel + c < width; c += kTwoPassThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kTwoPassWarps; ++w) sum += rows[w * tile + c];
      partial[c] = sum;
    }
    __syncthreads();
  }
}

// One type of weights: a row of kernels for each number of tokens.
template <Type W, int T>
ExpertKernels expert_kernels_of(bool gated) {
  return {gated ? expert_hidden<W, T, true> : expert_hidden<W, T, false>, expert_down<W, T>};
}

template <Type W>
ExpertKernels expert_kernels_of(int32_t tokens, bool gated) {
  switch (tokens) {
    case 1:
      return expert_kernels_of<W, 1>(gated);
    case 4:
      return expert_kernels_of<W, 4>(gated);
    default:
      return expert_kernels_of<W, 8>(gated);
  }
}

}  // namespace pyprune
