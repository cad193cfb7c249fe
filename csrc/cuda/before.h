// What two small kernels are given that run before the others where a call needs them.
#pragma once

#include "params.h"

namespace pyprune {

constexpr int kUniteThreads = 1024;
constexpr int kWidenThreads = 256;

// A list of neurons for each token, and what becomes of them.
struct Lists {
  const int32_t* index;   // [tokens, longest]
  const int32_t* counts;  // [tokens]
  int64_t tokens, longest, rows;
  uint8_t* members;  // out [rows rounded up to 4]
  int32_t* united;   // out [at most longest * tokens + 1]
  int32_t* count;    // out [1]
};

// Bytes of shared memory: sums of warps, and a byte for each row.
constexpr int64_t unite_bytes(int64_t rows) { return 2 * kWarp * 4 + (rows + 3) / 4 * 4; }

// Tokens, and where they go as float32.
struct Widening {
  const void* x;  // [tokens, hidden_size], rows `stride` elements apart
  Type type;
  int64_t stride, tokens, hidden_size;
  float* out;  // [tokens, width], zeros behind hidden_size
  int64_t width;
};

}  // namespace pyprune
