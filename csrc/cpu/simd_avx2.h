// Eight floats with AVX2, FMA and F16C. Included by one source file, inside that file's own namespace.

constexpr int kLanes = 8;
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float a) { return _mm256_set1_ps(a); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
// b where a < 0, else c.
inline Vec where_negative(Vec a, Vec b, Vec c) { return _mm256_blendv_ps(c, b, _mm256_cmp_ps(a, zero(), _CMP_LT_OQ)); }
// 2^n for whole n in [-126, 127].
inline Vec power_of_two(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// The sums of four vectors.
__attribute__((always_inline)) inline void sum_four(const Vec (&a)[4], float* out) {
  Vec low = add(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
  Vec high = add(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
  Vec all = add(_mm256_shuffle_ps(low, high, 0x44), _mm256_shuffle_ps(low, high, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

// Even and odd elements of 16 floats, and back.
inline void deinterleave(Vec low, Vec high, Vec& even, Vec& odd) {
  __m256 outer = _mm256_permute2f128_ps(low, high, 0x20);
  __m256 inner = _mm256_permute2f128_ps(low, high, 0x31);
  even = _mm256_shuffle_ps(outer, inner, 0x88);
  odd = _mm256_shuffle_ps(outer, inner, 0xdd);
}
inline void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
  __m256 first = _mm256_unpacklo_ps(even, odd);
  __m256 second = _mm256_unpackhi_ps(even, odd);
  low = _mm256_permute2f128_ps(first, second, 0x20);
  high = _mm256_permute2f128_ps(first, second, 0x31);
}

// A line of bfloat16 is unpacked by shift and mask: even elements, then odd ones.
template <>
struct Weights<Type::bf16> {
  using Element = uint16_t;
  static constexpr int kVectors = 2;
  static inline void unpack(const Element* p, Vec (&out)[2]) {
    __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

// Eight values, to and from floats; rounded to the nearest, ties to even.
template <>
struct Values<Type::f32> {
  using Element = float;
  static inline Vec get(const Element* p) { return load(p); }
  static inline void put(Element* p, Vec a) { store(p, a); }
};

template <>
struct Values<Type::bf16> {
  using Element = uint16_t;
  static inline Vec get(const Element* p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static inline void put(Element* p, Vec a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc0), nan);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
};

template <>
struct Values<Type::f16> {
  using Element = uint16_t;
  static inline Vec get(const Element* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline void put(Element* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
struct Values<Type::i8> {
  using Element = int8_t;
  static inline Vec get(const Element* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
};

// Eight words of eight int4 weights each; of the last block of a row only one group may be read.
using Nibbles = __m256i;
template <bool Whole>
inline Nibbles load_nibbles(const uint8_t* p, int) {
  if (Whole) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The weight in the highest half of each word, which is then shifted out.
inline Vec next_nibble(Nibbles& left) {
  __m256i found = _mm256_srai_epi32(left, 28);
  left = _mm256_slli_epi32(left, 4);
  return _mm256_cvtepi32_ps(found);
}
// Two scales, each in four lanes.
template <bool Whole>
inline Vec load_scales(const uint8_t* p, int) {
  int32_t two = 0;
  __builtin_memcpy(&two, p, Whole ? 4 : 2);
  const __m256i words =
      _mm256_setr_epi32(0x01008080, 0x01008080, 0x01008080, 0x01008080, 0x03028080, 0x03028080, 0x03028080, 0x03028080);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(two), words));
}
