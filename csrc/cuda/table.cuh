// One type of weights: a row of kernels for each number of tokens.
#pragma once

#include "kernels.h"
#include "single_pass.cuh"
#include "two_pass.cuh"

namespace pyprune {

template <Type W, int T, bool GATED>
Kernels kernels_of() {
  Kernels found{};
  if constexpr (most_threads(T) > 0)
    found.single_pass = single_pass<W, T, GATED>, found.single_pass_bulk = single_pass_bulk<W, T, GATED>;
  if constexpr (two_pass_tokens(T) == T)
    found.hidden_pass = hidden_pass<W, T, GATED>, found.down_pass = down_pass<W, T>;
  return found;
}

template <Type W, int T>
Kernels kernels_of(bool gated) {
  return gated ? kernels_of<W, T, true>() : kernels_of<W, T, false>();
}

template <Type W>
Kernels kernels_of(int32_t tokens, bool gated) {
  switch (tokens) {
    case 1:
      return kernels_of<W, 1>(gated);
    case 2:
      return kernels_of<W, 2>(gated);
    case 4:
      return kernels_of<W, 4>(gated);
    default:
      return kernels_of<W, 8>(gated);
  }
}

}  // namespace pyprune
