#include "run.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>

#include "form.h"
#include "kernels.h"

namespace pyprune {
namespace {

Sizes sizes_of(const Call& p) {
  return {p.tokens, p.hidden_size, p.neurons, p.gated, p.index != nullptr, p.weight_type, aligned(p)};
}

Params params_of(const Call& p, const Plan& plan) {
  Params params{};
  params.call = p;
  params.row_bytes = static_cast<uint32_t>(p.record_stride * bytes_of(p.weight_type));
  params.rounds_to = rounds_to(p);
  params.aligned = aligned(p);
  params.x = p.x;
  params.x_stride = p.x_stride;
  params.x_form = p.x_type;
  params.teams = plan.teams;
  params.step = plan.step;
  params.stages = plan.stages;
  params.groups = plan.groups;
  params.share = plan.share;
  params.evict_first = plan.evict_first;
  params.early = plan.early;
  return params;
}

Plan plan_of(const Call& call, const PlanOptions& chosen, const Device& device) {
  // Asking the device how many clusters it runs takes longer than the kernels of a small layer.
  static std::mutex mutex;
  static std::map<std::array<int64_t, 11 + kPlanOptions>, Plan> known;
  Sizes s = sizes_of(call);
  std::array<int64_t, 11 + kPlanOptions> key{
      device.index,      s.tokens,      s.hidden_size,   s.neurons, s.gated, s.indexed, static_cast<int64_t>(s.weights),
      device.processors, device.shared, device.clusters, s.aligned};
  const int32_t choices[] = {chosen.algorithm, chosen.blocks, chosen.cluster, chosen.teams,
                             chosen.step,      chosen.stages, chosen.splits,  chosen.evict_first,
                             chosen.overlap,   chosen.early,  chosen.bulk};
  static_assert(std::size(choices) == kPlanOptions, "every choice is part of the key");
  std::copy(std::begin(choices), std::end(choices), key.begin() + 11);
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(key);
  if (found == known.end()) found = known.emplace(key, make_plan(s, chosen, device, running)).first;
  return found->second;
}

}  // namespace

int running(const Sizes& sizes, const Plan& plan) {
  Kernels compiled = kernels(sizes.weights, plan.tokens, sizes.gated);
  return running_clusters(plan.bulk ? compiled.single_pass_bulk : compiled.single_pass, plan.single);
}

Failure run(const Call& call, const PlanOptions& chosen, const Device& device, const Memory& memory, Stream stream) {
  if (call.record_stride * bytes_of(call.weight_type) > UINT32_MAX)
    throw Refusal{"record", "have rows less than 2^32 bytes apart"};
  Plan plan = plan_of(call, chosen, device);
  Params params = params_of(call, plan);
  const Call& p = params.call;
  bool single = plan.algorithm == Algorithm::single_pass;

  Carver carver;
  int64_t partials = carver.take(plan.groups * p.tokens * padded(p) * 4);
  int64_t hidden = carver.take(single ? 0 : p.neurons * plan.tokens * 4);
  bool widening = needs_widening(p);
  int64_t wide = carver.take(widening ? p.tokens * padded(p) * 4 : 0);
  auto* scratch = static_cast<unsigned char*>(memory.allocate(memory.context, carver.size()));
  params.partials = reinterpret_cast<float*>(scratch + partials);
  params.hidden = reinterpret_cast<float*>(scratch + hidden);
  params.tickets = memory.tickets(memory.context, plan.tickets);

  if (widening) {
    auto* out = reinterpret_cast<float*>(scratch + wide);
    if (auto f = start_widen({p.x, p.x_type, p.x_stride, p.tokens, p.hidden_size, out, padded(p)}, stream)) return f;
    params.x = out;
    params.x_stride = padded(p);
    params.x_form = Type::f32;
  }
  Kernels compiled = kernels(p.weight_type, plan.tokens, p.gated);
  if (single) return start(plan.bulk ? compiled.single_pass_bulk : compiled.single_pass, plan.single, params, stream);
  if (auto f = start(compiled.hidden_pass, plan.hidden, params, stream)) return f;
  return start(compiled.down_pass, plan.down, params, stream);
}

}  // namespace pyprune
