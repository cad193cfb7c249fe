// One call of an FFN: workspace, slabs, threads.
#pragma once

#include "threads.h"

namespace pyprune {

// Read `count` floats with `threads` threads, each a run of its own: what memory gives to a plain loop.
double read(const float* values, int64_t count, const Kernels& kernels, int64_t threads, ParallelFor parallel_for);

// Write out the weights of all int4 rows of `call`; see `Kernels::write_out`.
void write_out(const Call& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for);

// Compute `call`, which must be valid, on at most `threads` threads.
void run(const Call& call, const Kernels& kernels, int64_t threads, ParallelFor parallel_for);

}  // namespace pyprune
