// AVX-512 BF16: products of bfloat16 pairs, added in float32.

constexpr bool kDotBf16 = true;
inline __m512bh load_pairs(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline Vec dot_bf16(Vec sums, const uint16_t* a, const uint16_t* b) {
  return _mm512_dpbf16_ps(sums, load_pairs(a), load_pairs(b));
}
