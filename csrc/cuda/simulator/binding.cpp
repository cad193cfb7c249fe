// The simulator for tests: the kernels' own code on tensors of the CPU, in buffers that hold NaN.

#include <memory>

#include "../call.h"

namespace pyprune {
namespace {

// Scratch memory and tickets of one call.
class Session {
 public:
  Memory memory() {
    return {[](void* self, int64_t bytes) { return static_cast<Session*>(self)->allocate(bytes); },
            [](void* self, int32_t count) { return static_cast<Session*>(self)->take_tickets(count); }, this};
  }

  bool tickets_are_zero() const {
    for (auto& t : tickets_)
      for (uint32_t n : t)
        if (n) return false;
    return true;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };

  void* allocate(int64_t bytes) {
    auto size = static_cast<size_t>(bytes);
    held_.emplace_back(std::aligned_alloc(256, size));
    return std::memset(held_.back().get(), 0xff, size);
  }

  uint32_t* take_tickets(int32_t count) {
    tickets_.emplace_back(static_cast<size_t>(count), 0u);
    return tickets_.back().data();
  }

  std::vector<std::unique_ptr<void, Free>> held_;
  std::vector<std::vector<uint32_t>> tickets_;
};

// `numbers` are [processors, bytes of shared memory, clusters or not, seed of the order of execution].
Device pretended(const std::vector<int64_t>& numbers) {
  check(numbers.size() == 4, "device", "have four numbers");
  auto processors = static_cast<int32_t>(numbers[0]);
  auto shared = static_cast<uint32_t>(numbers[1]);
  simulator::device() = {processors, shared, static_cast<uint32_t>(numbers[3])};
  return {processors, shared, numbers[2] != 0};
}

Tensor ffn_simulated(const Tensor& x, const Tensor& record, const Maybe& index, const Maybe& count, const Maybe& scales,
                     const Maybe& neuron_bias, const Maybe& down_bias, const Maybe& residual, bool gated,
                     const std::string& activation, const std::vector<int64_t>& plan,
                     const std::vector<int64_t>& device) {
  Device as = pretended(device);
  Session session;
  Tensor out = compute(Place::cpu, x, record, index, count, scales, neuron_bias, down_bias, residual, gated, activation,
                       plan, as, session.memory(), nullptr);
  STD_TORCH_CHECK(session.tickets_are_zero(), "tickets were left behind");
  return out;
}

// The plan for these sizes, as JSON; `device` as above.
std::string plan_simulated(int64_t tokens, int64_t hidden_size, int64_t neurons, bool gated, bool indexed,
                           bool contextual, const std::string& weights, const std::vector<int64_t>& plan,
                           const std::vector<int64_t>& device) {
  return describe_plan({tokens, hidden_size, neurons, gated, indexed, contextual, type_named(weights),
                        hidden_size * bytes_of(type_named(weights)) % 16 == 0},
                       plan, pretended(device));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyprune, m) {
  m.def(
      "ffn_simulated(Tensor x, Tensor record, Tensor? index, Tensor? count, Tensor? scales, Tensor? neuron_bias, "
      "Tensor? down_bias, Tensor? residual, bool gated, str activation, int[] plan, int[] device) -> Tensor");
  m.def(
      "plan_simulated(int tokens, int hidden_size, int neurons, bool gated, bool indexed, bool contextual, str "
      "weights, "
      "int[] plan, int[] device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) { m.impl("ffn_simulated", TORCH_BOX(&ffn_simulated)); }
STABLE_TORCH_LIBRARY_IMPL(pyprune, CompositeExplicitAutograd, m) {
  m.impl("plan_simulated", TORCH_BOX(&plan_simulated));
}

}  // namespace pyprune
