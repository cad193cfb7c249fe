// How simulated kernels are started. Tests only.
#pragma once

#include "../params.h"
#include "fibers.h"

namespace pyprune {

using Stream = void*;
using Failure = const char*;
using Kernel = void (*)(Params);

template <class Given>
inline Failure start(void (*kernel)(Given), const Grid& grid, const Given& params, Stream) {
  simulator::launch({grid.blocks, grid.threads, grid.cluster, grid.shared}, grid.overlap,
                    [kernel, params] { kernel(params); });
  return nullptr;
}

inline int running_clusters(Kernel, const Grid& grid) {
  return simulator::device().processors / static_cast<int>(grid.cluster);
}

}  // namespace pyprune
