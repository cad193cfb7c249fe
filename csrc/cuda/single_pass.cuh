// Few tokens in one pass over the weights: a team of threads takes a run of neurons, and for each step of a few neurons
// computes their dot products, their activations, and adds their down rows to sums in registers.
//
//     a thread of a team owns channels, the same of x, of gate and up rows, of down rows and of the sums
//     copies of the next steps' weights are under way: each thread copies just what it reads itself, in pieces of 16
//     bytes; or, in bulk, one thread of the team has whole neurons copied, each a run of memory, and all wait for them
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
__device__ inline void wait_for_group(int stages) {
  switch (stages) {
    case 1:
      return wait_for_copies<0>();
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

template <Type W, int T, bool GATED, bool BULK>
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
  uint32_t ring;                   // offset of the ring of this team
  CopyAddress target;              // where this thread's copies go: its place in the ring's first neuron
  bool indexed;
  uint64_t policy;
  float x[T][kPieces][kPiece];
  float sums[T][kPieces][kPiece];

  __device__ explicit SinglePass(const Params& params) : p(params), memory(shared_memory()) {
    threads = blockDim.x / static_cast<uint32_t>(p.teams);
    team = threadIdx.x / threads;
    member = threadIdx.x % threads;
    width = static_cast<int32_t>(p.call.hidden_size);
    at = single_pass_layout(W, T, kParts, threads, p.teams, p.step, p.stages, p.share, BULK,
                            static_cast<uint32_t>(width));
    policy = weight_policy(p.evict_first);
    ring = at.ring + team * up_to_multiple(at.neuron * static_cast<uint32_t>(p.step * p.stages), 16);
    if constexpr (!BULK) {
      at.neuron = in_every_thread(at.neuron), at.part = in_every_thread(at.part);
      target = copy_address(memory + ring) + member * 16;
    }
    apart = in_every_thread(threads * 16);
  }

  __device__ int32_t channel(int i) const { return static_cast<int32_t>(i * threads + member) * kPiece; }
  __device__ bool live(int i) const { return channel(i) < width; }

  __device__ void find_neurons() {
    int64_t all = p.call.neurons;
    auto begin = static_cast<int32_t>(all * blockIdx.x / gridDim.x);
    int32_t held = static_cast<int32_t>(all * (blockIdx.x + 1) / gridDim.x) - begin;
    first = held * static_cast<int32_t>(team) / p.teams;
    count = held * static_cast<int32_t>(team + 1) / p.teams - first;
    indexed = p.call.index;
    auto* rows = reinterpret_cast<int32_t*>(memory + at.rows);
    if (!indexed) first += begin;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); indexed && i < held; i += blockDim.x)
      rows[i] = p.call.index[begin + i];
    if (indexed || BULK) __syncthreads();
  }

  __device__ int32_t row(int32_t i) const {
    return indexed ? reinterpret_cast<const int32_t*>(memory + at.rows)[first + i] : first + i;
  }

  // The neurons of step `step`; none behind the last.
  __device__ int32_t active_in(int32_t step) const {
    int32_t rest = count - step * p.step;
    return rest < p.step ? rest : p.step;
  }

  // From the ring's begin to a neuron of the step that has slot `slot` of it.
  __device__ uint32_t offset(int32_t slot, int neuron) const {
    return static_cast<uint32_t>(slot * p.step + neuron) * at.neuron;
  }

  // From there to this thread's piece of one of its parts, but for `member`.
  __device__ uint32_t within(int part, int i) const {
    return static_cast<uint32_t>(part) * at.part + static_cast<uint32_t>(i) * apart;
  }

  __device__ unsigned char* place(int32_t slot, int neuron) const { return memory + ring + offset(slot, neuron); }
  __device__ unsigned char* place(int32_t slot, int neuron, int part, int i) const {
    return place(slot, neuron) + member * 16 + within(part, i);
  }

  __device__ const char* record_of(int32_t neuron) const {
    auto r = static_cast<uint32_t>(row(neuron));
    if (indexed && r >= static_cast<uint32_t>(p.call.rows)) r = 0;  // its activation will be NaN
    return static_cast<const char*>(p.call.record) + static_cast<uint64_t>(r) * p.row_bytes;
  }

  __device__ void* barrier(int32_t slot) const {
    return memory + kBarriers + (team * static_cast<uint32_t>(p.stages) + static_cast<uint32_t>(slot)) * 8;
  }

  __device__ void make_barriers() {
    if (member != 0) return;
    for (int32_t slot = 0; slot < p.stages; ++slot) make_copy_barrier(barrier(slot));
    publish_copy_barriers();
  }

  // Ask for the weights of a step; nothing behind the last.
  __device__ void copy_step(int32_t step, int32_t slot) {
    int32_t active = active_in(step);
    if constexpr (BULK) {
      if (member != 0 || active <= 0) return;
      expect_bytes(barrier(slot), static_cast<uint32_t>(active) * at.neuron);
      for (int32_t n = 0; n < active; ++n)
        copy_run(place(slot, n), record_of(step * p.step + n), at.neuron, barrier(slot), policy);
      return;
    }
    uint32_t part_bytes = static_cast<uint32_t>(width) * sizeof(typename Element<W>::Bits);
#pragma unroll
    for (int n = 0; n < kNeurons; ++n) {
      if (n >= active) break;
      const char* from = record_of(step * p.step + n) + member * 16;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int j = 0; j < kPieces; ++j)
          if (live(j))
            copy_piece(target + offset(slot, n) + within(part, j), from + part * part_bytes + j * apart, policy);
    }
    commit_copies();
  }

  // Until the weights of the step in `slot` are there; `turn` counts how often the ring has been gone round.
  __device__ void wait_for_step(int32_t slot, uint32_t turn) const {
    if constexpr (BULK)
      wait_for_bytes(barrier(slot), turn % 2);
    else
      wait_for_group(p.stages);
  }

  __device__ void begin_sums() {
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
#pragma unroll
        for (int e = 0; e < kPiece; ++e) x[t][j][e] = sums[t][j][e] = 0.0f;
        if (t < p.call.tokens && live(j)) load_x(p, t, channel(j), x[t][j]);
      }
  }

  // Sums over this thread's channels, then over its warp, which it leaves in shared memory.
  __device__ void dots(int32_t slot, int active, float* warps) {
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

  __device__ void add_down_rows(int32_t slot, int active, float hidden) {
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

  __device__ void take_step(int32_t step, int32_t slot) {
    // Each lane has a pair of a neuron and a token, with its quarter of the warps; pairs repeat where they are four.
    uint32_t lane = threadIdx.x % kWarp, quarter = lane / 8;
    int pair = static_cast<int>(lane % 8 % kPairs);
    int32_t active = active_in(step);
    // Terms come from far: they are asked for before the dot products, and used after.
    Terms terms = load_terms<W, GATED>(p, pair / T < active ? row(step * p.step + pair / T) : 0);
    // Two buffers: a warp may be a step ahead of another that still reads.
    uint32_t held = threads / kWarp * kValues;
    auto* warps = reinterpret_cast<float*>(memory + at.sums) + (team * 2 + static_cast<uint32_t>(step) % 2) * held;
    dots(slot, active, warps);
    team_barrier(team + 1, threads);
    // All of the team have done with the step before.
    if (BULK && step > 0) copy_step(step - 1 + p.stages, slot == 0 ? p.stages - 1 : slot - 1);
    float up = sum_over_warps(warps, pair, quarter), gated = 0.0f;
    if constexpr (GATED) gated = sum_over_warps(warps, kPairs + pair, quarter);
    add_down_rows(slot, active, hidden_activation<W, GATED>(p, terms, up, gated));
  }

  __device__ void store_partial() {
    int64_t row = padded(p.call);
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
    int64_t row = padded(p.call), quads = (end - begin + 3) / 4;
    auto* partial = reinterpret_cast<const float*>(memory + at.ring);
    float* out = p.partials + static_cast<int64_t>(blockIdx.x / cluster_size()) * p.call.tokens * row;
    int32_t addends = static_cast<int32_t>(cluster_size()) * p.teams;
    uint32_t ways = threads_of_a_quad(quads, addends), own = threadIdx.x % ways;
    int64_t count = p.call.tokens * quads * ways;
    for (int64_t base = 0; base < count; base += blockDim.x) {
      int64_t i = base + threadIdx.x, place = i / ways / quads * row + begin + i / ways % quads * 4;
      bool here = i < count;
      auto load = [&](int g) {
        float4 none{0.0f, 0.0f, 0.0f, 0.0f};
        auto rank = static_cast<uint32_t>(g / p.teams);
        return here ? load_remote(reinterpret_cast<const float4*>(partial + g % p.teams * T * row + place), rank)
                    : none;
      };
      float sums[4];
      add_up(addends, own, ways, load, sums);
      if (here && own == 0) *reinterpret_cast<float4*>(out + place) = float4{sums[0], sums[1], sums[2], sums[3]};
    }
  }

  __device__ void run() {
    allow_next_kernel();
    if (!p.early) wait_for_previous_kernel();
    if constexpr (BULK) make_barriers();
    find_neurons();
    int32_t steps = (count + p.step - 1) / p.step, slot = 0;
    for (int32_t s = 0; s < p.stages; ++s) copy_step(s, s);
    if (p.early) wait_for_previous_kernel();
    begin_sums();
    uint32_t turn = 0;
    for (int32_t step = 0; step < steps; ++step) {
      wait_for_step(slot, turn);
      take_step(step, slot);
      if (!BULK) copy_step(step + p.stages, slot);  // each thread overwrites only what it alone has read
      slot = slot + 1 == p.stages ? 0 : slot + 1;
      turn += slot == 0;
    }
    if (!BULK) wait_for_copies<0>();
    __syncthreads();  // the ring becomes the place of partials, which are ordered otherwise
    store_partial();
    cluster_arrive();
    cluster_wait();
    int64_t quads = padded(p.call) / 4, slices = cluster_size(), rank = cluster_rank();
    int64_t begin = quads * rank / slices * 4, end = quads * (rank + 1) / slices * 4;
    add_cluster(begin, end);
    cluster_arrive_done();  // this block reads no other's memory any more
    auto* flag = reinterpret_cast<uint32_t*>(memory);
    if (is_last_block(p.tickets + rank, gridDim.x / static_cast<uint32_t>(slices), flag))
      finish(p, begin, end < width ? end : width);
    cluster_wait();
  }
};

template <Type W, int T, bool GATED>
__global__ void __launch_bounds__(most_threads(T), 1) single_pass(const __grid_constant__ Params p) {
  SinglePass<W, T, GATED, false>(p).run();
}

template <Type W, int T, bool GATED>
__global__ void __launch_bounds__(most_threads(T), 1) single_pass_bulk(const __grid_constant__ Params p) {
#ifdef PYPRUNE_BULK_COPIES
  SinglePass<W, T, GATED, true>(p).run();
#endif
}

}  // namespace pyprune
