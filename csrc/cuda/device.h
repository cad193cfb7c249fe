// What kernels ask of the device beyond C++: CUDA's own, or the simulator's on a CPU.
#pragma once

#ifdef PYPRUNE_SIMULATE
#include "simulator/device.h"
#else

#include <cuda_runtime.h>

#include "params.h"

namespace pyprune {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A cache policy for weights, which are read once: they go first, or are treated like anything else.
__device__ inline uint64_t weight_policy(bool evict_first) {
  uint64_t policy;
  if (evict_first)
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_unchanged.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// `value`, the same in every thread of the block, in a register of each: the compiler does not know that no thread has
// a number of `blockDim.x` or above. (It sees through a shuffle.)
__device__ inline uint32_t in_every_thread(uint32_t value) { return threadIdx.x < blockDim.x ? value : 0; }

// An address in shared memory for `copy_piece`. To be summed up of what is `in_every_thread` or differs among threads:
// where a uniform register is in the sum, nvcc 13.0 encodes a copy with a cache policy so that an H200 refuses it as an
// illegal instruction. tests/test_cuda_static.py looks for such copies.
using CopyAddress = uint32_t;
__device__ inline CopyAddress copy_address(const void* shared) { return in_every_thread(shared_address(shared)); }

// Copy 16 bytes to shared memory, past the registers and the L1 cache; complete when `wait_for_copies` says so.
__device__ inline void copy_piece(CopyAddress shared, const void* global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "l"(policy)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last N groups of this thread's copies are complete.
template <int N>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

struct Piece {
  uint32_t word[4];
};

__device__ inline Piece load_weights(const void* global, uint64_t policy) {
  Piece p;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
               : "l"(global), "l"(policy));
  return p;
}

__device__ inline Piece load_piece(const void* memory) {
  uint4 v = *static_cast<const uint4*>(memory);
  return {{v.x, v.y, v.z, v.w}};
}

// Add one to what all blocks count on: what the block wrote before its last barrier is seen by whoever counts later,
// and by its block after its next.
__device__ inline uint32_t count_block(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// What other blocks have written: from the L2 cache, since an L1 cache may hold something older.
__device__ inline float4 load_shared_by_blocks(const float4* global) { return __ldcg(global); }

__device__ inline float from_half(uint32_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
}

__device__ inline uint16_t to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ inline uint16_t to_bfloat(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Byte `i` of `word`, as an integer in [0, 255] added to 2^23, in the bits of a float.
template <int I>
__device__ inline uint32_t byte_beside_magic(uint32_t word) {
  return __byte_perm(word, 0x4b000000u, 0x7440u | I);
}

// A barrier of `threads` of the block's threads, whole warps; `number` is one of 1..15.
__device__ inline void team_barrier(uint32_t number, uint32_t threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PYPRUNE_BULK_COPIES

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Every thread of the cluster arrives, and later waits for all others; what was written before is then seen, unless it
// arrives to say only that it is done.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_arrive_done() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// 16 bytes of the shared memory of block `rank`, at the place where `own` is in this block's.
__device__ inline float4 load_remote(const float4* own, uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n .reg .u32 remote;\n mapa.shared::cluster.u32 remote, %4, %5;\n"
      " ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(own)), "r"(rank)
      : "memory");
  return v;
}

// Until the kernel before this one has ended and what it wrote is seen.
__device__ inline void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The kernel after this one may begin, as far as it does not wait.
__device__ inline void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;"); }

// Barriers for bulk copies, 8 bytes of shared memory each: one thread makes them, all of the block see them after its
// next barrier. A turn of one is complete when that thread's `expect_bytes` and so many bytes have come.
__device__ inline void make_copy_barrier(void* shared) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(shared)) : "memory");
}

// After the last of them, by the thread that made them: copies see them too.
__device__ inline void publish_copy_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void expect_bytes(void* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Copy `bytes`, whole pieces of 16, to shared memory by one instruction.
__device__ inline void copy_run(void* shared, const void* global, uint32_t bytes, void* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// Until the turn of parity `parity` is complete; the first one's is 0.
__device__ inline void wait_for_bytes(void* barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\nagain:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra "
      "again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
#else
__device__ inline uint32_t cluster_rank() { return 0; }
__device__ inline uint32_t cluster_size() { return 1; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_arrive_done() {}
__device__ inline void cluster_wait() { __syncthreads(); }
__device__ inline float4 load_remote(const float4* own, uint32_t) { return *own; }
__device__ inline void wait_for_previous_kernel() {}
__device__ inline void allow_next_kernel() {}
__device__ inline void make_copy_barrier(void*) {}
__device__ inline void publish_copy_barriers() {}
__device__ inline void expect_bytes(void*, uint32_t) {}
__device__ inline void copy_run(void*, const void*, uint32_t, void*, uint64_t) {}
__device__ inline void wait_for_bytes(void*, uint32_t) {}
#endif

}  // namespace pyprune

#endif
