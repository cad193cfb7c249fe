// The simulator for tests: the kernels' own code on tensors of the CPU, in buffers that hold NaN.

#include <algorithm>
#include <memory>

#include "../compute_experts.h"

namespace pyprune {
namespace {

// Tensors of the CPU, taken as those of a device are.
constexpr Place kSimulated{false, -1, false};

// Scratch memory and tickets of calls on one stream: each gets what those before it have left.
class Session {
 public:
  void next_call() { next_ = 0; }

  Memory memory() {
    return {[](void* self, int64_t bytes) { return static_cast<Session*>(self)->allocate(bytes); },
            [](void* self, int32_t count) { return static_cast<Session*>(self)->take_tickets(count); }, this};
  }

  size_t allocations() const { return held_.size(); }

  bool tickets_are_zero() const {
    return std::all_of(tickets_.begin(), tickets_.end(), [](uint32_t n) { return n == 0; });
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };

  void* allocate(int64_t bytes) {
    auto size = static_cast<size_t>(bytes);
    if (next_ < held_.size() && held_[next_].second >= size) return held_[next_++].first.get();
    std::unique_ptr<void, Free> made(std::aligned_alloc(256, size));
    std::memset(made.get(), 0xff, size);
    auto place = held_.emplace(held_.begin() + static_cast<std::ptrdiff_t>(next_++), std::move(made), size);
    return place->first.get();
  }

  // Those of one call are those of all: tickets belong to the stream.
  uint32_t* take_tickets(int32_t count) {
    check(static_cast<size_t>(count) <= tickets_.size(), "plan", "count on fewer tickets");
    return tickets_.data();
  }

  size_t next_ = 0;
  std::vector<std::pair<std::unique_ptr<void, Free>, size_t>> held_;
  std::vector<uint32_t> tickets_ = std::vector<uint32_t>(kMostChannels / 128, 0u);
};

// A last chunk, of fewer tokens, may be planned otherwise and need more.
void check_chunks(const Session& session) {
  STD_TORCH_CHECK(session.allocations() <= 2, "chunks took scratch memory ", session.allocations(), " times");
}

// `numbers` are [processors, bytes of shared memory, clusters or not, seed of the order of execution].
Device pretended(const std::vector<int64_t>& numbers) {
  check(numbers.size() == 4, "device", "have four numbers");
  auto processors = static_cast<int32_t>(numbers[0]);
  auto shared = static_cast<uint32_t>(numbers[1]);
  simulator::device() = {processors, shared, static_cast<uint32_t>(numbers[3])};
  return {0, processors, shared, numbers[2] != 0};
}

Tensor ffn_simulated(const Given& given, const std::vector<int64_t>& plan, const std::vector<int64_t>& device) {
  Device as = pretended(device);
  Session session;
  Tensor out = compute(kSimulated, given, plan, as, session.memory(), nullptr);
  check_chunks(session);
  STD_TORCH_CHECK(session.tickets_are_zero(), "tickets were left behind");
  return out;
}

// Experts: kernel after kernel, and again as a stream, where they overlap.
Tensor moe_simulated(const Tensor& x, const Tensor& rows, const Maybe& scales, const Maybe& kept, const Maybe& counts,
                     const Tensor& index, const Tensor& weights, bool gated, const std::string& activation,
                     const std::vector<int64_t>& plan, const std::vector<int64_t>& device) {
  Device as = pretended(device);
  Session session, another;
  RoutedOperands operands(kSimulated, x, rows, scales, kept, counts, index, weights, gated, activation);
  Tensor out = compute_experts(operands, x, plan, as, session.memory(), nullptr);
  simulator::begin_stream();
  Tensor again = compute_experts(operands, x, plan, as, another.memory(), nullptr);
  simulator::end_stream();
  check_chunks(another);
  auto bytes = static_cast<size_t>(out.numel()) * out.element_size();
  check(std::memcmp(out.const_data_ptr(), again.const_data_ptr(), bytes) == 0, "kernels", "give the same bits twice");
  return out;
}

// Two layers in turn, `calls` in all, each on what the one before gives: one call after another, or as a stream, where
// kernels that overlap do.
Tensor ffn_chain_simulated(const Tensor& x, const Tensor& first, const Tensor& second, const Maybe& index, bool gated,
                           const std::string& activation, int64_t calls, bool as_stream,
                           const std::vector<int64_t>& plan, const std::vector<int64_t>& device) {
  Device as = pretended(device);
  Session session;
  std::vector<Tensor> given{x};
  if (as_stream) simulator::begin_stream();
  for (int64_t i = 0; i < calls; ++i) {
    session.next_call();
    Given layer{given.back(), i % 2 ? second : first, index, {}, {}, {}, gated, activation};
    given.push_back(compute(kSimulated, layer, plan, as, session.memory(), nullptr));
    Tensor& out = given.back();
    if (as_stream) std::memset(out.mutable_data_ptr(), 0xff, static_cast<size_t>(out.numel()) * out.element_size());
  }
  if (as_stream) simulator::end_stream();
  STD_TORCH_CHECK(session.tickets_are_zero(), "tickets were left behind");
  return given.back();
}

// The plan for these sizes, as JSON; `device` as above.
std::string plan_simulated(int64_t tokens, int64_t hidden_size, int64_t neurons, bool gated, bool indexed,
                           const std::string& weights, const std::vector<int64_t>& plan,
                           const std::vector<int64_t>& device) {
  return describe_plan({tokens, hidden_size, neurons, gated, indexed, type_named(weights),
                        hidden_size * bytes_of(type_named(weights)) % 16 == 0},
                       plan, pretended(device));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyprune, m) {
  m.def("ffn_simulated(" PYPRUNE_OPERANDS ", int[] plan, int[] device) -> Tensor");
  m.def("moe_simulated(" PYPRUNE_ROUTED ", int[] plan, int[] device) -> Tensor");
  m.def(
      "ffn_chain_simulated(Tensor x, Tensor first, Tensor second, Tensor? index, bool gated, str activation, int "
      "calls, "
      "bool as_stream, int[] plan, int[] device) -> Tensor");
  m.def(
      "plan_simulated(int tokens, int hidden_size, int neurons, bool gated, bool indexed, str "
      "weights, "
      "int[] plan, int[] device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("ffn_simulated", &Boxed<&ffn_simulated>::call);
  m.impl("moe_simulated", TORCH_BOX(&moe_simulated));
  m.impl("ffn_chain_simulated", TORCH_BOX(&ffn_chain_simulated));
}
STABLE_TORCH_LIBRARY_IMPL(pyprune, CompositeExplicitAutograd, m) {
  m.impl("plan_simulated", TORCH_BOX(&plan_simulated));
}

}  // namespace pyprune
