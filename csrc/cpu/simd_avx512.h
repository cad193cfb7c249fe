// Sixteen floats with AVX-512 (F, BW, VL, DQ). Included by one source file, inside that file's own namespace.

constexpr int kLanes = 16;
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float a) { return _mm512_set1_ps(a); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
// b where a < 0, else c.
inline Vec where_negative(Vec a, Vec b, Vec c) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, zero(), _CMP_LT_OQ), c, b);
}
// 2^n for whole n in [-126, 127].
inline Vec power_of_two(Vec n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline float sum(Vec a) {
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
// The sums of four vectors.
__attribute__((always_inline)) inline void sum_four(const Vec (&a)[4], float* out) {
  Vec low = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  Vec high = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  Vec all = add(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// Even and odd elements of 32 floats, and back.
inline void deinterleave(Vec low, Vec high, Vec& even, Vec& odd) {
  const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even = _mm512_permutex2var_ps(low, evens, high);
  odd = _mm512_permutex2var_ps(low, _mm512_or_si512(evens, _mm512_set1_epi32(1)), high);
}
inline void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
  const __m512i lows = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  low = _mm512_permutex2var_ps(even, lows, odd);
  high = _mm512_permutex2var_ps(even, _mm512_add_epi32(lows, _mm512_set1_epi32(8)), odd);
}

// A line of bfloat16 is unpacked by shift and mask: even elements, then odd ones.
template <>
struct Weights<Type::bf16> {
  using Element = uint16_t;
  static constexpr int kVectors = 2;
  static inline void unpack(const Element* p, Vec (&out)[2]) {
    __m512i pairs = _mm512_loadu_si512(p);
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

// Sixteen values, to and from floats; rounded to the nearest, ties to even.
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
    __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static inline void put(Element* p, Vec a) {
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
  }
};

template <>
struct Values<Type::f16> {
  using Element = uint16_t;
  static inline Vec get(const Element* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline void put(Element* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
struct Values<Type::i8> {
  using Element = int8_t;
  static inline Vec get(const Element* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
};

// Sixteen words of eight int4 weights each; of the last block of a row only some groups may be read.
using Nibbles = __m512i;
template <bool Whole>
inline Nibbles load_nibbles(const uint8_t* p, int groups) {
  if (Whole) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << 4 * groups) - 1), p);
}
// The weight in the highest half of each word, which leaves it. The lookup sees only the lowest four bits.
inline Vec next_nibble(Nibbles& left) {
  const Vec table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  left = _mm512_rol_epi32(left, 4);
  return _mm512_permutexvar_ps(left, table);
}
// Four scales, each in four lanes.
template <bool Whole>
inline Vec load_scales(const uint8_t* p, int groups) {
  auto* from = reinterpret_cast<const __m128i*>(p);
  __m128i four = Whole ? _mm_loadl_epi64(from) : _mm_maskz_loadu_epi16(static_cast<__mmask8>((1u << groups) - 1), from);
  const __m512i words =
      _mm512_setr_epi32(0x01008080, 0x01008080, 0x01008080, 0x01008080, 0x03028080, 0x03028080, 0x03028080, 0x03028080,
                        0x05048080, 0x05048080, 0x05048080, 0x05048080, 0x07068080, 0x07068080, 0x07068080, 0x07068080);
  return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_broadcastq_epi64(four), words));
}
