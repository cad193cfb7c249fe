// Threads of a simulated kernel, as fibers of one thread of the CPU, and what they do together.
#pragma once

#include <cstdint>
#include <functional>

namespace pyprune::simulator {

struct Index {
  uint32_t x;
};

// Where the running fiber is.
struct Here {
  Index thread, block, threads, blocks;
  uint32_t rank, cluster;
  unsigned char* shared;
};

struct Shape {
  uint32_t blocks, threads, cluster, shared;
};

// What the simulated device is like; for tests to choose.
struct Device {
  int processors = 4;
  uint32_t shared = 227 * 1024;  // of a block, in bytes
  uint32_t order = 0;            // seed of the order of clusters and of their warps; 0: as they are numbered
};

Device& device();
const Here& here();

// Run `body` as every thread. Throws std::runtime_error when threads wait for each other for ever, disagree on a
// barrier, copy outside shared memory, or leave copies behind.
//
// Between `begin_stream` and `end_stream` kernels are kept, and run together by the latter: one that overlaps may begin
// as soon as every block of the kernel before allows it, and with an order that is odd it does so before that kernel
// has done anything else. Two more than the oldest are under way at most.
void launch(const Shape& shape, bool overlap, std::function<void()> body);
void begin_stream();
void end_stream();

void block_barrier();
void team_barrier(uint32_t number, uint32_t threads);
void cluster_arrive();
void cluster_wait();

void allow_next_kernel();
void wait_for_previous_kernel();

// What lane `lane` of this warp gives in the same exchange.
uint64_t exchange(uint64_t value, uint32_t lane);

void copy_later(void* shared, const void* global);
void commit_copies();
void wait_for_copies(int groups_left);

void make_copy_barrier(void* shared);
void expect_bytes(void* barrier, uint32_t bytes);
void copy_run(void* shared, const void* global, uint32_t bytes, void* barrier);
void wait_for_bytes(void* barrier, uint32_t parity);

// The place in the shared memory of block `rank` that `own` is in this block's.
const void* remote(const void* own, uint32_t rank);

void check_aligned(const void* address);

}  // namespace pyprune::simulator
