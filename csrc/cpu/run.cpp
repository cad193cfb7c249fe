#include "run.h"

#include <numeric>
#include <vector>

#include "slabs.h"

namespace pyprune {
namespace {

// At most kMaxTokens tokens: one pass over the weights.
void run_pass(const Call& p, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  static thread_local Scratch scratch;
  int64_t padded = padded_width(p.weight_type, p.hidden_size);
  int64_t slabs = p.neurons == 0 ? 0 : count_slabs(p);
  Shape shape = kernels.shape(p, padded);
  int64_t size = shape.rows * padded;
  int64_t partials = round_up(std::max<int64_t>(slabs, 1) * size * sizeof(float), kLineBytes);
  char* memory = static_cast<char*>(scratch.get(partials + shape.bytes));
  Workspace workspace{shape.form, padded, shape.rows, memory + partials, reinterpret_cast<float*>(memory), shape.chunk};
  threads = std::max<int64_t>(1, std::min(threads, slabs));
  auto spread = [&](int64_t items, int64_t floats, auto body) {
    spread_items(items, floats < kAloneFloats ? 1 : threads, parallel_for, body);
  };
  if (slabs == 0) {
    std::fill(workspace.partials, workspace.partials + size, 0.0f);
    slabs = 1;
  } else {
    spread(p.tokens, p.tokens * padded, [&](int64_t first, int64_t last) { kernels.pack(p, workspace, first, last); });
    share_tasks(slabs, threads, parallel_for, [&](int64_t slab) {
      kernels.slab(p, workspace, slab_bound(p.neurons, slabs, slab), slab_bound(p.neurons, slabs, slab + 1),
                   workspace.partials + slab * size);
    });
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
