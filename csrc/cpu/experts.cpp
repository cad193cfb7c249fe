// The tokens of a step are sorted by expert, and each expert that has some is a call of an FFN of its own: its rows are
// read once for all of its tokens. The slabs of all experts are tasks that threads share, so that threads outnumbering
// the experts, or left with the last one, work on one expert together. A token's output is the sum of its experts'
// partials, weighted, in the order of the experts: neither threads nor the router's order change a bit.

#include "experts.h"

#include <cstring>
#include <vector>

#include "slabs.h"

namespace pyprune {
namespace {

// Most pairs of token and expert of one pass: their partials are held at once.
constexpr int64_t kMaxPairs = 2048;
// Slabs of all experts together are about as many, where experts have enough neurons.
constexpr int64_t kTasks = 64;

// The tokens of one expert, at most kMaxTokens of them.
struct Group {
  Call call;
  Workspace workspace;
  int64_t first;  // of its pairs, in the order by expert
  int64_t slabs;
  int64_t bytes;  // of packed tokens
};

struct Task {
  int64_t group, slab;
};

struct Sorted {
  std::vector<int64_t> pairs;   // pairs of the pass, by expert, then by token
  std::vector<int64_t> starts;  // [E + 1] where each expert's begin
};

Sorted by_expert(const RoutedCall& r) {
  int64_t count = r.call.tokens * r.picked;
  Sorted sorted{std::vector<int64_t>(count), std::vector<int64_t>(r.experts + 1)};
  for (int64_t i = 0; i < count; ++i) ++sorted.starts[r.index[i] + 1];
  for (int64_t e = 0; e < r.experts; ++e) sorted.starts[e + 1] += sorted.starts[e];
  std::vector<int64_t> next(sorted.starts.begin(), sorted.starts.end() - 1);
  for (int64_t i = 0; i < count; ++i) sorted.pairs[next[r.index[i]]++] = i;
  return sorted;
}

class Pass {
 public:
  Pass(const RoutedCall& routed, const Kernels& kernels, int64_t threads, ParallelFor parallel_for)
      : r_(routed),
        p_(routed.call),
        kernels_(kernels),
        threads_(threads),
        parallel_for_(parallel_for),
        padded_(padded_width(p_.weight_type, p_.hidden_size)),
        sorted_(by_expert(routed)) {
    add_groups();
    gather_tokens();
    place();
  }

  void run() {
    int64_t floats = int64_t(sorted_.pairs.size()) * padded_;
    spread(groups_.size(), floats, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g)
        kernels_.pack(groups_[g].call, groups_[g].workspace, 0, groups_[g].call.tokens);
    });
    if (!tasks_.empty()) {
      share_tasks(tasks_.size(), threads_, parallel_for_, [&](int64_t i) {
        const Group& g = groups_[tasks_[i].group];
        int64_t slab = tasks_[i].slab, neurons = g.call.neurons;
        kernels_.slab(g.call, g.workspace, slab_bound(neurons, g.slabs, slab), slab_bound(neurons, g.slabs, slab + 1),
                      g.workspace.partials + slab * g.workspace.rows * padded_);
      });
    }
    combine(floats);
  }

 private:
  template <class Body>
  void spread(int64_t items, int64_t floats, const Body& body) {
    if (items > 0) spread_items(items, floats < kAloneFloats ? 1 : threads_, parallel_for_, body);
  }

  void add_groups() {
    int64_t width = element_size(p_.weight_type) * r_.expert_stride;
    for (int64_t e = 0; e < r_.experts; ++e) {
      int64_t neurons = r_.counts ? r_.counts[e] : p_.neurons;
      for (int64_t first = sorted_.starts[e]; neurons > 0 && first < sorted_.starts[e + 1]; first += kMaxTokens) {
        Group g{p_, {}, first, 0, 0};
        g.call.neurons = neurons;
        if (p_.index) g.call.index = p_.index + e * p_.neurons;
        g.call.tokens = std::min(kMaxTokens, sorted_.starts[e + 1] - first);
        g.call.record = static_cast<const char*>(p_.record) + e * width;
        if (p_.scales) g.call.scales = p_.scales + e * p_.rows * p_.parts();
        groups_.push_back(g);
      }
    }
    int64_t most = groups_.empty() ? 0 : std::max<int64_t>(1, kTasks / int64_t(groups_.size()));
    for (size_t g = 0; g < groups_.size(); ++g) {
      groups_[g].slabs = std::min(count_slabs(groups_[g].call), most);
      for (int64_t slab = 0; slab < groups_[g].slabs; ++slab) tasks_.push_back({int64_t(g), slab});
    }
  }

  // Where x is read: of one token in place, of several from rows copied next to each other.
  void gather_tokens() {
    int64_t size = element_size(p_.x_type), row = p_.hidden_size * size, several = 0;
    for (const Group& g : groups_) several += g.call.tokens > 1 ? g.call.tokens : 0;
    gathered_.resize(several * row);
    char* out = gathered_.data();
    for (Group& g : groups_) {
      for (int64_t t = 0; t < g.call.tokens; ++t) {
        int64_t token = sorted_.pairs[g.first + t] / r_.picked;
        const char* from = static_cast<const char*>(p_.x) + token * p_.x_stride * size;
        if (t == 0) g.call.x = g.call.tokens > 1 ? out : from;
        if (g.call.tokens == 1) break;
        std::memcpy(out, from, row);
        out += row;
      }
      g.call.x_stride = p_.hidden_size;
    }
  }

  // Partials and packed tokens of all groups, each on lines of its own.
  void place() {
    static thread_local Scratch scratch;
    int64_t total = 0;
    for (Group& g : groups_) {
      Shape shape = kernels_.shape(g.call, padded_);
      g.workspace = {shape.form, padded_, shape.rows, nullptr, nullptr, shape.chunk};
      g.bytes = round_up(shape.bytes, kLineBytes);
      total += partials_bytes(g) + g.bytes;
    }
    char* memory = total ? static_cast<char*>(scratch.get(total)) : nullptr;
    for (Group& g : groups_) {
      g.workspace.partials = reinterpret_cast<float*>(memory);
      g.workspace.tokens = memory + partials_bytes(g);
      memory += partials_bytes(g) + g.bytes;
    }
  }

  int64_t partials_bytes(const Group& g) const {
    return round_up(g.slabs * g.workspace.rows * padded_ * int64_t{sizeof(float)}, kLineBytes);
  }

  void combine(int64_t floats) {
    // What each token was given, by expert: of pair i of a token the place [token * K + i].
    std::vector<Contribution> given(sorted_.pairs.size());
    std::vector<int64_t> counts(p_.tokens);
    for (const Group& g : groups_)
      for (int64_t t = 0; t < g.call.tokens; ++t) {
        int64_t pair = sorted_.pairs[g.first + t], token = pair / r_.picked;
        given[token * r_.picked + counts[token]++] = {&g.workspace, g.slabs, t,
                                                      static_cast<const float*>(r_.weights)[pair]};
      }
    int64_t pieces = finish_pieces(p_.hidden_size), row = p_.hidden_size * element_size(p_.x_type);
    spread(p_.tokens * pieces, floats, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t token = i / pieces, first = i % pieces * kFinishColumns;
        kernels_.combine(p_, given.data() + token * r_.picked, counts[token], first,
                         std::min(p_.hidden_size, first + kFinishColumns), static_cast<char*>(p_.out) + token * row);
      }
    });
  }

  const RoutedCall& r_;
  const Call& p_;
  const Kernels& kernels_;
  int64_t threads_;
  ParallelFor parallel_for_;
  int64_t padded_;
  Sorted sorted_;
  std::vector<Group> groups_;
  std::vector<Task> tasks_;
  std::vector<char> gathered_;
};

}  // namespace

void run_experts(const RoutedCall& routed, const Kernels& kernels, int64_t threads, ParallelFor parallel_for) {
  int64_t step = std::max<int64_t>(1, kMaxPairs / std::max<int64_t>(1, routed.picked));
  const Call& call = routed.call;
  int64_t size = element_size(call.x_type);
  for (int64_t first = 0; first < call.tokens; first += step) {
    RoutedCall part = routed;
    part.call.tokens = std::min(step, call.tokens - first);
    part.call.x = static_cast<const char*>(call.x) + first * call.x_stride * size;
    part.call.out = static_cast<char*>(call.out) + first * call.hidden_size * size;
    part.index += first * routed.picked;
    part.weights = static_cast<const float*>(routed.weights) + first * routed.picked;
    Pass(part, kernels, threads, parallel_for).run();
  }
}

}  // namespace pyprune
