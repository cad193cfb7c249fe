// For instruction sets that multiply neither pairs of bfloat16 nor bytes.

constexpr bool kDotBf16 = false;
inline Vec dot_bf16(Vec sums, const uint16_t*, const uint16_t*) { return sums; }
inline bool fits_bytes(const Call&) { return false; }
inline int64_t bytes_of_token(const Call&, int64_t) { return 0; }
inline void pack_bytes(const Call&, const Workspace&) {}
template <int R, Type W>
inline void dot_bytes(const Rows<W, R>&, int64_t, const Workspace&, float*) {}
struct Pairs;
