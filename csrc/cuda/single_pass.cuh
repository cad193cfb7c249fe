// Few tokens in one pass over the weights: a team of threads takes a run of neurons, and for each step of a few neurons
// computes their dot products, their activations, and adds their down rows to sums in registers.
//
//     a thread of a team owns channels, the same of x, of gate and up rows, of down rows and of the sums
//     copies of the next steps' weights are under way; a thread reads only what it copied itself
//     dots: sums over a thread's channels, over its warp, over the team's warps by way of shared memory
//     rows of the record must begin on 16 bytes, and hold whole pieces of them
//     narrow layers have several teams a block, which share nothing but its end
//     at the end: sums of a cluster's teams through their shared memory, sums of clusters by the last to arrive
//
// No thread waits for another block but at the end, and every sum has one order that depends on D, K and the device.
#pragma once

#include "layout.h"
#include "neuron.cuh"
#include "sums.cuh"

namespace pyprune {

// Until all but `stages - 1` groups of copies are complete.
__device__ inline void wait_for_step(int stages) {
  switch (stages) {
    case 2:
      return wait_for_copies<1>();
    case 3:
      return wait_for_copies<2>();
    case 4:
      return wait_for_copies<3>();
    default:
      return wait_for_copies<5>();
  }
}

template <Type W, int T, bool GATED>
struct SinglePass {
  static constexpr int kParts = GATED ? 3 : 2;
  static constexpr int kPiece = piece(W);
  static constexpr int kPieces = kChannels / kPiece;
  static constexpr int kNeurons = most_neurons(T);
  static constexpr int kPairs = kNeurons * T;  // of a neuron and a token
  static constexpr int kValues = (kParts - 1) * kPairs;

  const Params& p;
  unsigned char* memory;
  SinglePassLayout at;
  uint32_t threads, team, member;  // of a team, which, and which of its threads
  int32_t first, count;            // this team's neurons; `first` counts from the block's where there is an index
  int32_t width;                   // D
  uint32_t apart;                  // bytes from a thread's piece to its next, in the ring and in a part of the record
  uint32_t own;                    // offset of this thread's first piece in the ring of its team
  bool indexed;
  uint64_t policy;
  float x[T][kPieces][kPiece];
  float sums[T][kPieces][kPiece];

  __device__ explicit SinglePass(const Params& params) : p(params), memory(shared_memory()) {
    threads = blockDim.x / static_cast<uint32_t>(p.teams);
    team = threadIdx.x / threads;
    member = threadIdx.x % threads;
    at = single_pass_layout(W, T, kParts, threads, p.teams, p.step, p.stages, p.share);
    policy = weight_policy(p.evict_first);
    width = static_cast<int32_t>(p.problem.hidden_size);
    apart = threads * 16;
    own = at.ring + team * at.neuron * static_cast<uint32_t>(p.step * p.stages) + member * 16;
  }

  __device__ int32_t channel(int i) const { return static_cast<int32_t>(i * threads + member) * kPiece; }
  __device__ bool live(int i) const { return channel(i) < width; }

  __device__ void find_neurons() {
    Neurons all = neurons_of(p);
    auto begin = static_cast<int32_t>(all.count * blockIdx.x / gridDim.x);
    int32_t held = static_cast<int32_t>(all.count * (blockIdx.x + 1) / gridDim.x) - begin;
    first = held * static_cast<int32_t>(team) / p.teams;
    count = held * static_cast<int32_t>(team + 1) / p.teams - first;
    indexed = all.index;
    if (!indexed) {
      first += begin;
      return;
    }
    auto* rows = reinterpret_cast<int32_t*>(memory + at.rows);
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < held; i += blockDim.x) rows[i] = all.index[begin + i];
    __syncthreads();
  }

  __device__ int32_t row(int32_t i) const {
    return indexed ? reinterpret_cast<const int32_t*>(memory + at.rows)[first + i] : first + i;
  }

  // This thread's piece of one part of one neuron of the step whose weights begin `slot` bytes into the ring.
  __device__ unsigned char* place(uint32_t slot, int neuron, int part, int i) const {
    return memory + own + slot + static_cast<uint32_t>(neuron) * at.neuron +
           static_cast<uint32_t>(part * kPieces + i) * apart;
  }

  __device__ void copy_step(int32_t step, uint32_t slot) {
    using Bits = typename Element<W>::Bits;
    auto* record = static_cast<const char*>(p.problem.record) + member * 16;
    auto rows = static_cast<uint32_t>(p.rows);
    uint32_t part_bytes = static_cast<uint32_t>(width) * sizeof(Bits);
#pragma unroll
    for (int n = 0; n < kNeurons; ++n) {
      int32_t i = step * p.step + n;
      if (n >= p.step || i >= count) break;
      auto r = static_cast<uint32_t>(row(i));
      if (indexed && r >= rows) r = 0;  // its activation will be NaN
      const char* from = record + static_cast<uint64_t>(r) * p.row_bytes;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int j = 0; j < kPieces; ++j)
          if (live(j)) copy_piece(place(slot, n, part, j), from + part * part_bytes + j * apart, policy);
    }
    commit_copies();
  }

  __device__ void begin_sums() {
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
#pragma unroll
        for (int e = 0; e < kPiece; ++e) x[t][j][e] = sums[t][j][e] = 0.0f;
        if (t < p.problem.tokens && live(j)) load_x(p, t, channel(j), x[t][j]);
      }
  }

  // Sums over this thread's channels, then over its warp, which it leaves in shared memory.
  __device__ void dots(uint32_t slot, int active, float* warps) {
    float values[kValues];
#pragma unroll
    for (int v = 0; v < kValues; ++v) values[v] = 0.0f;
#pragma unroll
    for (int n = 0; n < kNeurons; ++n) {
      if (n >= active) break;
#pragma unroll
      for (int part = 0; part < kParts - 1; ++part)
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          if (!live(j)) continue;
          float w[kPiece];
          unpack<W>(load_piece(place(slot, n, part, j)), w);
#pragma unroll
          for (int t = 0; t < T; ++t)
#pragma unroll
            for (int e = 0; e < kPiece; ++e)
              values[part * kPairs + n * T + t] = fmaf(w[e], x[t][j][e], values[part * kPairs + n * T + t]);
        }
    }
    float sum = sum_over_warp(values);
    uint32_t lane = threadIdx.x % kWarp;
    if (lane % (kWarp / kValues) == 0) warps[member / kWarp * kValues + lane * kValues / kWarp] = sum;
  }

  // The sum over the team's warps of one value. Four lanes, those of one pair, share the work; all get the sum.
  __device__ float sum_over_warps(const float* warps, int value, uint32_t quarter) const {
    float sum = 0.0f;
    for (uint32_t w = quarter; w < threads / kWarp; w += 4) sum += warps[w * kValues + value];
    sum += __shfl_xor_sync(kAll, sum, 8);
    return sum + __shfl_xor_sync(kAll, sum, 16);
  }

  __device__ void add_down_rows(uint32_t slot, int active, float hidden) {
#pragma unroll
    for (int n = 0; n < kNeurons; ++n) {
      if (n >= active) break;
      float a[T];
#pragma unroll
      for (int t = 0; t < T; ++t) a[t] = __shfl_sync(kAll, hidden, n * T + t);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (!live(j)) continue;
        float w[kPiece];
        unpack<W>(load_piece(place(slot, n, kParts - 1, j)), w);
#pragma unroll
        for (int t = 0; t < T; ++t)
#pragma unroll
          for (int e = 0; e < kPiece; ++e) sums[t][j][e] = fmaf(a[t], w[e], sums[t][j][e]);
      }
    }
  }

  __device__ void take_step(int32_t step, uint32_t slot) {
    // Each lane has a pair of a neuron and a token, with its quarter of the warps; pairs repeat where they are four.
    uint32_t lane = threadIdx.x % kWarp, quarter = lane / 8;
    int pair = static_cast<int>(lane % 8 % kPairs);
    int32_t rest = count - step * p.step, active = rest < p.step ? rest : p.step;
    // Terms come from far: they are asked for before the dot products, and used after.
    Terms terms = load_terms<W, GATED>(p, pair / T < active ? row(step * p.step + pair / T) : 0);
    // Two buffers: a warp may be a step ahead of another that still reads.
    uint32_t held = threads / kWarp * kValues;
    auto* warps = reinterpret_cast<float*>(memory + at.sums) + (team * 2 + static_cast<uint32_t>(step) % 2) * held;
    dots(slot, active, warps);
    team_barrier(team + 1, threads);
    float up = sum_over_warps(warps, pair, quarter), gated = 0.0f;
    if constexpr (GATED) gated = sum_over_warps(warps, kPairs + pair, quarter);
    add_down_rows(slot, active, hidden_activation<W, GATED>(p, terms, pair % T, up, gated));
  }

  __device__ void store_partial() {
    int64_t row = padded(p.problem);
    auto* partial = reinterpret_cast<float*>(memory + at.ring) + team * T * row;
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (!live(j)) continue;
#pragma unroll
        for (int e = 0; e < kPiece; e += 4) {
          auto& s = sums[t][j];
          *reinterpret_cast<float4*>(partial + t * row + channel(j) + e) = float4{s[e], s[e + 1], s[e + 2], s[e + 3]};
        }
      }
  }

  // Each block of a cluster adds up a slice of the channels over all teams of all of them.
  __device__ void add_cluster(int64_t begin, int64_t end) {
    int64_t row = padded(p.problem), quads = (end - begin + 3) / 4, tokens = p.problem.tokens;
    auto* partial = reinterpret_cast<const float*>(memory + at.ring);
    float* out = p.partials + static_cast<int64_t>(blockIdx.x / cluster_size()) * tokens * row;
    for (int64_t i = threadIdx.x; i < tokens * quads; i += blockDim.x) {
      int64_t place = i / quads * row + begin + i % quads * 4;
      float4 total{0.0f, 0.0f, 0.0f, 0.0f};
      for (uint32_t rank = 0; rank < cluster_size(); ++rank)
        for (int32_t other = 0; other < p.teams; ++other) {
          float4 v = load_remote(reinterpret_cast<const float4*>(partial + other * T * row + place), rank);
          total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
        }
      *reinterpret_cast<float4*>(out + place) = total;
    }
  }

  __device__ void run() {
    allow_next_kernel();
    if (!p.early) wait_for_previous_kernel();
    find_neurons();
    int32_t steps = (count + p.step - 1) / p.step;
    uint32_t slot_bytes = at.neuron * static_cast<uint32_t>(p.step), ring = slot_bytes * p.stages, next = 0;
    for (int s = 0; s < p.stages - 1; ++s, next += slot_bytes) copy_step(s, next);
    if (p.early) wait_for_previous_kernel();
    begin_sums();
    uint32_t slot = 0;
    for (int32_t step = 0; step < steps; ++step) {
      copy_step(step + p.stages - 1, next);
      wait_for_step(p.stages);
      take_step(step, slot);
      slot = slot + slot_bytes == ring ? 0 : slot + slot_bytes;
      next = next + slot_bytes == ring ? 0 : next + slot_bytes;
    }
    wait_for_copies<0>();
    __syncthreads();  // the ring becomes the place of partials, which are ordered otherwise
    store_partial();
    cluster_arrive();
    cluster_wait();
    int64_t quads = padded(p.problem) / 4, slices = cluster_size(), rank = cluster_rank();
    int64_t begin = quads * rank / slices * 4, end = quads * (rank + 1) / slices * 4;
    add_cluster(begin, end);
    cluster_arrive();  // this block reads no other's memory any more
    auto* flag = reinterpret_cast<uint32_t*>(memory);
    if (is_last_block(p.tickets + rank, gridDim.x / static_cast<uint32_t>(slices), flag))
      finish(p, begin, end < width ? end : width);
    cluster_wait();
  }
};

template <Type W, int T, bool GATED>
__global__ void __launch_bounds__(most_threads(T), 1) single_pass(const __grid_constant__ Params p) {
  SinglePass<W, T, GATED>(p).run();
}

}  // namespace pyprune
