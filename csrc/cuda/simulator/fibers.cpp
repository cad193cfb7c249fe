#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
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

struct Copy {
  void* shared;
  const void* global;
  uint32_t bytes;

  void carry_out() const { std::memcpy(shared, global, bytes); }
};

// Of bulk copies: a turn is complete when one thread has said how many bytes to expect, and they have come.
struct CopyBarrier {
  Barrier turn{1, 0, 0};
  bool begun = false;
  uint32_t expected = 0, asked_for = 0;
  std::vector<Copy> copies;
};

struct Block {
  Barrier barrier;
  Barrier teams[16];
  std::vector<Warp> warps;
  std::map<void*, CopyBarrier> copy_barriers;
  bool allows = false;  // the next kernel to begin
  // Of exactly the size that was asked for, so that a sanitizer sees what goes beyond.
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
};

struct Cluster;

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  Here here;
  Cluster* cluster;
  Block* block;
  Warp* warp;
  const Barrier* waits_for = nullptr;
  uint64_t seen = 0;          // generation of `waits_for` that must pass
  uint64_t cluster_seen = 0;  // generation at cluster_arrive
  bool done = false;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;

  bool stands() const { return done || (waits_for && waits_for->generation == seen); }
};

struct Launch {
  Shape shape;
  bool overlap;
  std::function<void()> body;
  Launch* before = nullptr;
  Barrier held{1, 0, 0};   // threads that allow the next kernel go on when this opens, in a stream
  Barrier ended{1, 0, 0};  // opens at the end
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<uint32_t> order;  // of clusters
  size_t begun = 0, left = 0;
  uint32_t allowing = 0;  // blocks

  bool over() const { return ended.generation != 0; }
  bool may_begin() const { return !before || before->over() || (overlap && before->allowing == before->shape.blocks); }
};

struct Cluster {
  Launch* launch;
  Barrier barrier;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<std::vector<Fiber*>> warps;
  size_t left;
};

struct Simulation {
  Fiber* running = nullptr;
  bool resumed = false;  // any fiber, in this round
  bool streaming = false;
  std::vector<std::unique_ptr<Launch>> stream;
  std::mt19937 random;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::string error;
};

Simulation simulation;

// Stacks are kept from one run to the next.
std::vector<void*>& free_stacks() {
  static std::vector<void*> all;
  return all;
}

void* take_stack() {
  if (!free_stacks().empty()) {
    void* found = free_stacks().back();
    free_stacks().pop_back();
    return found;
  }
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of simulated threads");
  return memory;
}

void to_scheduler(bool for_good) {
  Fiber& fiber = *simulation.running;
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, simulation.scheduler_stack,
                                 simulation.scheduler_stack_size);
#else
  (void)for_good;
#endif
  swapcontext(&fiber.context, &simulation.scheduler);
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &simulation.scheduler_stack, &simulation.scheduler_stack_size);
#endif
}

void to_fiber(Fiber& fiber) {
  simulation.running = &fiber;
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&simulation.scheduler_fake_stack, fiber.stack, kStack);
#endif
  swapcontext(&simulation.scheduler, &fiber.context);
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(simulation.scheduler_fake_stack, nullptr, nullptr);
#endif
  simulation.running = nullptr;
}

[[noreturn]] void fail(const std::string& what) {
  const Here& at = simulation.running->here;
  simulation.error = what + " (block " + std::to_string(at.block.x) + ", thread " + std::to_string(at.thread.x) + ")";
  simulation.running->done = true;
  to_scheduler(true);
  std::abort();
}

void pass(const Barrier& barrier, uint64_t seen) {
  Fiber& fiber = *simulation.running;
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
#if PYPRUNE_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &simulation.scheduler_stack, &simulation.scheduler_stack_size);
#endif
  Fiber& fiber = *simulation.running;
  fiber.cluster->launch->body();
  bool left = !fiber.open.empty();
  for (auto& group : fiber.groups) left |= !group.empty();
  if (left) fail("a thread ended with copies under way");
  fiber.done = true;
  to_scheduler(true);
}

void prepare_fiber(Cluster& cluster, uint32_t rank, uint32_t t, uint32_t first_block) {
  const Shape& shape = cluster.launch->shape;
  Block& block = cluster.blocks[rank];
  Fiber& fiber = cluster.fibers[rank * shape.threads + t];
  fiber.here = {{t}, {first_block + rank}, {shape.threads}, {shape.blocks}, rank, shape.cluster, block.shared.get()};
  fiber.cluster = &cluster;
  fiber.block = &block;
  fiber.warp = &block.warps[t / kLanes];
  fiber.warp->barrier.size = kLanes;
  fiber.stack = take_stack();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

std::unique_ptr<Cluster> prepare(Launch& launch, uint32_t first_block) {
  const Shape& shape = launch.shape;
  auto cluster = std::make_unique<Cluster>();
  cluster->launch = &launch;
  cluster->barrier = {shape.cluster * shape.threads, 0, 0};
  cluster->blocks.resize(shape.cluster);
  cluster->left = shape.cluster * shape.threads;
  cluster->fibers.resize(cluster->left);
  cluster->warps.resize(cluster->left / kLanes);
  for (uint32_t rank = 0; rank < shape.cluster; ++rank) {
    Block& block = cluster->blocks[rank];
    block.barrier.size = shape.threads;
    block.warps.resize(shape.threads / kLanes);
    size_t bytes = (shape.shared + 127) / 128 * 128;
    block.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(128, std::max<size_t>(bytes, 128))));
    std::memset(block.shared.get(), 0xff, bytes);
    for (uint32_t t = 0; t < shape.threads; ++t) prepare_fiber(*cluster, rank, t, first_block);
  }
  for (size_t i = 0; i < cluster->fibers.size(); ++i) cluster->warps[i / kLanes].push_back(&cluster->fibers[i]);
  return cluster;
}

void finish(Cluster& cluster) {
  for (Block& block : cluster.blocks) {
    cluster.launch->allowing += !block.allows;
    for (auto& [place, barrier] : block.copy_barriers)
      if (!barrier.copies.empty()) throw std::runtime_error("a block ended with copies under way");
  }
  for (Fiber& fiber : cluster.fibers) free_stacks().push_back(fiber.stack);
}

// Resume the threads of one warp until none can go on; how many of them ended.
size_t run_warp(const std::vector<Fiber*>& lanes) {
  size_t ended = 0;
  for (bool moved = true; moved;) {
    moved = false;
    for (Fiber* fiber : lanes) {
      if (fiber->stands()) continue;
      fiber->waits_for = nullptr;
      simulation.resumed = moved = true;
      to_fiber(*fiber);
      if (!simulation.error.empty()) throw std::runtime_error(simulation.error);
      ended += fiber->done;
    }
  }
  return ended;
}

bool shuffled() { return device().order != 0; }

// Run one warp after another as far as it comes; whether any came further. The one that opens a barrier is then ahead
// of all others by as much as the kernel allows, which is what a missing barrier cannot stand.
bool run_cluster(Cluster& cluster) {
  bool moved = false;
  do {
    if (shuffled()) std::shuffle(cluster.warps.begin(), cluster.warps.end(), simulation.random);
    simulation.resumed = false;
    for (auto& lanes : cluster.warps) cluster.left -= run_warp(lanes);
    moved |= simulation.resumed;
  } while (cluster.left && simulation.resumed);
  return moved;
}

// Run a kernel's clusters one after another, each as far as it comes; whether any came further.
bool run_launch(Launch& launch) {
  bool moved = false;
  for (auto& cluster : launch.clusters) {
    if (!cluster && launch.begun < launch.order.size())
      cluster = prepare(launch, launch.order[launch.begun++] * launch.shape.cluster);
    if (!cluster) continue;
    moved |= run_cluster(*cluster);
    if (cluster->left) continue;
    finish(*cluster);
    cluster.reset();
    --launch.left;
  }
  if (!launch.left && !launch.over()) launch.ended.arrive();
  return moved;
}

Launch make_launch(const Shape& shape, bool overlap, std::function<void()> body) {
  if (!shape.threads || shape.threads % kLanes || shape.threads > 1024)
    throw std::runtime_error("a block must have whole warps and at most 1024 threads");
  if (!shape.blocks || shape.blocks % shape.cluster) throw std::runtime_error("a grid must be whole clusters");
  if (shape.shared > device().shared) throw std::runtime_error("a block asks for more shared memory than there is");
  Launch made;
  made.shape = shape;
  made.overlap = overlap;
  made.body = std::move(body);
  made.left = shape.blocks / shape.cluster;
  made.clusters.resize(made.left);
  for (uint32_t i = 0; i < made.left; ++i) made.order.push_back(i);
  if (shuffled()) std::shuffle(made.order.begin(), made.order.end(), simulation.random);
  return made;
}

// Whatever an error leaves behind is not for the next run.
struct Scope {
  ~Scope() {
    simulation.stream.clear();
    simulation.streaming = false;
    simulation.error.clear();
  }
};

// Of the kernels under way, the newest or any goes on where none can without it.
bool open_one(const std::vector<Launch*>& under_way) {
  std::vector<Launch*> closed;
  for (Launch* launch : under_way)
    if (launch->begun && launch->held.generation == 0) closed.push_back(launch);
  if (closed.empty()) return false;
  uint32_t order = device().order;
  size_t chosen = order % 2 ? closed.size() - 1 : order ? simulation.random() % closed.size() : 0;
  closed[chosen]->held.arrive();
  return true;
}

void run_stream() {
  for (size_t oldest = 0; oldest < simulation.stream.size();) {
    if (simulation.stream[oldest]->over()) {
      ++oldest;
      continue;
    }
    std::vector<Launch*> under_way;
    for (size_t i = oldest; i < std::min(oldest + 3, simulation.stream.size()); ++i)
      if (simulation.stream[i]->may_begin()) under_way.push_back(simulation.stream[i].get());
    bool moved = false;
    for (size_t i = under_way.size(); i-- > 0;) moved |= run_launch(*under_way[i]);
    if (!moved && !simulation.stream[oldest]->over() && !open_one(under_way))
      throw std::runtime_error("threads wait at a barrier that others never reach");
  }
}

CopyBarrier& copy_barrier(void* address) {
  auto& known = simulation.running->block->copy_barriers;
  auto found = known.find(address);
  if (found == known.end()) fail("there is no barrier for copies");
  return found->second;
}

void check_inside(const void* place, size_t bytes) {
  auto* from = static_cast<const unsigned char*>(place);
  const Fiber& fiber = *simulation.running;
  if (from < fiber.here.shared || from + bytes > fiber.here.shared + fiber.cluster->launch->shape.shared)
    fail("a copy goes outside shared memory");
}

}  // namespace

Device& device() {
  static Device pretended;
  return pretended;
}

const Here& here() { return simulation.running->here; }

void launch(const Shape& shape, bool overlap, std::function<void()> body) {
  if (simulation.streaming) {
    simulation.stream.push_back(std::make_unique<Launch>(make_launch(shape, overlap, std::move(body))));
    auto& all = simulation.stream;
    if (all.size() > 1) all.back()->before = all[all.size() - 2].get();
    return;
  }
  Scope scope;
  simulation.random.seed(device().order);
  Launch only = make_launch(shape, false, std::move(body));
  only.held.arrive();
  run_launch(only);
  if (!only.over()) throw std::runtime_error("threads wait at a barrier that others never reach");
}

void begin_stream() {
  simulation.random.seed(device().order);
  simulation.streaming = true;
}

void end_stream() {
  Scope scope;
  run_stream();
}

void block_barrier() { meet(simulation.running->block->barrier); }

void team_barrier(uint32_t number, uint32_t threads) {
  if (number < 1 || number > 15 || threads % kLanes) fail("no barrier of that number, or not of whole warps");
  Barrier& barrier = simulation.running->block->teams[number];
  if (barrier.arrived && barrier.size != threads) fail("threads disagree on who meets at a barrier");
  barrier.size = threads;
  meet(barrier);
}

void cluster_arrive() {
  Fiber& fiber = *simulation.running;
  fiber.cluster_seen = fiber.cluster->barrier.generation;
  fiber.cluster->barrier.arrive();
}

void cluster_wait() { pass(simulation.running->cluster->barrier, simulation.running->cluster_seen); }

void allow_next_kernel() {
  Fiber& fiber = *simulation.running;
  Launch& launch = *fiber.cluster->launch;
  launch.allowing += !fiber.block->allows;
  fiber.block->allows = true;
  pass(launch.held, 0);
}

void wait_for_previous_kernel() {
  const Launch* before = simulation.running->cluster->launch->before;
  if (before) pass(before->ended, 0);
}

uint64_t exchange(uint64_t value, uint32_t lane) {
  Fiber& fiber = *simulation.running;
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
  check_inside(shared, kPieceBytes);
  check_aligned(shared);
  check_aligned(global);
  std::memset(shared, 0xff, kPieceBytes);
  simulation.running->open.push_back({shared, global, kPieceBytes});
}

void commit_copies() {
  Fiber& fiber = *simulation.running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_for_copies(int groups_left) {
  Fiber& fiber = *simulation.running;
  while (fiber.groups.size() > static_cast<size_t>(groups_left)) {
    for (const Copy& copy : fiber.groups.front()) copy.carry_out();
    fiber.groups.pop_front();
  }
}

void make_copy_barrier(void* shared) {
  check_inside(shared, 8);
  if (reinterpret_cast<uintptr_t>(shared) % 8) fail("a barrier for copies is not aligned");
  simulation.running->block->copy_barriers[shared] = {};
}

void expect_bytes(void* barrier, uint32_t bytes) {
  CopyBarrier& found = copy_barrier(barrier);
  if (found.begun) fail("a turn of a barrier for copies is begun twice");
  found.begun = true;
  found.expected = bytes;
}

void copy_run(void* shared, const void* global, uint32_t bytes, void* barrier) {
  check_inside(shared, bytes);
  check_aligned(shared);
  check_aligned(global);
  if (bytes % kPieceBytes) fail("a copy is not of whole pieces");
  std::memset(shared, 0xff, bytes);
  CopyBarrier& found = copy_barrier(barrier);
  found.asked_for += bytes;
  found.copies.push_back({shared, global, bytes});
}

void wait_for_bytes(void* barrier, uint32_t parity) {
  CopyBarrier& found = copy_barrier(barrier);
  while (found.turn.generation % 2 == parity) {
    if (found.asked_for > found.expected && found.begun) fail("more bytes come than were expected");
    if (!found.begun || found.asked_for < found.expected) {
      pass(found.turn, found.turn.generation);
      continue;
    }
    for (const Copy& copy : found.copies) copy.carry_out();
    found.copies.clear();
    found.begun = false;
    found.asked_for = 0;
    found.turn.arrive();
  }
}

const void* remote(const void* own, uint32_t rank) {
  Fiber& fiber = *simulation.running;
  if (rank >= fiber.cluster->launch->shape.cluster) fail("no block of that rank in the cluster");
  auto offset = static_cast<const unsigned char*>(own) - fiber.here.shared;
  return fiber.cluster->blocks[rank].shared.get() + offset;
}

void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % kPieceBytes) fail("an access of 16 bytes is not aligned");
}

}  // namespace pyprune::simulator
