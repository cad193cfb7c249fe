// Threads of a simulated kernel, as fibers of one thread of the CPU, and what they do together.
#pragma once

#include <cstdint>

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

// Run `body(context)` as every thread. Throws std::runtime_error when threads wait for each other for ever, disagree on
// a barrier, copy outside shared memory, or leave copies behind.
void run(const Shape& shape, void (*body)(void*), void* context);

void block_barrier();
void team_barrier(uint32_t number, uint32_t threads);
void cluster_arrive();
void cluster_wait();

// What lane `lane` of this warp gives in the same exchange.
uint64_t exchange(uint64_t value, uint32_t lane);

void copy_later(void* shared, const void* global);
void commit_copies();
void wait_for_copies(int groups_left);

// The place in the shared memory of block `rank` that `own` is in this block's.
const void* remote(const void* own, uint32_t rank);

void check_aligned(const void* address);

}  // namespace pyprune::simulator
