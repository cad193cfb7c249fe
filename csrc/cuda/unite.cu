#include "kernels.h"
#include "unite.cuh"

namespace pyprune {

Failure start_unite(const Lists& lists, Stream stream) {
  Grid grid{1, kUniteThreads, 1, static_cast<uint32_t>(unite_bytes(lists.rows)), false};
  return start(unite, grid, lists, stream);
}

}  // namespace pyprune
