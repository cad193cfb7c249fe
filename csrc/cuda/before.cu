#include "kernels.h"
#include "unite.cuh"
#include "widen.cuh"

namespace pyprune {

Failure start_unite(const Lists& lists, Stream stream) {
  Grid grid{1, kUniteThreads, 1, static_cast<uint32_t>(unite_bytes(lists.rows)), false};
  return start(unite, grid, lists, stream);
}

Failure start_widen(const Widening& w, Stream stream) {
  auto blocks = static_cast<uint32_t>(w.tokens * ((w.width + kWidenThreads - 1) / kWidenThreads));
  return start(widen, {blocks, kWidenThreads, 1, 0, false}, w, stream);
}

}  // namespace pyprune
