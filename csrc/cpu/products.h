// One token: dot products with rows, and sums of down rows, in registers. Included by each instruction set's source
// file, inside that file's own namespace.

template <Type W, int R>
inline void dot_line(const Element<W>* const (&rows)[R], int64_t d, const float* x, Vec (&sums)[R]) {
  constexpr int V = Weights<W>::kVectors;
  for (int b = 0; b < line(W); b += V * kLanes) {
    Vec w[R][V];
    for (int r = 0; r < R; ++r) Weights<W>::unpack(rows[r] + d + b, w[r]);
    for (int v = 0; v < V; ++v) {
      Vec token = load(x + b + v * kLanes);
      for (int r = 0; r < R; ++r) sums[r] = fma(w[r][v], token, sums[r]);
    }
  }
}

template <Type W, int R>
inline void dot_line(const Element<W>* const (&rows)[R], int64_t d, const uint16_t* x, Vec (&sums)[R]) {
  for (int b = 0; b < line(W); b += 2 * kLanes)
    for (int r = 0; r < R; ++r) sums[r] = dot_bf16(sums[r], rows[r] + d + b, x + b);
}

// out[r] = the dot product of row r with the token, which is float32 in expanded order, or bfloat16.
template <Type W, int R, class Token>
inline void dot(const Rows<W, R>& rows, int64_t size, const Token* x, float* out) {
  Vec sums[R];
  for (auto& value : sums) value = zero();
  int64_t d = 0;
  for (; d + line(W) <= size; d += line(W)) {
    rows.prefetch(d);
    dot_line<W, R>(rows.now, d, x + d, sums);
  }
  if (d < size) {
    rows.prefetch(d);
    Tail<W, R> tail(rows, d, size - d);
    const Element<W>* lines[R];
    for (int r = 0; r < R; ++r) lines[r] = tail.lines[r];
    dot_line<W, R>(lines, 0, x + d, sums);
  }
  for (int r = 0; r < R; ++r) out[r] = sum(sums[r]);
}

template <Type W, int R>
inline void down_line(const Element<W>* const (&rows)[R], int64_t d, const float* a, float* partial) {
  constexpr int V = Weights<W>::kVectors;
  for (int b = 0; b < line(W); b += V * kLanes) {
    Vec sums[V];
    for (int v = 0; v < V; ++v) sums[v] = load(partial + b + v * kLanes);
    for (int r = 0; r < R; ++r) {
      Vec w[V], factor = broadcast(a[r]);
      Weights<W>::unpack(rows[r] + d + b, w);
      for (int v = 0; v < V; ++v) sums[v] = fma(factor, w[v], sums[v]);
    }
    for (int v = 0; v < V; ++v) store(partial + b + v * kLanes, sums[v]);
  }
}

// partial += sum over r of a[r] * row r.
template <Type W, int R>
inline void down(const Rows<W, R>& rows, int64_t size, const float* a, float* partial) {
  int64_t d = 0;
  for (; d + line(W) <= size; d += line(W)) {
    rows.prefetch(d);
    down_line<W, R>(rows.now, d, a, partial + d);
  }
  if (d < size) {
    rows.prefetch(d);
    Tail<W, R> tail(rows, d, size - d);
    const Element<W>* lines[R];
    for (int r = 0; r < R; ++r) lines[r] = tail.lines[r];
    down_line<W, R>(lines, 0, a, partial + d);
  }
}
