#include "plan.h"

#include <algorithm>
#include <utility>

#include "layout.h"

namespace pyprune {
namespace {

// Threads of a team for whose layers two passes are faster, where both can be.
constexpr uint32_t kNarrow = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(bool condition, const char* argument, const std::string& rule) {
  if (!condition) throw Refusal{argument, rule};
}

// A fixed sequence of sums needs a fixed number of splits: all of these depend on D, K and the device, never on tokens.

// Blocks of the single pass: one for each multiprocessor, or fewer where there are fewer neurons. A block keeps enough
// copies under way for its multiprocessor, and every block more is a partial more.
struct SinglePassPlanner {
  const Sizes& sizes;
  const PlanOptions& chosen;
  const Device& device;
  Plan& plan;

  int parts() const { return sizes.gated ? 3 : 2; }

  // Of one team.
  uint32_t threads() const {
    return up_to_multiple(static_cast<uint32_t>(divide_up(sizes.hidden_size, kChannels)), kWarp);
  }

  uint32_t bytes(int step, int stages) const { return layout(plan.teams, step, stages, plan.share).bytes; }

  SinglePassLayout layout(int teams, int step, int stages, int32_t share) const {
    return single_pass_layout(sizes.weights, plan.tokens, parts(), threads(), teams, step, stages, share, plan.bulk,
                              static_cast<uint32_t>(sizes.hidden_size));
  }

  std::string why_not() const {
    uint32_t most = static_cast<uint32_t>(most_threads(plan.tokens));
    if (!sizes.aligned) return "rows of the record do not begin on 16 bytes, or do not hold whole pieces of 16 bytes";
    if (most == 0) return "registers do not hold the sums of more than four tokens";
    if (threads() > most)
      return "its sums of " + std::to_string(plan.tokens) + " tokens need " + std::to_string(threads()) +
             " threads, and registers are enough for " + std::to_string(most);
    if (layout(1, 1, 2, 0).bytes > device.shared) return "two neurons do not fit in shared memory";
    return "";
  }

  // Two teams of a wide layer: while one waits, for its barrier or for a chain of sums, the other computes. One alone
  // of eight warps left an H200's schedulers idle two thirds of the time. Narrow layers: eight warps.
  void choose_teams() {
    int most = static_cast<int>(std::min<uint32_t>(static_cast<uint32_t>(most_threads(plan.tokens)) / threads(), 15));
    int wanted = std::max(2, static_cast<int>(256 / threads()));
    if (layout(2, 1, 2, 0).bytes > device.shared && threads() > 128) wanted = 1;
    plan.teams = chosen.teams ? chosen.teams : std::max(1, std::min(most, wanted));
    require(plan.teams <= most, "plan", "have at most " + std::to_string(most) + " teams for this problem");
  }

  // The most neurons a step with at least three stages, then as many stages as fit; else what fits. With one token a
  // step of two neurons with two stages comes before one of one: what is done once a step is most of its instructions
  // (an H200, LLaMA-3-8B's layer: 67.8 us by one neuron and four stages, 54.6 by two and two). No step larger and no
  // more stages than a team has neurons to fill them: shared memory that is free lets the next kernel begin.
  void choose_ring(int64_t blocks) {
    int most = most_neurons(plan.tokens);
    int64_t own = std::max<int64_t>(1, divide_up(sizes.neurons, blocks * plan.teams));
    int even = static_cast<int>(divide_up(own, divide_up(own, most)));
    int two = plan.tokens == 1 ? 2 : 1;
    plan.step = 0;
    for (auto [least, smallest] : {std::pair{3, two}, std::pair{2, two}, std::pair{3, 1}, std::pair{1, 1}})
      for (int step = chosen.step ? most : even; step >= smallest && !plan.step; --step) {
        if (chosen.step && step != chosen.step) continue;
        int64_t enough = divide_up(own, step);
        for (int stages : {4, 3, 2, 1, 6}) {
          bool wanted = chosen.stages ? stages == chosen.stages
                                      : stages <= 4 && stages <= enough && stages >= std::min<int64_t>(least, enough);
          // In bulk a place is free only after the next step has begun.
          if (stages == 1 && plan.bulk && enough > 1) wanted = false;
          if (!wanted || bytes(step, stages) > device.shared) continue;
          plan.step = step;
          plan.stages = stages;
          break;
        }
      }
    require(plan.step, "plan",
            "have a step of 1.." + std::to_string(most) + " neurons and 1, 2, 3, 4 or 6 stages that fit in " +
                std::to_string(device.shared) + " bytes of shared memory");
  }

  // As many blocks as run at once, in whole clusters. The kernel's own resources may allow fewer clusters than there is
  // room for: a cluster lies in one group of multiprocessors.
  void choose_grid(Running running) {
    int64_t most = std::max<int64_t>(1, std::min<int64_t>(device.processors, sizes.neurons));
    int64_t blocks = chosen.blocks ? chosen.blocks : most;
    int cluster = chosen.cluster ? chosen.cluster : device.clusters ? 8 : 1;
    if (!chosen.cluster)
      while (cluster > 1 && cluster * 2 > blocks) cluster /= 2;
    require(cluster == 1 || device.clusters, "plan", "have clusters of 1 block on this device");
    for (;; cluster /= 2) {
      int64_t clusters = std::max<int64_t>(1, blocks / cluster);
      set_grid(clusters * cluster, cluster);
      if (cluster == 1) return;
      int at_once = running(sizes, plan);
      if (at_once > 0) {
        if (!chosen.blocks) set_grid(std::min<int64_t>(clusters, at_once) * cluster, cluster);
        return;
      }
      require(!chosen.cluster, "plan", "have clusters that this device runs");
    }
  }

  void set_grid(int64_t blocks, int cluster) {
    plan.share = sizes.indexed ? static_cast<int32_t>(divide_up(sizes.neurons, blocks)) : 0;
    choose_ring(blocks);
    plan.single = {static_cast<uint32_t>(blocks), threads() * static_cast<uint32_t>(plan.teams),
                   static_cast<uint32_t>(cluster), bytes(plan.step, plan.stages), plan.overlap};
  }
};

void check(const PlanOptions& c, const Device& device) {
  require(c.algorithm >= -1 && c.algorithm <= 1, "plan", "have algorithm 0 (single pass) or 1 (two passes)");
  require(c.blocks >= 0 && c.blocks <= 65536, "plan", "have 0 to 65536 blocks");
  bool power = c.cluster >= 0 && c.cluster <= 8 && (c.cluster & (c.cluster - 1)) == 0;
  require(power, "plan", "have clusters of 1, 2, 4 or 8 blocks");
  require(c.cluster <= 1 || c.blocks % c.cluster == 0, "plan", "have whole clusters of blocks");
  require(c.teams >= 0 && c.teams <= 15, "plan", "have 0 to 15 teams");
  require(c.splits >= 0 && c.splits <= 1024, "plan", "have 0 to 1024 splits");
  require(c.overlap != 1 || device.clusters, "plan", "not overlap on this device");
  require(c.early != 1 || c.overlap == 1, "plan", "be early only with overlap");
  require(c.bulk != 1 || device.clusters, "plan", "not copy in bulk on this device");
}

}  // namespace

Plan make_plan(const Sizes& sizes, const PlanOptions& chosen, const Device& device, Running running) {
  check(chosen, device);
  require(sizes.tokens >= 1 && sizes.tokens <= kMaxTokens, "x", "hold 1 to 8 tokens");
  require(sizes.hidden_size >= 1 && sizes.hidden_size <= kMostChannels, "x",
          "have a width of 1 to " + std::to_string(kMostChannels));
  require(sizes.neurons >= 0 && sizes.neurons < int64_t{1} << 31, "record", "have fewer than 2^31 rows");
  Plan plan{};
  plan.tokens = single_pass_tokens(sizes.tokens);
  plan.evict_first = chosen.evict_first != 0;
  plan.early = chosen.early == 1;
  plan.bulk = chosen.bulk < 0 ? device.clusters && chosen.stages != 1 : chosen.bulk == 1;

  SinglePassPlanner single{sizes, chosen, device, plan};
  bool narrow = single.threads() <= kNarrow;
  std::string reason = single.why_not();
  require(chosen.algorithm != 0 || reason.empty(), "plan", "have algorithm 1 for this problem: " + reason);
  // Without clusters the last block alone adds up a partial of every other: two passes leave it less to add. A narrow
  // layer is all latencies, of which two passes that overlap have fewer in a row (an H200, GPT-2: 9.3 us and 11.4).
  bool one = chosen.algorithm < 0 ? reason.empty() && device.clusters && !narrow : chosen.algorithm == 0;
  plan.algorithm = one ? Algorithm::single_pass : Algorithm::two_pass;
  plan.overlap = chosen.overlap < 0 ? narrow && !one && device.clusters : chosen.overlap == 1;
  if (one) {
    single.choose_teams();
    single.choose_grid(running);
    plan.groups = static_cast<int32_t>(plan.single.blocks / plan.single.cluster);
    plan.tickets = static_cast<int32_t>(plan.single.cluster);
    return plan;
  }
  plan.bulk = false;
  plan.tokens = two_pass_tokens(sizes.tokens);
  // Enough warps to fill every multiprocessor; a warp takes one neuron after another.
  int64_t blocks = std::min<int64_t>(device.processors * std::max(2, two_pass_blocks(sizes.weights, plan.tokens)),
                                     divide_up(std::max<int64_t>(sizes.neurons, 1), kTwoPassWarps));
  plan.hidden = {static_cast<uint32_t>(chosen.blocks ? chosen.blocks : blocks), kTwoPassThreads, 1, 0, plan.overlap};
  int64_t tile = tile_channels(sizes.weights), tiles = divide_up(sizes.hidden_size, tile);
  // A split of fewer than 32 neurons would be over before it has loads under way.
  int64_t splits = std::min(divide_up(device.processors * 2, tiles), std::max<int64_t>(1, sizes.neurons / 32));
  plan.splits = static_cast<int32_t>(chosen.splits ? chosen.splits : std::max<int64_t>(1, splits));
  plan.groups = plan.splits;
  plan.tickets = static_cast<int32_t>(tiles);
  plan.down = {static_cast<uint32_t>(tiles * plan.splits), kTwoPassThreads, 1, down_pass_bytes(sizes.weights),
               plan.overlap};
  return plan;
}

std::string describe(const Plan& plan) {
  std::string text = "{";
  auto put = [&](const char* name, int64_t value) {
    text += (text.size() > 1 ? ", \"" : "\"") + std::string(name) + "\": " + std::to_string(value);
  };
  bool single = plan.algorithm == Algorithm::single_pass;
  put("algorithm", static_cast<int>(plan.algorithm));
  put("tokens", plan.tokens);
  put("blocks", single ? plan.single.blocks : plan.hidden.blocks);
  put("threads", single ? plan.single.threads : plan.hidden.threads);
  if (single) {
    put("cluster", plan.single.cluster);
    put("teams", plan.teams);
    put("step", plan.step);
    put("stages", plan.stages);
    put("shared_bytes", plan.single.shared);
  } else {
    put("splits", plan.splits);
    put("down_blocks", plan.down.blocks);
  }
  put("evict_first", plan.evict_first);
  put("overlap", plan.overlap);
  put("early", plan.early);
  put("bulk", plan.bulk);
  return text + "}";
}

}  // namespace pyprune
