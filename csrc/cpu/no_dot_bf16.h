// For instruction sets that multiply no pairs of bfloat16.

constexpr bool kDotBf16 = false;
inline Vec dot_bf16(Vec sums, const uint16_t*, const uint16_t*) { return sums; }
