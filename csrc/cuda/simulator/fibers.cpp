#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define PYPRUNE_ADDRESS_SANITIZER 1
#else
#define PYPRUNE_ADDRESS_SANITIZER 0
#endif

namespace pyprune::simulator {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr uint32_t kLanes = 32;
constexpr size_t kPieceBytes = 16;

// All `size` members arrive, then all go on.
struct Barrier {
  uint32_t size = 0, arrived = 0;
  uint64_t generation = 0;

  void arrive() {
    if (++arrived < size) return;
    arrived = 0;
    ++generation;
  }
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kLanes] = {};
};

struct Block {
  Barrier barrier;
  Barrier teams[16];
  std::vector<Warp> warps;
  // Of exactly the size that was asked for, so that a sanitizer sees what goes beyond.
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
};

struct Copy {
  void* shared;
  const void* global;
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  Here here;
  Block* block;
  Warp* warp;
  const Barrier* waits_for = nullptr;
  uint64_t seen = 0;          // generation of `waits_for` that must pass
  uint64_t cluster_seen = 0;  // generation at cluster_arrive
  bool done = false;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

struct Simulation {
  void (*body)(void*);
  void* context;
  Shape shape;
  Barrier cluster;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  bool resumed = false;  // any fiber, in this round
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::string error;
};

Simulation* simulation = nullptr;

// Stacks are kept from one run to the next.
std::vector<void*>& stacks() {
  static std::vector<void*> all;
  return all;
}

void* stack(size_t i) {
  while (stacks().size() <= i) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of simulated threads");
    stacks().push_back(memory);
  }
  return stacks()[i];
}

void to_scheduler(bool for_good) {
  Simulation& s = *simulation;
  Fiber& fiber = *s.running;
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, s.scheduler_stack, s.scheduler_stack_size);
#else
  (void)for_good;
#endif
  swapcontext(&fiber.context, &s.scheduler);
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &s.scheduler_stack, &s.scheduler_stack_size);
#endif
}

void to_fiber(Fiber& fiber) {
  Simulation& s = *simulation;
  s.running = &fiber;
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&s.scheduler_fake_stack, fiber.stack, kStack);
#endif
  swapcontext(&s.scheduler, &fiber.context);
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(s.scheduler_fake_stack, nullptr, nullptr);
#endif
  s.running = nullptr;
}

[[noreturn]] void fail(const std::string& what) {
  Simulation& s = *simulation;
  const Here& at = s.running->here;
  s.error = what + " (block " + std::to_string(at.block.x) + ", thread " + std::to_string(at.thread.x) + ")";
  s.running->done = true;
  to_scheduler(true);
  std::abort();
}

void pass(const Barrier& barrier, uint64_t seen) {
  Fiber& fiber = *simulation->running;
  if (barrier.generation != seen) return;
  fiber.waits_for = &barrier;
  fiber.seen = seen;
  to_scheduler(false);
}

void meet(Barrier& barrier) {
  uint64_t seen = barrier.generation;
  barrier.arrive();
  pass(barrier, seen);
}

void fiber_main() {
  Simulation& s = *simulation;
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &s.scheduler_stack, &s.scheduler_stack_size);
#endif
  s.body(s.context);
  Fiber& fiber = *s.running;
  bool left = !fiber.open.empty();
  for (auto& group : fiber.groups) left |= !group.empty();
  if (left) fail("a thread ended with copies under way");
  fiber.done = true;
  to_scheduler(true);
}

void prepare_fiber(uint32_t rank, uint32_t t, uint32_t first_block, Block& block) {
  Simulation& s = *simulation;
  const Shape& shape = s.shape;
  Fiber& fiber = s.fibers[rank * shape.threads + t];
  fiber.here = {{t}, {first_block + rank}, {shape.threads}, {shape.blocks}, rank, shape.cluster, block.shared.get()};
  fiber.block = &block;
  fiber.warp = &block.warps[t / kLanes];
  fiber.warp->barrier.size = kLanes;
  fiber.stack = stack(rank * shape.threads + t);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

void prepare(uint32_t first_block) {
  Simulation& s = *simulation;
  const Shape& shape = s.shape;
  s.cluster = {shape.cluster * shape.threads, 0, 0};
  s.blocks.clear();
  s.blocks.resize(shape.cluster);
  s.fibers.clear();
  s.fibers.resize(shape.cluster * shape.threads);
  for (uint32_t rank = 0; rank < shape.cluster; ++rank) {
    Block& block = s.blocks[rank];
    block.barrier.size = shape.threads;
    block.warps.resize(shape.threads / kLanes);
    size_t bytes = (shape.shared + 127) / 128 * 128;
    block.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(128, std::max<size_t>(bytes, 128))));
    std::memset(block.shared.get(), 0xff, bytes);
    for (uint32_t t = 0; t < shape.threads; ++t) prepare_fiber(rank, t, first_block, block);
  }
}

// Resume the threads of one warp until none can go on; how many of them ended.
size_t run_warp(const std::vector<Fiber*>& lanes) {
  Simulation& s = *simulation;
  size_t ended = 0;
  for (bool moved = true; moved;) {
    moved = false;
    for (Fiber* fiber : lanes) {
      if (fiber->done || (fiber->waits_for && fiber->waits_for->generation == fiber->seen)) continue;
      fiber->waits_for = nullptr;
      s.resumed = moved = true;
      to_fiber(*fiber);
      if (!s.error.empty()) throw std::runtime_error(s.error);
      ended += fiber->done;
    }
  }
  return ended;
}

// Run one warp after another as far as it comes. The one that opens a barrier is then ahead of all others by as much as
// the kernel allows, which is what a missing barrier cannot stand.
void run_cluster(std::mt19937& random, bool shuffled) {
  Simulation& s = *simulation;
  std::vector<std::vector<Fiber*>> warps(s.fibers.size() / kLanes);
  for (size_t i = 0; i < s.fibers.size(); ++i) warps[i / kLanes].push_back(&s.fibers[i]);
  size_t left = s.fibers.size();
  while (left) {
    if (shuffled) std::shuffle(warps.begin(), warps.end(), random);
    s.resumed = false;
    for (auto& lanes : warps) left -= run_warp(lanes);
    if (!s.resumed) throw std::runtime_error("threads wait at a barrier that others never reach");
  }
}

}  // namespace

Device& device() {
  static Device pretended;
  return pretended;
}

const Here& here() { return simulation->running->here; }

void run(const Shape& shape, void (*body)(void*), void* context) {
  if (!shape.threads || shape.threads % kLanes || shape.threads > 1024)
    throw std::runtime_error("a block must have whole warps and at most 1024 threads");
  if (!shape.blocks || shape.blocks % shape.cluster) throw std::runtime_error("a grid must be whole clusters");
  if (shape.shared > device().shared) throw std::runtime_error("a block asks for more shared memory than there is");
  Simulation now;
  now.body = body;
  now.context = context;
  now.shape = shape;
  struct Scope {
    explicit Scope(Simulation* s) { simulation = s; }
    ~Scope() { simulation = nullptr; }
  } scope(&now);
  std::vector<uint32_t> clusters(shape.blocks / shape.cluster);
  for (uint32_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
  std::mt19937 random(device().order);
  bool shuffled = device().order != 0;
  if (shuffled) std::shuffle(clusters.begin(), clusters.end(), random);
  for (uint32_t cluster : clusters) {
    prepare(cluster * shape.cluster);
    run_cluster(random, shuffled);
  }
}

void block_barrier() { meet(simulation->running->block->barrier); }

void team_barrier(uint32_t number, uint32_t threads) {
  if (number < 1 || number > 15 || threads % kLanes) fail("no barrier of that number, or not of whole warps");
  Barrier& barrier = simulation->running->block->teams[number];
  if (barrier.arrived && barrier.size != threads) fail("threads disagree on who meets at a barrier");
  barrier.size = threads;
  meet(barrier);
}

void cluster_arrive() {
  simulation->running->cluster_seen = simulation->cluster.generation;
  simulation->cluster.arrive();
}

void cluster_wait() { pass(simulation->cluster, simulation->running->cluster_seen); }

uint64_t exchange(uint64_t value, uint32_t lane) {
  Fiber& fiber = *simulation->running;
  Warp& warp = *fiber.warp;
  // Two sets of slots: a lane may be in the next exchange before all have read this one, but not in the one after.
  uint64_t seen = warp.barrier.generation;
  auto& slots = warp.slots[seen % 2];
  slots[fiber.here.thread.x % kLanes] = value;
  warp.barrier.arrive();
  pass(warp.barrier, seen);
  return slots[lane];
}

void copy_later(void* shared, const void* global) {
  Fiber& fiber = *simulation->running;
  auto* to = static_cast<unsigned char*>(shared);
  if (to < fiber.here.shared || to + kPieceBytes > fiber.here.shared + simulation->shape.shared)
    fail("a copy goes outside shared memory");
  check_aligned(shared);
  check_aligned(global);
  std::memset(shared, 0xff, kPieceBytes);
  fiber.open.push_back({shared, global});
}

void commit_copies() {
  Fiber& fiber = *simulation->running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_for_copies(int groups_left) {
  Fiber& fiber = *simulation->running;
  while (fiber.groups.size() > static_cast<size_t>(groups_left)) {
    for (const Copy& copy : fiber.groups.front()) std::memcpy(copy.shared, copy.global, kPieceBytes);
    fiber.groups.pop_front();
  }
}

const void* remote(const void* own, uint32_t rank) {
  if (rank >= simulation->shape.cluster) fail("no block of that rank in the cluster");
  auto offset = static_cast<const unsigned char*>(own) - simulation->running->here.shared;
  return simulation->blocks[rank].shared.get() + offset;
}

void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % kPieceBytes) fail("an access of 16 bytes is not aligned");
}

}  // namespace pyprune::simulator
