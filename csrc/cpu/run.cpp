#include "run.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

namespace pyprune {
namespace {

constexpr int64_t kMaxSlabs = 32;
constexpr int64_t kSlabBytes = 192 << 10;
// Of narrow layers a slab takes fewer bytes: each neuron adds a rounding to its sums.
constexpr int64_t kSlabMaxNeurons = 1024;
// Bounds of slabs are multiples of this, so that only the last group of neurons can be a partial one.
constexpr int64_t kSlabNeurons = 32;

// Work on fewer floats than this is done before other threads would have started.
constexpr int64_t kAloneFloats = 16 << 10;

int64_t round_up(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }

// How many slabs. Enough of them to keep threads busy, each large enough that its partial result does not count, and
// eights where there are many, so that the usual numbers of threads share them evenly. Not a function of the threads.
int64_t count_slabs(const Call& p) {
  int64_t bytes = p.neurons * p.parts() * p.part() * element_size(p.weight_type);
  // The partials of many tokens are large beside the weights.
  int64_t most = p.tokens <= 4 ? kMaxSlabs : p.tokens <= 16 ? kMaxSlabs / 2 : kMaxSlabs / 4;
  int64_t wanted = std::min({most, std::max(bytes / kSlabBytes, p.neurons / kSlabMaxNeurons),
                             round_up(p.neurons, kSlabNeurons) / kSlabNeurons});
  if (wanted >= 8) return wanted / 8 * 8;
  return wanted >= 4 ? 4 : wanted >= 2 ? 2 : 1;
}

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

struct alignas(kLineBytes) Counter {
  std::atomic<int64_t> next;
};

constexpr int64_t kMaxThreads = kMaxSlabs;

struct Job {
  const Call& call;
  const Kernels& kernels;
  Workspace workspace;
  int64_t slabs;
  int64_t threads;
  Counter counters[kMaxThreads];

  int64_t bound(int64_t slab) const {
    return slab == slabs ? call.neurons : call.neurons * slab / slabs / kSlabNeurons * kSlabNeurons;
  }
  int64_t range(int64_t thread) const { return slabs * thread / threads; }

  // Each thread takes its own range of slabs, which lie next to each other in memory, then what others have left.
  void work(int64_t thread) {
    int64_t size = workspace.rows * workspace.padded;
    for (int64_t i = 0; i < threads; ++i) {
      int64_t owner = (thread + i) % threads;
      for (;;) {
        int64_t slab = counters[owner].next.fetch_add(1, std::memory_order_relaxed);
        if (slab >= range(owner + 1)) break;
        kernels.slab(call, workspace, bound(slab), bound(slab + 1), workspace.partials + slab * size);
      }
    }
  }
};

// body(first, last) for parts of [0, items).
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

// At most kMaxTokens tokens: one pass over the weights.
void run_pass(const Call& p, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  static thread_local Scratch scratch;
  int64_t padded = round_up(p.hidden_size, line(p.weight_type));
  int64_t slabs = p.neurons == 0 ? 0 : count_slabs(p);
  Shape shape = kernels.shape(p, padded);
  int64_t size = shape.rows * padded;
  int64_t partials = round_up(std::max<int64_t>(slabs, 1) * size * sizeof(float), kLineBytes);
  char* memory = static_cast<char*>(scratch.get(partials + shape.bytes));
  Workspace workspace{shape.form, padded, shape.rows, memory + partials, reinterpret_cast<float*>(memory)};
  threads = std::max<int64_t>(1, std::min(threads, slabs));
  Job job{p, kernels, workspace, slabs, threads, {}};
  for (int64_t t = 0; t < threads; ++t) job.counters[t].next.store(job.range(t), std::memory_order_relaxed);
  auto spread = [&](int64_t items, int64_t floats, auto body) {
    spread_items(items, floats < kAloneFloats ? 1 : threads, parallel_for, body);
  };
  if (slabs == 0) {
    std::fill(workspace.partials, workspace.partials + size, 0.0f);
    slabs = 1;
  } else {
    spread(p.tokens, p.tokens * padded, [&](int64_t first, int64_t last) { kernels.pack(p, workspace, first, last); });
    parallel_for(threads, [](void* context, int64_t thread) { static_cast<Job*>(context)->work(thread); }, &job);
  }
  spread(p.tokens * finish_pieces(p.hidden_size), slabs * size,
         [&](int64_t first, int64_t last) { kernels.finish(p, workspace, slabs, first, last); });
}

}  // namespace

void run(const Call& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  for (int64_t first = 0; first < call.tokens; first += kMaxTokens) {
    Call part = call;
    part.tokens = std::min(kMaxTokens, call.tokens - first);
    int64_t size = element_size(call.x_type);
    int64_t row = call.hidden_size * size;
    part.x = static_cast<const char*>(call.x) + first * call.x_stride * size;
    part.out = static_cast<char*>(call.out) + first * row;
    run_pass(part, kernels, threads, parallel_for);
  }
}

void write_out(const Call& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  if (call.rows == 0) return;
  spread_items(call.rows, std::max<int64_t>(1, threads), parallel_for,
               [&](int64_t first, int64_t last) { kernels.write_out(call, first, last); });
}

double read(const float* values, int64_t count, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  struct Reading {
    const float* values;
    int64_t count;
    const Kernels& kernels;
    int64_t threads;
    std::vector<double> sums;
  } reading{values, count, kernels, threads, std::vector<double>(threads)};
  auto body = [](void* context, int64_t thread) {
    auto& r = *static_cast<Reading*>(context);
    int64_t first = r.count * thread / r.threads;
    r.sums[thread] = r.kernels.read(r.values + first, r.count * (thread + 1) / r.threads - first);
  };
  parallel_for(threads, body, &reading);
  return std::accumulate(reading.sums.begin(), reading.sums.end(), 0.0);
}

}  // namespace pyprune
