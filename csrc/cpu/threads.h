// Work shared by threads, and the memory that each keeps.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace pyprune {

// Run body(context, chunk) for every chunk in [0, chunks), on as many threads as there are chunks where possible.
using ParallelFor = void (*)(int64_t chunks, void (*body)(void* context, int64_t chunk), void* context);

constexpr int64_t round_up(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }

// Work on fewer floats than this is done before other threads would have started.
constexpr int64_t kAloneFloats = 16 << 10;

// Memory that a thread keeps from call to call, aligned to cache lines.
class Scratch {
 public:
  void* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(std::aligned_alloc(kLineBytes, round_up(bytes, kLineBytes)));
      size_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// body(first, last) for parts of [0, items), one a thread.
template <class Body>
void spread_items(int64_t items, int64_t threads, ParallelFor parallel_for, const Body& body) {
  struct Context {
    int64_t items, threads;
    const Body& body;
  } context{items, std::min(items, threads), body};
  auto run_part = [](void* pointer, int64_t thread) {
    auto& c = *static_cast<Context*>(pointer);
    c.body(c.items * thread / c.threads, c.items * (thread + 1) / c.threads);
  };
  parallel_for(context.threads, run_part, &context);
}

constexpr int64_t kMaxThreads = 64;

// body(task) for every task in [0, tasks). Each thread takes a range of its own, whose weights lie next to each other
// in memory, then what others have left.
template <class Body>
void share_tasks(int64_t tasks, int64_t threads, ParallelFor parallel_for, const Body& body) {
  struct alignas(kLineBytes) Counter {
    std::atomic<int64_t> next;
  };
  struct Job {
    int64_t tasks, threads;
    const Body& body;
    Counter counters[kMaxThreads];

    int64_t range(int64_t thread) const { return tasks * thread / threads; }
  } job{tasks, std::max<int64_t>(1, std::min({threads, tasks, kMaxThreads})), body, {}};
  for (int64_t t = 0; t < job.threads; ++t) job.counters[t].next.store(job.range(t), std::memory_order_relaxed);
  auto work = [](void* pointer, int64_t thread) {
    auto& j = *static_cast<Job*>(pointer);
    for (int64_t i = 0; i < j.threads; ++i) {
      int64_t owner = (thread + i) % j.threads;
      for (;;) {
        int64_t task = j.counters[owner].next.fetch_add(1, std::memory_order_relaxed);
        if (task >= j.range(owner + 1)) break;
        j.body(task);
      }
    }
  };
  parallel_for(job.threads, work, &job);
}

}  // namespace pyprune
