// Values of any type, one at a time, and what instruction sets define for vectors. Included by each of their source
// files, inside that file's own namespace.

#include "../common/floats.h"

inline float read(Type type, const void* p, int64_t i) {
  switch (type) {
    case Type::f32:
      return static_cast<const float*>(p)[i];
    case Type::bf16:
      return from_bf16(static_cast<const uint16_t*>(p)[i]);
    case Type::f16:
      return from_f16(static_cast<const uint16_t*>(p)[i]);
    default:
      return static_cast<const int8_t*>(p)[i];
  }
}

inline void write(Type type, void* p, int64_t i, float a) {
  switch (type) {
    case Type::f32:
      static_cast<float*>(p)[i] = a;
      break;
    case Type::bf16:
      static_cast<uint16_t*>(p)[i] = to_bf16(a);
      break;
    default:
      static_cast<uint16_t*>(p)[i] = to_f16(a);
  }
}

// A vector of values of one type: `get` as floats, `put` rounded. Each instruction set defines it.
template <Type>
struct Values;

// A block of weights as float vectors, in expanded order; one vector but where an instruction set says otherwise.
template <Type W>
struct Weights {
  using Element = typename Values<W>::Element;
  static constexpr int kVectors = 1;
  template <class Vector>
  static inline void unpack(const Element* p, Vector (&out)[1]) {
    out[0] = Values<W>::get(p);
  }
};

// Of int4 eight weights lie in 32 bits; nibbles.h unpacks them.
constexpr int kNibbles = 8;
template <>
struct Weights<Type::i4> {
  using Element = uint8_t;
  static constexpr int kVectors = kNibbles;
};
