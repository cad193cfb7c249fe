#include "experts.h"

#include <algorithm>

#include "form.h"

namespace pyprune {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(bool condition, const char* argument, const std::string& rule) {
  if (!condition) throw Refusal{argument, rule};
}

ExpertKernels kernels_of(Type weights, int32_t tokens, bool gated) {
  switch (weights) {
    case Type::f32:
      return expert_kernels_f32(tokens, gated);
    case Type::bf16:
      return expert_kernels_bf16(tokens, gated);
    case Type::f16:
      return expert_kernels_f16(tokens, gated);
    default:
      return expert_kernels_i8(tokens, gated);
  }
}

}  // namespace

ExpertPlan plan_experts(const ExpertSizes& s, const ExpertOptions& chosen, const Device& device) {
  int64_t pairs = s.tokens * s.picked, active = std::min(pairs, s.experts);
  require(pairs >= 1 && pairs <= kMostPairs, "x", "have 1 to " + std::to_string(kMostPairs) + " pairs of experts");
  require(s.hidden_size >= 1 && s.hidden_size <= kMostChannels, "x",
          "have a width of 1 to " + std::to_string(kMostChannels));
  require(s.neurons >= 0 && s.neurons < int64_t{1} << 31, "rows", "have fewer than 2^31 neurons");
  int32_t together = chosen.tokens;
  require(together == 0 || together == two_pass_tokens(together), "plan", "have 1, 4 or 8 tokens");
  require(chosen.blocks >= 0 && chosen.blocks <= 65536, "plan", "have 0 to 65536 blocks");
  require(chosen.splits >= 0 && chosen.splits <= 1024, "plan", "have 0 to 1024 splits");
  require(chosen.overlap != 1 || device.clusters, "plan", "not overlap on this device");

  ExpertPlan plan{};
  // Half as many again as an expert has on average, so that most experts are read once; of one token none is named
  // twice.
  plan.tokens = together        ? together
                : s.tokens == 1 ? 1
                                : two_pass_tokens(std::max<int64_t>(2, divide_up(3 * pairs, 2 * s.experts)));
  plan.evict_first = chosen.evict_first != 0;
  plan.overlap = chosen.overlap < 0 ? device.clusters : chosen.overlap == 1;

  // Enough warps to fill every multiprocessor, and as many neurons for each as for the others.
  int64_t neurons = std::max<int64_t>(1, s.neurons);
  int64_t wanted = divide_up(device.processors * std::max(2, two_pass_blocks(s.weights, plan.tokens)), active);
  int64_t each = divide_up(neurons, std::min(wanted, divide_up(neurons, kTwoPassWarps)) * kTwoPassWarps);
  plan.blocks = static_cast<int32_t>(chosen.blocks ? chosen.blocks : divide_up(neurons, each * kTwoPassWarps));

  int64_t tiles = divide_up(s.hidden_size, tile_channels(s.weights)), named = std::min(s.picked, s.experts);
  // A split of fewer than 32 neurons would be over before it has loads under way.
  int64_t splits = std::min(divide_up(device.processors * 2, tiles * named), std::max<int64_t>(1, s.neurons / 32));
  plan.splits = static_cast<int32_t>(chosen.splits ? chosen.splits : splits);

  auto grid = [&](int64_t blocks, uint32_t shared) {
    return Grid{static_cast<uint32_t>(blocks), kTwoPassThreads, 1, shared, plan.overlap};
  };
  plan.hidden = grid(pairs * plan.blocks, kFindBytes);
  plan.down = grid(pairs * tiles * plan.splits,
                   kFindBytes + kTwoPassWarps * static_cast<uint32_t>(tile_channels(s.weights)) * 4);
  plan.combine = grid(s.tokens * divide_up(s.hidden_size, kCombineChannels), 0);
  return plan;
}

std::string describe(const ExpertPlan& plan) {
  std::string text = "{\"tokens\": " + std::to_string(plan.tokens);
  auto put = [&](const char* name, int64_t value) {
    text += ", \"" + std::string(name) + "\": " + std::to_string(value);
  };
  put("blocks", plan.blocks);
  put("splits", plan.splits);
  put("evict_first", plan.evict_first);
  put("overlap", plan.overlap);
  return text + "}";
}

Failure run_experts(const RoutedCall& routed, const ExpertOptions& chosen, const Device& device, const Memory& memory,
                    Stream stream) {
  const Call& p = routed.call;
  ExpertPlan plan = plan_experts(
      {p.tokens, routed.picked, routed.experts, p.hidden_size, p.neurons, p.gated, p.weight_type}, chosen, device);
  int64_t pairs = p.tokens * routed.picked;

  ExpertParams params{};
  Params& base = params.base;
  base.call = p;
  base.rounds_to = rounds_to(p);
  base.aligned = aligned(p) && (routed.experts == 1 || on_16_bytes(p.record, routed.expert_stride, p.weight_type));
  base.x = p.x;
  base.x_stride = p.x_stride;
  base.x_form = p.x_type;
  base.evict_first = plan.evict_first;
  params.expert_stride = routed.expert_stride;
  params.experts = routed.experts;
  params.picked = static_cast<int32_t>(routed.picked);
  params.pairs = static_cast<int32_t>(pairs);
  params.index = routed.index;
  params.weights = routed.weights;
  params.weights_type = routed.weights_type;
  params.counts = routed.counts;
  params.blocks = plan.blocks;
  params.splits = plan.splits;

  Carver carver;
  int64_t partials = carver.take(plan.splits * pairs * padded(p) * 4);
  int64_t hidden = carver.take(pairs * p.neurons * 4);
  bool widening = needs_widening(p);
  int64_t wide = carver.take(widening ? p.tokens * padded(p) * 4 : 0);
  auto* scratch = static_cast<unsigned char*>(memory.allocate(memory.context, carver.size()));
  base.partials = reinterpret_cast<float*>(scratch + partials);
  base.hidden = reinterpret_cast<float*>(scratch + hidden);
  if (widening) {
    auto* out = reinterpret_cast<float*>(scratch + wide);
    if (auto f = start_widen({p.x, p.x_type, p.x_stride, p.tokens, p.hidden_size, out, padded(p)}, stream)) return f;
    base.x = out;
    base.x_stride = padded(p);
    base.x_form = Type::f32;
  }
  ExpertKernels compiled = kernels_of(p.weight_type, plan.tokens, p.gated);
  if (auto f = start(compiled.hidden, plan.hidden, params, stream)) return f;
  if (auto f = start(compiled.down, plan.down, params, stream)) return f;
  return start_combine(params, plan.combine, stream);
}

}  // namespace pyprune
