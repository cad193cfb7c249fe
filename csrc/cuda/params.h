// What the kernels are given, and how a call is laid out on the device. Plain data; knows neither torch nor CUDA.
#pragma once

#include "../common/call.h"

// Functions that kernels and the host share.
#ifdef __CUDACC__
#define PYPRUNE_BOTH __host__ __device__
#else
#define PYPRUNE_BOTH
#endif

namespace pyprune {

// `call` and the buffers of the device that a call needs besides. Passed to kernels by value.
struct Params {
  Call call;
  uint32_t row_bytes;  // from one row of the record to the next
  Type rounds_to;      // what pre-activations, activations and their products are rounded to
  bool aligned;        // every part of every record row begins on 16 bytes and holds whole pieces of 16 bytes

  // x as kernels read it: rows of whole pieces that begin on 16 bytes; float32 beside float32 weights. See widen.cuh.
  const void* x;
  int64_t x_stride;
  Type x_form;

  float* partials;    // [groups, tokens, padded]
  float* hidden;      // two passes: [neurons, kTokens]
  uint32_t* tickets;  // zero before and after every launch
  int32_t step;       // neurons that a block takes at once
  int32_t stages;     // steps of weights under way or in use
  int32_t groups;     // partials of one token and channel
  int32_t share;      // most neurons of a block
  int32_t teams;      // of threads in a block, each with neurons of its own
  bool evict_first;   // weights leave the L2 cache first
  bool early;         // weights are read before the kernel before has ended
};

// How kernels are launched.
struct Grid {
  uint32_t blocks;
  uint32_t threads;
  uint32_t cluster;  // blocks that can read each other's shared memory; 1 where there are no clusters
  uint32_t shared;   // dynamic shared memory of a block, in bytes
  bool overlap;      // may begin before the kernel before it has ended
};

constexpr uint32_t kWarp = 32;

PYPRUNE_BOTH constexpr int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::i8 ? 1 : 2; }

// Elements of 16 bytes.
PYPRUNE_BOTH constexpr int32_t piece(Type type) { return type == Type::f32 ? 4 : type == Type::i8 ? 16 : 8; }

// Channels of one thread in the single pass. More would leave fewer threads to hide latencies, fewer would repeat what
// every thread does for each neuron more often: see bench/notes/gpu.md.
constexpr int32_t kChannels = 16;

// Most channels, D. Tickets are made for so many.
constexpr int64_t kMostChannels = 1 << 17;

// Tokens that a kernel is compiled for: the least that holds them. Two in a single pass share the weights' bytes at the
// cost of one; in two passes, which are for wider layers and more tokens, they are not worth kernels of their own.
constexpr int32_t kMaxTokens = 8;
constexpr int32_t single_pass_tokens(int64_t tokens) { return tokens <= 1 ? 1 : tokens <= 2 ? 2 : tokens <= 4 ? 4 : 8; }
constexpr int32_t two_pass_tokens(int64_t tokens) { return tokens <= 1 ? 1 : tokens <= 4 ? 4 : 8; }

// Most neurons that a step of the single pass takes, so that they share the shuffles of a sum.
PYPRUNE_BOTH constexpr int32_t most_neurons(int32_t tokens) { return tokens == 1 ? 4 : 2; }

// Threads with which the single pass is compiled; the registers of a thread hold `tokens * kChannels` sums and as many
// values of x. 0: no kernel.
PYPRUNE_BOTH constexpr int32_t most_threads(int32_t tokens) { return tokens <= 2 ? 512 : tokens <= 4 ? 256 : 0; }

// D rounded up to whole pieces, the width of partials.
PYPRUNE_BOTH constexpr int64_t padded(const Call& p) {
  int64_t n = piece(p.weight_type);
  return (p.hidden_size + n - 1) / n * n;
}

}  // namespace pyprune
