// The functions that every instruction set provides, and the workspace they share.
//
// A call cuts its neurons into slabs. For every slab one thread computes a partial result `[rows, padded]` in float32,
// and then the partials are added in the order of the slabs. Slabs depend on the problem alone, so the result does not
// depend on the number of threads.
//
// Tokens and partials are held in "expanded" order: the order in which an instruction set unpacks a line of weights
// into float vectors. For bfloat16 that is the even elements of two vectors, then the odd ones, which costs one
// instruction a vector where natural order would cost a shuffle more. For int4 see nibbles.h.
#pragma once

#include "../common/call.h"

namespace pyprune {

constexpr int64_t kLineBytes = 64;
// Most tokens of one pass over the weights.
constexpr int64_t kMaxTokens = 64;

constexpr int64_t element_size(Type type) {
  return type == Type::f32 ? 4 : type == Type::i8 || type == Type::i4 ? 1 : 2;
}

// Weights of one cache line.
constexpr int64_t line(Type type) { return kLineBytes / element_size(type) * (type == Type::i4 ? 2 : 1); }
// D with its padding: whole lines of weights, and of partial sums two.
constexpr int64_t padded_width(Type type, int64_t hidden_size) {
  int64_t multiple = line(type) < 32 ? 32 : line(type);
  return (hidden_size + multiple - 1) / multiple * multiple;
}

// The output is finished in pieces of so many columns of one token.
constexpr int64_t kFinishColumns = 512;
constexpr int64_t finish_pieces(int64_t hidden_size) { return (hidden_size + kFinishColumns - 1) / kFinishColumns; }

// How x is held for the dot products.
enum class Form {
  floats,  // float32 in expanded order
  pairs,   // bfloat16, for AVX-512 BF16
  bytes,   // fixed point in three bytes, for VNNI and int8 or int4
  blocks,  // blocks of tokens, as blocks.h has them
  tiles,   // bfloat16 in tiles of 16 tokens, for AMX
};

// What a problem needs of the workspace.
struct Shape {
  Form form;
  int64_t rows;   // M rounded up to what kernels write
  int64_t bytes;  // of packed tokens
  int64_t chunk;  // columns of partial sums that lie together, in which D's padding is whole; 0: all
};

struct Workspace {
  Form form;
  int64_t padded;   // D, padded
  int64_t rows;     // as in Shape
  void* tokens;     // x in that form, zeros behind D
  float* partials;  // [slabs, rows, padded], or [slabs, padded / chunk, rows, chunk]
  int64_t chunk;    // as in Shape

  // Where the partial of one token and column stands in its slab. Whole rows apart, the lines of many tokens would fall
  // into one set of the first cache for the usual widths.
  int64_t offset(int64_t t, int64_t d) const {
    return chunk ? (d / chunk * rows + t) * chunk + d % chunk : t * padded + d;
  }

  template <class T>
  const T* token(int64_t t) const {
    return static_cast<const T*>(tokens) + t * padded;
  }
};

// What one expert gave for one token: a row of the partials of its call.
struct Contribution {
  const Workspace* workspace;
  int64_t slabs;
  int64_t token;  // of those of that call
  float weight;
};

struct Kernels {
  const char* name;
  Shape (*shape)(const Call&, int64_t padded);
  // Fill `tokens` for tokens [first, last).
  void (*pack)(const Call&, const Workspace&, int64_t first, int64_t last);
  // Write `partial` (`[rows, padded]`) for neurons [first, last).
  void (*slab)(const Call&, const Workspace&, int64_t first, int64_t last, float* partial);
  // Add partials and bias, and write pieces [first, last) of the output, of M * finish_pieces(D).
  void (*finish)(const Call&, const Workspace&, int64_t slabs, int64_t first, int64_t last);
  // Of a token's output `row`, write columns [first, last), `first` a whole line: what `count` experts gave, weighted.
  void (*combine)(const Call&, const Contribution*, int64_t count, int64_t first, int64_t last, void* row);
  // The weights of the int4 rows [first, last) as `out`, [F, P*D] of x's type.
  void (*write_out)(const Call&, int64_t first, int64_t last);
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
