// What a small kernel is given that runs before the others where a call needs it.
#pragma once

#include "params.h"

namespace pyprune {

constexpr int kWidenThreads = 256;

// Tokens, and where they go as float32.
struct Widening {
  const void* x;  // [tokens, hidden_size], rows `stride` elements apart
  Type type;
  int64_t stride, tokens, hidden_size;
  float* out;  // [tokens, width], zeros behind hidden_size
  int64_t width;
};

}  // namespace pyprune
