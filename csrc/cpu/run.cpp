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
// Bounds of slabs are multiples of this, so that only the last group of neurons can be a partial one.
constexpr int64_t kSlabNeurons = 32;

int64_t round_up(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }

// How many slabs. Enough of them to keep threads busy, each large enough that its partial result does not count, and
// eights where there are many, so that the usual numbers of threads share them evenly. Not a function of the threads.
int64_t count_slabs(const Problem& p) {
  int64_t bytes = p.neurons * p.parts() * p.hidden_size * element_size(p.weight_type);
  // The partials of many tokens are large beside the weights.
  int64_t most = p.tokens <= 4 ? kMaxSlabs : p.tokens <= 16 ? kMaxSlabs / 2 : kMaxSlabs / 4;
  int64_t wanted = std::min({most, bytes / kSlabBytes, round_up(p.neurons, kSlabNeurons) / kSlabNeurons});
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
  const Problem& problem;
  const Kernels& kernels;
  Workspace workspace;
  int64_t slabs;
  int64_t threads;
  Counter counters[kMaxThreads];

  int64_t bound(int64_t slab) const {
    return slab == slabs ? problem.neurons : problem.neurons * slab / slabs / kSlabNeurons * kSlabNeurons;
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
        kernels.slab(problem, workspace, bound(slab), bound(slab + 1), workspace.partials + slab * size);
      }
    }
  }
};

// At most kMaxTokens tokens: one pass over the weights.
void run_pass(const Problem& p, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  static thread_local Scratch scratch;
  int64_t padded = round_up(p.hidden_size, line(p.weight_type));
  int64_t slabs = p.neurons == 0 ? 0 : count_slabs(p);
  Shape shape = kernels.shape(p, padded);
  int64_t size = shape.rows * padded;
  int64_t partials = std::max<int64_t>(slabs, 1);
  float* memory = static_cast<float*>(scratch.get((1 + partials) * size * sizeof(float) + shape.bf16 * 2));
  auto* bf16 = shape.bf16 > 0 ? reinterpret_cast<uint16_t*>(memory + (1 + partials) * size) : nullptr;
  threads = std::max<int64_t>(1, std::min(threads, slabs));
  Job job{p, kernels, {padded, shape.rows, memory, bf16, memory + size}, slabs, threads, {}};
  for (int64_t t = 0; t < threads; ++t) job.counters[t].next.store(job.range(t), std::memory_order_relaxed);
  if (slabs == 0) {
    std::fill(job.workspace.partials, job.workspace.partials + size, 0.0f);
    slabs = 1;
  } else {
    kernels.pack(p, job.workspace, 0, p.tokens);
    parallel_for(threads, [](void* context, int64_t thread) { static_cast<Job*>(context)->work(thread); }, &job);
  }
  kernels.finish(p, job.workspace, slabs, 0, p.hidden_size);
}

}  // namespace

void run(const Problem& problem, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  for (int64_t first = 0; first < problem.tokens; first += kMaxTokens) {
    Problem part = problem;
    part.tokens = std::min(kMaxTokens, problem.tokens - first);
    int64_t size = element_size(problem.x_type);
    int64_t row = problem.hidden_size * size;
    part.x = static_cast<const char*>(problem.x) + first * problem.x_stride * size;
    part.out = static_cast<char*>(problem.out) + first * row;
    if (problem.residual) part.residual = static_cast<const char*>(problem.residual) + first * row;
    run_pass(part, kernels, threads, parallel_for);
  }
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
