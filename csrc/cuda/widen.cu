#include "kernels.h"
#include "widen.cuh"

namespace pyprune {

Failure start_widen(const Widening& w, Stream stream) {
  auto blocks = static_cast<uint32_t>(w.tokens * ((w.width + kWidenThreads - 1) / kWidenThreads));
  return start(widen, {blocks, kWidenThreads, 1, 0, false}, w, stream);
}

}  // namespace pyprune
