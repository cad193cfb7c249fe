// From the dot products of a neuron to its hidden activation.
#pragma once

#include "weights.cuh"

namespace pyprune {

__device__ inline float activate(Activation activation, float z) {
  switch (activation) {
    case Activation::gelu:
      // z * Phi(z); the complement keeps its digits where Phi is small.
      return 0.5f * z * erfcf(-0.707106781f * z);
    case Activation::gelu_tanh:
      // (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)), u = sqrt(2 / pi) (z + 0.044715 z^3)
      return z / (1.0f + expf(-1.595769122f * (z + 0.044715f * z * z * z)));
    case Activation::relu:
      return z < 0.0f ? 0.0f : z;
    case Activation::relu2: {
      float r = z < 0.0f ? 0.0f : z;
      return r * r;
    }
    case Activation::silu:
      return z / (1.0f + expf(-z));
    default:
      return z / (1.0f + expf(-1.702f * z));
  }
}

// What one neuron adds to or multiplies its sums by: (gate, up) or (up), and down.
struct Terms {
  float first_scale, second_scale, down_scale;
  float first_bias, second_bias;
  bool foreign;  // the index named no row of the record
};

template <Type W, bool GATED>
__device__ inline Terms load_terms(const Params& p, int64_t row) {
  Terms t{1.0f, 1.0f, 1.0f, 0.0f, 0.0f, false};
  if (row < 0 || row >= p.call.rows) {
    t.foreign = true;
    return t;
  }
  constexpr int parts = GATED ? 3 : 2;
  if constexpr (W == Type::i8) {
    const float* scales = p.call.scales + row * parts;
    t.first_scale = scales[0];
    if constexpr (GATED) t.second_scale = scales[1];
    t.down_scale = scales[parts - 1];
  }
  if (p.call.neuron_bias) {
    t.first_bias = load_value(p.call.x_type, p.call.neuron_bias, row * (parts - 1));
    if constexpr (GATED) t.second_bias = load_value(p.call.x_type, p.call.neuron_bias, row * 2 + 1);
  }
  return t;
}

// The hidden activation, times the down projection's scale; rounded where eager modules round.
template <Type W, bool GATED>
__device__ inline float hidden_activation(const Params& p, const Terms& t, float first, float second) {
  if (t.foreign) return __uint_as_float(0x7fc00000u);  // a NaN is seen; a wrong number would not be
  Type type = p.rounds_to;
  if constexpr (W == Type::i8) first *= t.first_scale, second *= t.second_scale;
  float a = round_to(type, activate(p.call.activation, round_to(type, first + t.first_bias)));
  if constexpr (GATED) a = round_to(type, a * round_to(type, second + t.second_bias));
  return a * t.down_scale;
}

}  // namespace pyprune
