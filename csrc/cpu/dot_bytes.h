// VNNI: dot products of int8 weights with tokens in fixed point, 64 products an instruction where converting weights to
// floats costs twelve instructions. Included by source files inside their own namespace, after ends.h; dot_nibbles.h
// has the same for int4.
//
// A token is held as x = step * (u - 2^23) with u of 24 bits, in three planes of bytes, so that nothing of a bfloat16
// or float16 token is lost beside its largest element. Products are summed exactly in 32-bit integers; the sum of the
// weights, which the 2^23 is multiplied by, costs a fourth instruction.

constexpr int kPlanes = 3;
constexpr float kLargest = 8388606.0f;  // rounding may add one, and 2^23 would be too many bits
// Above this width a sum of products could exceed 32 bits.
constexpr int64_t kMaxBytesWidth = 65536;

// Of one token (of several: blocks.h). And not for float32 tokens: 24 bits beside the largest element are fewer than
// theirs beside each.
inline bool fits_bytes(const Call& p) {
  if ((p.weight_type != Type::i8 && p.weight_type != Type::i4) || p.x_type == Type::f32) return false;
  if (p.tokens != 1 || p.hidden_size > kMaxBytesWidth) return false;
  const uint16_t exponent = p.x_type == Type::bf16 ? 0x7f80 : 0x7c00;
  auto* x = static_cast<const uint16_t*>(p.x);
  bool finite = true;
  for (int64_t d = 0; d < p.hidden_size; ++d) finite &= (x[d] & exponent) != exponent;
  return finite;
}

// What makes integers of a token's elements, the largest `most`.
inline float token_factor(const float* x, int64_t padded, float most) {
  Vec largest = zero();
  for (int64_t d = 0; d < padded; d += kLanes) largest = max(largest, abs(load(x + d)));
  float factor = most / _mm512_reduce_max_ps(largest);
  return factor < 1e38f ? factor : 1e38f;  // of zeros, and of numbers so small that no digit of them matters
}

// The planes of each line one after the other, and `step` behind the last.
inline void pack_token(const float* x, int64_t padded, uint8_t* out) {
  float factor = token_factor(x, padded, kLargest);
  const __m512i offset = _mm512_set1_epi32(1 << 23);
  for (int64_t d = 0; d < padded; d += kLanes) {
    __m512i u = _mm512_add_epi32(_mm512_cvtps_epi32(mul(load(x + d), broadcast(factor))), offset);
    uint8_t* line_of = out + d / kLineBytes * kLineBytes * kPlanes + d % kLineBytes;
    for (int plane = 0; plane < kPlanes; ++plane) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(line_of + plane * kLineBytes), _mm512_cvtepi32_epi8(u));
      u = _mm512_srli_epi32(u, 8);
    }
  }
  float step = 1.0f / factor;
  __builtin_memcpy(out + kPlanes * padded, &step, sizeof step);
}

inline void pack_token_of(const Call& p, const Workspace& ws) {
  constexpr int64_t kVectors = kLineBytes / kLanes;
  alignas(kLineBytes) float x[kMaxBytesWidth];
  auto* from = static_cast<const uint16_t*>(p.x);
  for (int64_t d = 0; d < ws.padded; d += kLineBytes) {
    Vec values[kVectors];
    if (p.x_type == Type::bf16)
      get_block<Type::bf16, kVectors>(from + d, p.hidden_size - d, values);
    else
      get_block<Type::f16, kVectors>(from + d, p.hidden_size - d, values);
    for (int64_t v = 0; v < kVectors; ++v) store(x + d + v * kLanes, values[v]);
  }
  pack_token(x, ws.padded, static_cast<uint8_t*>(ws.tokens));
}

// sums += products of unsigned and signed bytes, four a lane. In assembly because compilers copy the sums around the
// intrinsic.
inline void add_products(__m512i& sums, __m512i u, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(u), "v"(w));
}

template <int R>
struct ByteSums {
  __m512i planes[R][kPlanes];
  __m512i weights[R];

  ByteSums() {
    for (int r = 0; r < R; ++r) {
      weights[r] = _mm512_setzero_si512();
      for (auto& sum : planes[r]) sum = _mm512_setzero_si512();
    }
  }

  inline void add_line(const int8_t* const (&rows)[R], int64_t d, const uint8_t* x) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int r = 0; r < R; ++r) {
      __m512i w = _mm512_loadu_si512(rows[r] + d);
      add_products(weights[r], ones, w);
      for (int i = 0; i < kPlanes; ++i) add_products(planes[r][i], _mm512_load_si512(x + i * kLineBytes), w);
    }
  }

  // The offset of 2^23 is 128 of the last plane, where it is taken away before anything is rounded.
  float total(int r, float step) const {
    __m512i last = _mm512_sub_epi32(planes[r][2], _mm512_slli_epi32(weights[r], 7));
    Vec sums = fma(_mm512_cvtepi32_ps(planes[r][1]), broadcast(256.0f), _mm512_cvtepi32_ps(planes[r][0]));
    return sum(fma(_mm512_cvtepi32_ps(last), broadcast(65536.0f), sums)) * step;
  }
};

// out[r] = the dot product of row r with the token.
template <int R>
inline void dot_bytes(const Rows<Type::i8, R>& rows, int64_t size, const Workspace& ws, float* out) {
  auto* x = static_cast<const uint8_t*>(ws.tokens);
  ByteSums<R> sums;
  int64_t d = 0;
  for (; d + kLineBytes <= size; d += kLineBytes) {
    rows.prefetch(d);
    sums.add_line(rows.now, d, x + kPlanes * d);
  }
  if (d < size) {
    rows.prefetch(d);
    Tail<Type::i8, R> tail(rows, d, size - d);
    const int8_t* lines[R];
    for (int r = 0; r < R; ++r) lines[r] = tail.lines[r];
    sums.add_line(lines, 0, x + kPlanes * d);
  }
  float step;
  __builtin_memcpy(&step, x + kPlanes * ws.padded, sizeof step);
  for (int r = 0; r < R; ++r) out[r] = sums.total(r, step);
}
