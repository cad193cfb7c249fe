// The device of a simulated kernel: CUDA's words, with a meaning on the CPU. Tests only.
//
// Kernels run unchanged, a block or a cluster at a time, every thread a fiber that gives way at barriers and shuffles.
// Copies to shared memory happen when they are waited for, and not before; until then their place holds NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../params.h"
#include "fibers.h"

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::pyprune::simulator::here().thread)
#define blockIdx (::pyprune::simulator::here().block)
#define blockDim (::pyprune::simulator::here().threads)
#define gridDim (::pyprune::simulator::here().blocks)

namespace pyprune {

namespace {
#include "../../common/floats.h"
}

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct Piece {
  uint32_t word[4];
};

inline void __syncthreads() { simulator::block_barrier(); }
inline void team_barrier(uint32_t number, uint32_t threads) { simulator::team_barrier(number, threads); }

inline uint32_t count_block(uint32_t* counter) { return (*counter)++; }

template <class T>
inline T exchange(T value, uint32_t lane) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = simulator::exchange(bits, lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
inline T __shfl_sync(uint32_t, T value, uint32_t lane) {
  return exchange(value, lane % kWarp);
}

template <class T>
inline T __shfl_xor_sync(uint32_t, T value, uint32_t offset) {
  return exchange(value, (threadIdx.x ^ offset) % kWarp);
}

inline unsigned char* shared_memory() { return simulator::here().shared; }

inline uint64_t weight_policy(bool) { return 0; }

inline uint32_t in_every_thread(uint32_t value) { return value; }
using CopyAddress = unsigned char*;
inline CopyAddress copy_address(unsigned char* shared) { return shared; }
inline void copy_piece(CopyAddress shared, const void* global, uint64_t) { simulator::copy_later(shared, global); }
inline void commit_copies() { simulator::commit_copies(); }

template <int N>
inline void wait_for_copies() {
  simulator::wait_for_copies(N);
}

inline Piece load_piece(const void* memory) {
  simulator::check_aligned(memory);
  Piece p;
  std::memcpy(&p, memory, sizeof p);
  return p;
}

inline Piece load_weights(const void* global, uint64_t) { return load_piece(global); }
inline float4 load_shared_by_blocks(const float4* global) { return *global; }

inline float from_half(uint32_t bits) { return from_f16(static_cast<uint16_t>(bits)); }
inline uint16_t to_half(float value) { return to_f16(value); }
inline uint16_t to_bfloat(float value) { return to_bf16(value); }

template <int I>
inline uint32_t byte_beside_magic(uint32_t word) {
  return 0x4b000000u | (word >> (8 * I) & 0xffu);
}

inline float __uint_as_float(uint32_t bits) { return from_bits(bits); }

inline uint32_t cluster_rank() { return simulator::here().rank; }
inline uint32_t cluster_size() { return simulator::here().cluster; }
inline void cluster_arrive() { simulator::cluster_arrive(); }
inline void cluster_arrive_done() { simulator::cluster_arrive(); }
inline void cluster_wait() { simulator::cluster_wait(); }

inline float4 load_remote(const float4* own, uint32_t rank) {
  return *reinterpret_cast<const float4*>(simulator::remote(own, rank));
}

inline void wait_for_previous_kernel() { simulator::wait_for_previous_kernel(); }
inline void allow_next_kernel() { simulator::allow_next_kernel(); }

#define PYPRUNE_BULK_COPIES
inline void make_copy_barrier(void* shared) { simulator::make_copy_barrier(shared); }
inline void publish_copy_barriers() {}
inline void expect_bytes(void* barrier, uint32_t bytes) { simulator::expect_bytes(barrier, bytes); }
inline void copy_run(void* shared, const void* global, uint32_t bytes, void* barrier, uint64_t) {
  simulator::copy_run(shared, global, bytes, barrier);
}
inline void wait_for_bytes(void* barrier, uint32_t parity) { simulator::wait_for_bytes(barrier, parity); }

}  // namespace pyprune
