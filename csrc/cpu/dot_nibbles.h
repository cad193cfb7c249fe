// VNNI for int4: weights as bytes of 0 .. 15, the integer plus 8, times a token in fixed point; exact for each group,
// where eight products and their carries stay within 32 bits. Included after dot_bytes.h.
//
// A token is held as x = step * (d0 + 256 d1 + 65536 d2), each digit a signed byte. Of a line of 128 weights, whose low
// and high halves are one vector of bytes each, it has six vectors, digits from the last to the first; and a seventh,
// which takes away what the plus 8 adds: -8 times the sum of the eight elements that share a lane.

constexpr int64_t kNibbleVectors = 2 * kPlanes + 1;
// Digits add to at most 127 * 65793 and at least -128 * 65793; rounding may add one.
constexpr float kLargestDigits = 8355710.0f;

inline int64_t bytes_of_token(const Call& p, int64_t padded) {
  return (p.weight_type == Type::i4 ? kNibbleVectors * padded / 2 : kPlanes * padded) + kLineBytes;
}

inline void pack_nibble_token(const float* x, int64_t padded, char* out) {
  const __m512i middle = _mm512_set1_epi32(0x00808080), byte = _mm512_set1_epi32(0xff);
  float factor = token_factor(x, padded, kLargestDigits);
  auto* to = reinterpret_cast<__m512i*>(out);
  for (int64_t d = 0; d < padded; d += kBlock, to += kNibbleVectors) {
    __m512i u[kNibbles], total = _mm512_setzero_si512();
    for (int k = 0; k < kNibbles; ++k) {
      __m512i value = _mm512_cvtps_epi32(mul(load(x + d + k * kLanes), broadcast(factor)));
      total = _mm512_add_epi32(total, value);
      u[k] = _mm512_add_epi32(value, middle);  // its bytes are the digits plus 128
    }
    for (int plane = 0; plane < kPlanes; ++plane)
      for (int half = 0; half < 2; ++half) {
        __m512i digits = _mm512_setzero_si512();
        for (int k = kNibbles - 2; k >= 0; k -= 2) {
          __m512i one = _mm512_and_si512(_mm512_srl_epi32(u[k + half], _mm_cvtsi32_si128(8 * plane)), byte);
          digits = _mm512_or_si512(_mm512_slli_epi32(digits, 8), one);
        }
        digits = _mm512_xor_si512(digits, _mm512_set1_epi8(static_cast<char>(0x80)));
        _mm512_store_si512(to + (kPlanes - 1 - plane) * 2 + half, digits);
      }
    _mm512_store_si512(to + 2 * kPlanes, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(total, 3)));
  }
  float step = 1.0f / factor;
  __builtin_memcpy(to, &step, sizeof step);
}

inline void pack_bytes(const Call& p, const Workspace& ws) {
  if (p.weight_type == Type::i8) return pack_token_of(p, ws);
  alignas(kLineBytes) float x[kMaxBytesWidth];
  if (p.x_type == Type::bf16)
    pack_as<Type::i4, Type::bf16>(p, x, ws.padded);
  else
    pack_as<Type::i4, Type::f16>(p, x, ws.padded);
  pack_nibble_token(x, ws.padded, static_cast<char*>(ws.tokens));
}

template <bool Whole, int R>
inline void add_nibble_line(const Rows<Type::i4, R>& rows, int64_t size, int64_t d, const __m512i* x, Vec (&sums)[R]) {
  const __m512i low = _mm512_set1_epi8(0x0f), eight = _mm512_set1_epi8(8);
  __m512i digits[kNibbleVectors];
  for (int i = 0; i < kNibbleVectors; ++i) digits[i] = _mm512_load_si512(x + i);
  for (int r = 0; r < R; ++r) {
    NibbleBlock block = NibbleBlock::at<Whole>(rows.now[r], size, d);
    // (bits & low) ^ eight
    __m512i first = _mm512_ternarylogic_epi32(block.left, low, eight, 0x6a);
    __m512i second = _mm512_ternarylogic_epi32(_mm512_srli_epi32(block.left, 4), low, eight, 0x6a);
    __m512i total = _mm512_setzero_si512();
    for (int plane = 0; plane < kPlanes; ++plane) {
      if (plane > 0) total = _mm512_slli_epi32(total, 8);
      add_products(total, first, digits[2 * plane]);
      add_products(total, second, digits[2 * plane + 1]);
    }
    total = _mm512_add_epi32(total, digits[2 * kPlanes]);
    sums[r] = fma(_mm512_cvtepi32_ps(total), block.scales, sums[r]);
  }
}

// out[r] = the dot product of row r with the token.
template <int R>
inline void dot_bytes(const Rows<Type::i4, R>& rows, int64_t size, const Workspace& ws, float* out) {
  auto* x = static_cast<const __m512i*>(ws.tokens);
  Vec sums[R];
  for (auto& value : sums) value = zero();
  int64_t d = 0;
  for (; d + kBlock <= size; d += kBlock, x += kNibbleVectors) {
    rows.prefetch(d);
    add_nibble_line<true>(rows, size, d, x, sums);
  }
  if (d < size) {
    rows.prefetch(d);
    add_nibble_line<false>(rows, size, d, x, sums);
    x += kNibbleVectors;
  }
  float step;
  __builtin_memcpy(&step, x, sizeof step);
  for (int r = 0; r < R; ++r) out[r] = sum(sums[r]) * step;
}
