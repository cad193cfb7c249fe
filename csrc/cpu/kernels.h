// The functions that every instruction set provides, and the workspace they share.
//
// A call cuts its neurons into slabs. For every slab one thread computes a partial result `[rows, padded]` in float32, and
// then the partials are added in the order of the slabs. Slabs depend on the problem alone, so the result does not
// depend on the number of threads.
//
// Tokens and partials are held in "expanded" order: the order in which an instruction set unpacks a line of weights
// into float vectors. For bfloat16 that is the even elements of two vectors, then the odd ones, which costs one
// instruction a vector where natural order would cost a shuffle more.
#pragma once

#include "problem.h"

namespace pyprune {

constexpr int64_t kLineBytes = 64;
// Most tokens of one pass over the weights.
constexpr int64_t kMaxTokens = 64;

constexpr int64_t element_size(Type type) { return type == Type::f32 ? 4 : type == Type::i8 ? 1 : 2; }

// Elements of one cache line; D is padded to a multiple.
constexpr int64_t line(Type type) { return kLineBytes / element_size(type); }

struct Workspace {
  int64_t padded;         // D rounded up to whole lines
  int64_t rows;           // M rounded up as `Kernels::shape` wants it
  float* tokens;          // [rows, padded] x in expanded order, zeros behind D
  uint16_t* tokens_bf16;  // x as bfloat16 instructions read it, or null where they are not used
  float* partials;        // [slabs, rows, padded]
};

// What a problem needs of the workspace.
struct Shape {
  int64_t rows;
  int64_t bf16;  // 16-bit values in `tokens_bf16`, or 0
};

struct Kernels {
  const char* name;
  Shape (*shape)(const Problem&, int64_t padded);
  // Fill `tokens` or `tokens_bf16` for tokens [first, last).
  void (*pack)(const Problem&, const Workspace&, int64_t first, int64_t last);
  // Write `partial` (`[rows, padded]`) for neurons [first, last).
  void (*slab)(const Problem&, const Workspace&, int64_t first, int64_t last, float* partial);
  // Add partials, bias and residual, and write columns [first, last) of the output; `first` starts a line.
  void (*finish)(const Problem&, const Workspace&, int64_t slabs, int64_t first, int64_t last);
  // The sum of `count` floats, as fast as memory gives them.
  double (*read)(const float*, int64_t count);
};

// Null where the machine cannot run it, or the compiler could not build it.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();

}  // namespace pyprune
