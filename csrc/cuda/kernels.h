// The compiled kernels, for the host: by type of weights, tokens and form. Null where there is none.
#pragma once

#include "widen.h"
#include "start.h"

namespace pyprune {

struct Kernels {
  Kernel single_pass;
  Kernel single_pass_bulk;
  Kernel hidden_pass;
  Kernel down_pass;
};

// `tokens` is one of 1, 2, 4, 8.
Kernels kernels_f32(int32_t tokens, bool gated);
Kernels kernels_bf16(int32_t tokens, bool gated);
Kernels kernels_f16(int32_t tokens, bool gated);
Kernels kernels_i8(int32_t tokens, bool gated);

inline Kernels kernels(Type weights, int32_t tokens, bool gated) {
  switch (weights) {
    case Type::f32:
      return kernels_f32(tokens, gated);
    case Type::bf16:
      return kernels_bf16(tokens, gated);
    case Type::f16:
      return kernels_f16(tokens, gated);
    default:
      return kernels_i8(tokens, gated);
  }
}

Failure start_widen(const Widening& widening, Stream stream);

}  // namespace pyprune
