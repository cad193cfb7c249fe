// How a call is laid out on a device, from its sizes alone: no timing, and the same every time.
#pragma once

#include <string>

#include "params.h"

namespace pyprune {

enum class Algorithm { single_pass, two_pass };

// Everything that a plan can choose. Zero, or less where zero means something, leaves a choice to the analysis.
struct PlanOptions {
  int32_t algorithm = -1;  // of Algorithm
  int32_t blocks = 0;      // single pass: blocks; two passes: of the hidden pass
  int32_t cluster = 0;     // single pass: blocks of a cluster
  int32_t teams = 0;       // single pass: teams of threads in a block, each with neurons of its own
  int32_t step = 0;        // single pass: neurons of a step
  int32_t stages = 0;      // single pass: steps of weights under way or in use
  int32_t splits = 0;      // two passes: splits of the neurons in the down pass
  int32_t evict_first = -1;
  int32_t overlap = -1;  // begin before the kernel before has ended (programmatic dependent launch)
  int32_t early = -1;    // single pass: ask for weights before waiting for that kernel; they must not be its output
  int32_t bulk = -1;     // single pass: a neuron by one bulk copy, not by pieces of 16 bytes
};

constexpr int32_t kPlanOptions = 11;  // members of PlanOptions, in their order

struct Device {
  int32_t index;       // CUDA's number of it
  int32_t processors;  // streaming multiprocessors
  uint32_t shared;     // most shared memory of a block, in bytes
  bool clusters;       // kernels are compiled for compute capability 9.0 or newer: clusters, overlap, bulk copies
};

struct Plan {
  Algorithm algorithm;
  int32_t tokens;  // that the kernels are compiled for
  int32_t teams, step, stages, splits;
  bool evict_first, overlap, early, bulk;
  Grid single, hidden, down;
  int32_t share;    // most neurons of a block of the single pass
  int32_t groups;   // partials of one token and channel
  int32_t tickets;  // that the kernels count on
};

struct Sizes {
  int64_t tokens, hidden_size, neurons;
  bool gated, indexed;
  Type weights;
  bool aligned;  // see Params
};

// What cannot be computed, or cannot be had: `argument` must `rule`.
struct Refusal {
  std::string argument, rule;
};

// How many clusters of a plan's single pass run at once; 0 for none.
using Running = int (*)(const Sizes& sizes, const Plan& plan);

// Raises Refusal when `chosen` does not fit the sizes or the device.
Plan make_plan(const Sizes& sizes, const PlanOptions& chosen, const Device& device, Running running);

// The plan as JSON.
std::string describe(const Plan& plan);

}  // namespace pyprune
