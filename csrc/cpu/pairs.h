// The product of blocks.h in AVX-512 BF16: bfloat16 in pairs, of elements in dot products and of neurons in sums of
// down rows. Included after blocks.h.

struct Pairs {
  using Element = uint16_t;
  using Vector = __m512i;
  static constexpr int kDepth = 2 * kLanes;
  static constexpr int kNeurons = 2;
  static constexpr Type kInPlace = Type::bf16;

  static inline Vector get(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static inline void put(uint16_t* p, Vector a) { _mm512_storeu_si512(p, a); }
  static inline Vector halves(Vec first, Vec second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
  static inline Vector of(const Vec* values) { return halves(values[0], values[1]); }
  static inline Vec add_product(Vec sums, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
  }
  static inline Vector spread(const uint16_t* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static inline const uint16_t* hidden(const float* values, int64_t size, uint16_t* out) {
    for (int64_t i = 0; i < size; i += kDepth)
      _mm512_store_si512(out + i, halves(load(values + i), load(values + i + kLanes)));
    return out;
  }

  // Columns of two neurons from d on, as pairs.
  template <Type W>
  static inline void stage(const typename Weights<W>::Element* const* rows, int64_t count, int64_t size, int64_t d,
                           Vector* out, int64_t apart) {
    if constexpr (W == Type::bf16) {
      // Even columns, then odd ones.
      const Vector high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
      __mmask32 inside = size - d < kDepth ? (1u << (size - d)) - 1 : ~0u;
      auto line_of = [&](const uint16_t* row) { return _mm512_maskz_loadu_epi16(inside, row + d); };
      Vector first = line_of(rows[0]), second = count > 1 ? line_of(rows[1]) : _mm512_setzero_si512();
      out[0] = _mm512_or_si512(_mm512_andnot_si512(high, first), _mm512_slli_epi32(second, 16));
      out[1] = _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(high, second));
    } else {
      const Vector turns = _mm512_or_si512(
          _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
          _mm512_slli_epi32(_mm512_set_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16), 16));
      Vec first[kWritten<W>], second[kWritten<W>] = {};
      written_out<W>(rows[0], size, d, first);
      if (count > 1) written_out<W>(rows[1], size, d, second);
      for (int n = 0; n < kWritten<W>; ++n)
        out[n / 2 * apart + n % 2] = _mm512_permutexvar_epi16(turns, halves(first[n], second[n]));
    }
  }
};
