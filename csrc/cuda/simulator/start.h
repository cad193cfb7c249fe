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
  struct Start {
    void (*kernel)(Given);
    Given params;
  } given{kernel, params};
  simulator::run(
      {grid.blocks, grid.threads, grid.cluster, grid.shared},
      [](void* context) {
        auto* start = static_cast<Start*>(context);
        start->kernel(start->params);
      },
      &given);
  return nullptr;
}

inline int running_clusters(Kernel, const Grid& grid) {
  return simulator::device().processors / static_cast<int>(grid.cluster);
}

}  // namespace pyprune
