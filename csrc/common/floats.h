// Sixteen-bit floats, one at a time, without hardware's help. Included inside a namespace of the file's own: compiled
// for several instruction sets, functions of one name must not meet in the linker.

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t a) { return from_bits(static_cast<uint32_t>(a) << 16); }

// To the nearest, ties to even.
inline uint16_t to_bf16(float a) {
  uint32_t bits = to_bits(a);
  uint16_t rounded = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  return a != a ? uint16_t{0x7fc0} : rounded;
}

inline float from_f16(uint16_t a) {
  // The fraction and exponent moved into place are 2^-112 times the value, denormals included.
  float scaled = from_bits(static_cast<uint32_t>(a & 0x7fffu) << 13) * from_bits(0x77800000u);  // 2^112
  uint32_t bits = to_bits(scaled);
  bits = (a & 0x7c00u) == 0x7c00u ? bits | 0x7f800000u : bits;
  return from_bits(bits | static_cast<uint32_t>(a & 0x8000u) << 16);
}

// To the nearest, ties to even.
inline uint16_t to_f16(float a) {
  uint32_t bits = to_bits(a);
  uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t out;
  if (bits >= 0x47800000u) {  // 2^16 and above, inf, NaN
    out = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: denormal; adding 0.5 lets the unit round
    out = to_bits(from_bits(bits) + 0.5f) - 0x3f000000u;
  } else {
    out = (bits + 0xc8000fffu + (bits >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(out | sign);
}
