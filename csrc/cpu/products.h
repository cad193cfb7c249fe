// Dot products of rows with tokens, and sums of down rows, in registers. Included by each instruction set's source
// file, inside that file's own namespace.

// Rows times tokens whose dot products are held in registers at once.
constexpr int kRows = kLanes == 16 ? 4 : 2;
constexpr int kTokens = kLanes == 4 ? 2 : 4;

template <Type W, int R, int T>
inline void dot_line(const Element<W>* const (&rows)[R], int64_t d, const float* x, int64_t stride, Vec (&sums)[R][T]) {
  constexpr int V = Weights<W>::kVectors;
  for (int b = 0; b < line(W); b += V * kLanes) {
    Vec w[R][V];
    for (int r = 0; r < R; ++r) Weights<W>::unpack(rows[r] + d + b, w[r]);
    for (int v = 0; v < V; ++v) {
      for (int t = 0; t < T; ++t) {
        Vec token = load(x + t * stride + b + v * kLanes);
        for (int r = 0; r < R; ++r) sums[r][t] = fma(w[r][v], token, sums[r][t]);
      }
    }
  }
}

template <Type W, int R, int T>
inline void dot_line(const Element<W>* const (&rows)[R], int64_t d, const uint16_t* x, int64_t stride,
                     Vec (&sums)[R][T]) {
  for (int b = 0; b < line(W); b += 2 * kLanes)
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) sums[r][t] = dot_bf16(sums[r][t], rows[r] + d + b, x + t * stride + b);
}

// out[r * out_stride + t] = the dot product of row r with token t. Tokens are float32 in expanded order, or bfloat16.
template <Type W, int R, int T, bool Prefetch, class Token>
inline void dot(const Rows<W, R>& rows, int64_t size, const Token* x, int64_t stride, float* out, int64_t out_stride) {
  Vec sums[R][T];
  for (auto& row : sums)
    for (auto& value : row) value = zero();
  int64_t d = 0;
  for (; d + line(W) <= size; d += line(W)) {
    if (Prefetch) rows.prefetch(d);
    dot_line<W, R, T>(rows.now, d, x + d, stride, sums);
  }
  if (d < size) {
    if (Prefetch) rows.prefetch(d);
    Tail<W, R> tail(rows, d, size - d);
    const Element<W>* lines[R];
    for (int r = 0; r < R; ++r) lines[r] = tail.lines[r];
    dot_line<W, R, T>(lines, 0, x + d, stride, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[r * out_stride + t] = sum(sums[r][t]);
}

template <Type W, int R, bool One>
inline void down_line(const Element<W>* const (&rows)[R], int64_t d, const float* a, int64_t a_stride, int64_t tokens,
                      float* partial, int64_t stride) {
  constexpr int V = Weights<W>::kVectors;
  for (int b = 0; b < line(W); b += V * kLanes) {
    Vec w[R][V];
    for (int r = 0; r < R; ++r) Weights<W>::unpack(rows[r] + d + b, w[r]);
    for (int64_t t = 0; t < (One ? 1 : tokens); ++t) {
      float* p = partial + t * stride + b;
      Vec sums[V];
      for (int v = 0; v < V; ++v) sums[v] = load(p + v * kLanes);
      for (int r = 0; r < R; ++r) {
        Vec factor = broadcast(a[r * a_stride + t]);
        for (int v = 0; v < V; ++v) sums[v] = fma(factor, w[r][v], sums[v]);
      }
      for (int v = 0; v < V; ++v) store(p + v * kLanes, sums[v]);
    }
  }
}

// partial[t] += sum over r of a[r][t] * row r.
template <Type W, int R, bool One>
inline void down(const Rows<W, R>& rows, int64_t size, const float* a, int64_t a_stride, int64_t tokens, float* partial,
                 int64_t stride) {
  int64_t d = 0;
  for (; d + line(W) <= size; d += line(W)) {
    rows.prefetch(d);
    down_line<W, R, One>(rows.now, d, a, a_stride, tokens, partial + d, stride);
  }
  if (d < size) {
    rows.prefetch(d);
    Tail<W, R> tail(rows, d, size - d);
    const Element<W>* lines[R];
    for (int r = 0; r < R; ++r) lines[r] = tail.lines[r];
    down_line<W, R, One>(lines, 0, a, a_stride, tokens, partial + d, stride);
  }
}
