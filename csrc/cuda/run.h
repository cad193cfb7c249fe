// One call on a device: checked, planned, its scratch laid out, its kernels started.
#pragma once

#include "start.h"
#include "plan.h"

namespace pyprune {

// Memory of the device, until the call's kernels have run.
using Allocate = void* (*)(void* context, int64_t bytes);

// `count` numbers that are zero, and are left zero, and that no call beside this one is given.
using Tickets = uint32_t* (*)(void* context, int32_t count);

struct Memory {
  Allocate allocate;
  Tickets tickets;
  void* context;
};

// How many clusters of a plan's single pass the current device runs at once.
int running(const Sizes& sizes, const Plan& plan);

// Starts the kernels of up to kMaxTokens tokens. Raises Refusal, or returns what CUDA said went wrong.
Failure run(const Call& call, const PlanOptions& chosen, const Device& device, const Memory& memory, Stream stream);

}  // namespace pyprune
