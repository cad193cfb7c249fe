// What one call of an FFN computes, in plain pointers; layouts as in pyprune/base/record.py. Knows nothing of torch.
#pragma once

#include <cstdint>

namespace pyprune {

enum class Type { f32, bf16, f16, i8, i4 };

// Weights of one scale in an int4 row; see pyprune/base/int4.py.
constexpr int64_t kScaleGroup = 32;

// Elements of one part of a row. Those of int4 are bytes: of pairs, then a bfloat16 scale for each group.
constexpr int64_t part_elements(Type type, int64_t hidden_size) {
  return type == Type::i4 ? hidden_size / 2 + hidden_size / kScaleGroup * 2 : hidden_size;
}

// In the order of pyprune.base.activations.
enum class Activation { gelu, gelu_tanh, relu, relu2, silu, quick_gelu };

struct Call {
  int64_t tokens;       // M
  int64_t hidden_size;  // D
  int64_t neurons;      // K, those that are computed
  int64_t rows;         // F, those in memory
  bool gated;
  Activation activation;

  Type x_type;    // of x, neuron_bias, down_bias and out
  const void* x;  // [M, D], rows `x_stride` elements apart
  int64_t x_stride;

  Type weight_type;
  const void* record;  // [F, P * part()], rows `record_stride` elements apart
  int64_t record_stride;
  const int32_t* index;     // [K] rows of the record, or null for its first K
  const float* scales;      // [F, P] for i8, else null
  const void* neuron_bias;  // [F, P-1] or null
  const void* down_bias;    // [D] or null
  void* out;                // [M, D] contiguous

  int parts() const { return gated ? 3 : 2; }
  int64_t part() const { return part_elements(weight_type, hidden_size); }
  int64_t row(int64_t neuron) const { return index ? index[neuron] : neuron; }
};

}  // namespace pyprune
