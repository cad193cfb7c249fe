// Four floats by the compiler's vector extensions: SSE2 on any x86-64, NEON on Arm, plain code elsewhere. Included by
// one source file, inside that file's own namespace.

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

inline Vec zero() { return Vec{}; }
inline Vec broadcast(float a) { return Vec{a, a, a, a}; }
inline Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
inline void store(float* p, Vec a) { __builtin_memcpy(p, &a, sizeof a); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec select(Ints mask, Vec a, Vec b) {
  Ints bits;
  Ints other;
  __builtin_memcpy(&bits, &a, sizeof a);
  __builtin_memcpy(&other, &b, sizeof b);
  bits = (mask & bits) | (~mask & other);
  __builtin_memcpy(&a, &bits, sizeof a);
  return a;
}
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec abs(Vec a) { return select(a < zero(), -a, a); }
// b where a < 0, else c.
inline Vec where_negative(Vec a, Vec b, Vec c) { return select(a < zero(), b, c); }
// 2^n for whole n in [-126, 127].
inline Vec power_of_two(Vec n) {
  // Of n + 127 + 2^23 the low bits are the exponent; converting NaN to an integer would be undefined.
  Vec shifted = n + broadcast(127.0f + 8388608.0f);
  Ints bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = bits << 23;
  __builtin_memcpy(&shifted, &bits, sizeof bits);
  return shifted;
}
inline float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
__attribute__((always_inline)) inline void sum_four(const Vec (&a)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
}

// Even and odd elements of 8 floats, and back.
inline void deinterleave(Vec low, Vec high, Vec& even, Vec& odd) {
  even = Vec{low[0], low[2], high[0], high[2]};
  odd = Vec{low[1], low[3], high[1], high[3]};
}
inline void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
  low = Vec{even[0], odd[0], even[1], odd[1]};
  high = Vec{even[2], odd[2], even[3], odd[3]};
}

// In the order of the wider instruction sets: even elements, then odd ones.
template <>
struct Weights<Type::bf16> {
  using Element = uint16_t;
  static constexpr int kVectors = 2;
  static inline void unpack(const Element* p, Vec (&out)[2]) {
    Vec even = zero(), odd = zero();
    for (int i = 0; i < kLanes; ++i) {
      even[i] = from_bf16(p[2 * i]);
      odd[i] = from_bf16(p[2 * i + 1]);
    }
    out[0] = even;
    out[1] = odd;
  }
};

// Four values, to and from floats; rounded to the nearest, ties to even.
template <Type X>
struct Values {
  using Element = uint16_t;
  static inline Vec get(const Element* p) {
    Vec a = zero();
    for (int i = 0; i < kLanes; ++i) a[i] = X == Type::bf16 ? from_bf16(p[i]) : from_f16(p[i]);
    return a;
  }
  static inline void put(Element* p, Vec a) {
    for (int i = 0; i < kLanes; ++i) p[i] = X == Type::bf16 ? to_bf16(a[i]) : to_f16(a[i]);
  }
};

template <>
struct Values<Type::f32> {
  using Element = float;
  static inline Vec get(const Element* p) { return load(p); }
  static inline void put(Element* p, Vec a) { store(p, a); }
};

template <>
struct Values<Type::i8> {
  using Element = int8_t;
  static inline Vec get(const Element* p) {
    Vec a = zero();
    for (int i = 0; i < kLanes; ++i) a[i] = static_cast<float>(p[i]);
    return a;
  }
};

// Four words of eight int4 weights each: one group.
typedef uint32_t Nibbles __attribute__((vector_size(16)));
template <bool Whole>
inline Nibbles load_nibbles(const uint8_t* p, int) {
  Nibbles words;
  __builtin_memcpy(&words, p, sizeof words);
  return words;
}
// The weight in the highest half of each word, which is then shifted out.
inline Vec next_nibble(Nibbles& left) {
  Ints found;
  __builtin_memcpy(&found, &left, sizeof found);
  left = left << 4;
  return __builtin_convertvector(found >> 28, Vec);
}
template <bool Whole>
inline Vec load_scales(const uint8_t* p, int) {
  uint16_t scale;
  __builtin_memcpy(&scale, p, sizeof scale);
  return broadcast(from_bf16(scale));
}
