// Values of every type as floats, and rounding.
#pragma once

#include "device.h"

namespace pyprune {

template <Type W>
__device__ inline void unpack(const Piece& p, float (&out)[piece(W)]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word = p.word[i];
    if constexpr (W == Type::f32) {
      out[i] = __uint_as_float(word);
    } else if constexpr (W == Type::bf16) {
      out[2 * i] = __uint_as_float(word << 16);
      out[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
    } else if constexpr (W == Type::f16) {
      out[2 * i] = from_half(word & 0xffffu);
      out[2 * i + 1] = from_half(word >> 16);
    } else {
      // An integer in [0, 255] is put in the last byte of 2^23, which makes it a float without a conversion.
      word ^= 0x80808080u;
      constexpr float zero = 8388608.0f + 128.0f;
      out[4 * i] = __uint_as_float(byte_beside_magic<0>(word)) - zero;
      out[4 * i + 1] = __uint_as_float(byte_beside_magic<1>(word)) - zero;
      out[4 * i + 2] = __uint_as_float(byte_beside_magic<2>(word)) - zero;
      out[4 * i + 3] = __uint_as_float(byte_beside_magic<3>(word)) - zero;
    }
  }
}

template <Type W>
struct Element {
  using Bits = uint16_t;
};
template <>
struct Element<Type::f32> {
  using Bits = uint32_t;
};
template <>
struct Element<Type::i8> {
  using Bits = uint8_t;
};

// The piece at `values`, of which `left` elements exist, element by element; zeros behind them.
template <Type W>
__device__ inline Piece load_elements(const void* values, int64_t left) {
  constexpr int n = piece(W), in_word = n / 4, bits = 32 / in_word;
  auto* from = static_cast<const typename Element<W>::Bits*>(values);
  Piece p{};
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (i < left) p.word[i / in_word] |= static_cast<uint32_t>(from[i]) << (i % in_word * bits % 32);
  return p;
}

// The piece that begins at element `at`, of which `left` exist.
template <Type W>
__device__ inline Piece load_weights_at(const void* row, int64_t at, int64_t left, bool aligned, uint64_t policy) {
  auto* from = static_cast<const typename Element<W>::Bits*>(row) + at;
  return aligned ? load_weights(from, policy) : load_elements<W>(from, left);
}

__device__ inline float load_value(Type type, const void* values, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(values)[i];
  uint32_t bits = static_cast<const uint16_t*>(values)[i];
  return type == Type::bf16 ? __uint_as_float(bits << 16) : from_half(bits);
}

__device__ inline void store_value(Type type, void* values, int64_t i, float value) {
  if (type == Type::f32)
    static_cast<float*>(values)[i] = value;
  else
    static_cast<uint16_t*>(values)[i] = type == Type::bf16 ? to_bfloat(value) : to_half(value);
}

// Four values from element `at`, of which `left` exist: at once where they lie well, and all four exist.
__device__ inline bool lies_well(Type type, const void* values, int64_t at, int64_t left) {
  return left >= 4 && (reinterpret_cast<uintptr_t>(values) + at * bytes_of(type)) % (4 * bytes_of(type)) == 0;
}

__device__ inline void load_four(Type type, const void* values, int64_t at, int64_t left, float (&out)[4]) {
  if (!lies_well(type, values, at, left)) {
    for (int i = 0; i < 4; ++i) out[i] = i < left ? load_value(type, values, at + i) : 0.0f;
    return;
  }
  if (type == Type::f32) {
    float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(values) + at);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    return;
  }
  uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(values) + at);
  const uint32_t words[] = {v.x, v.y};
  for (int i = 0; i < 4; ++i) {
    uint32_t bits = words[i / 2] >> (i % 2 * 16) & 0xffffu;
    out[i] = type == Type::bf16 ? __uint_as_float(bits << 16) : from_half(bits);
  }
}

__device__ inline void store_four(Type type, void* values, int64_t at, int64_t left, const float (&given)[4]) {
  if (!lies_well(type, values, at, left)) {
    for (int i = 0; i < 4; ++i)
      if (i < left) store_value(type, values, at + i, given[i]);
    return;
  }
  if (type == Type::f32) {
    auto* to = reinterpret_cast<float4*>(static_cast<float*>(values) + at);
    *to = float4{given[0], given[1], given[2], given[3]};
    return;
  }
  uint32_t bits[4];
  for (int i = 0; i < 4; ++i) bits[i] = type == Type::bf16 ? to_bfloat(given[i]) : to_half(given[i]);
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(values) + at) =
      uint2{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
}

template <Type X, int N>
__device__ inline void load_pieces(const void* values, int64_t at, float (&out)[N]) {
  constexpr int n = piece(X);
#pragma unroll
  for (int i = 0; i < N / n; ++i) {
    float part[n];
    unpack<X>(load_piece(static_cast<const typename Element<X>::Bits*>(values) + at + i * n), part);
#pragma unroll
    for (int j = 0; j < n; ++j) out[i * n + j] = part[j];
  }
}

// A piece of weights' worth of x, from channel `at` of a token.
template <int N>
__device__ inline void load_x(const Params& p, int64_t token, int64_t at, float (&out)[N]) {
  at += token * p.x_stride;
  if constexpr (N % piece(Type::bf16) == 0) {
    if (p.x_form == Type::bf16) return load_pieces<Type::bf16>(p.x, at, out);
    if (p.x_form == Type::f16) return load_pieces<Type::f16>(p.x, at, out);
  }
  load_pieces<Type::f32>(p.x, at, out);
}

// To the nearest value of `type`, ties to even.
__device__ inline float round_to(Type type, float value) {
  if (type == Type::bf16) return __uint_as_float(static_cast<uint32_t>(to_bfloat(value)) << 16);
  if (type == Type::f16) return from_half(to_half(value));
  return value;
}

}  // namespace pyprune
