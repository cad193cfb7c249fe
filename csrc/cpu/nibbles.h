// int4 rows: dot products with tokens, and sums of down rows. Included by each instruction set's source file, inside
// that file's own namespace, after rows.h.
//
// A vector of 32-bit words is unpacked by shifts into eight vectors of floats (the layout: pyprune/base/int4.py), the
// last one first, for so the sign comes with one shift; and every four lanes have one scale. So the expanded order of a
// block of 8 * kLanes weights is, in vector k, lanes 4g .. 4g + 3: elements 4k .. 4k + 3 of group g.

constexpr int kBlock = kNibbles * kLanes;  // weights

// So many bytes lie between what is read and what is prefetched, or more.
constexpr int64_t kLeadBytes = 8 << 10;

// Prefetches neurons to come, one run of memory after another. A part of an int4 row is a few lines: to prefetch each
// row of a group beside the one that is read, as wider types do, shows the hardware's prefetcher many short runs, which
// it does not follow.
struct Lead {
  const uint8_t* rows[kMostInGroup];
  int count;
  int64_t size;  // bytes of a row
  int64_t at = 0;
  int row = 0;

  // For each line of pairs that is read: with what it has of scales.
  inline void line() {
    __builtin_prefetch(rows[row] + at);
    at += kLineBytes + kLineBytes / 8;
    if (at >= size && row + 1 < count) at -= size, ++row;
  }
};

template <int R>
struct Rows<Type::i4, R> {
  const uint8_t* now[R];
  Lead* lead;

  inline void prefetch(int64_t d) const {
    for (int r = 0; d % line(Type::i4) == 0 && r < R; ++r) lead->line();
  }
};

// A block of one row: words whose highest halves come next, and the scale of each lane.
struct NibbleBlock {
  Nibbles left;
  Vec scales;

  static inline NibbleBlock whole(const uint8_t* row, int64_t size, int64_t d) {
    constexpr int kGroups = kLanes / 4;
    return {load_nibbles<true>(row + d / 2, kGroups), load_scales<true>(row + size / 2 + d / 16, kGroups)};
  }
  // The last block, of fewer groups; behind them weights are zeros.
  static inline NibbleBlock rest(const uint8_t* row, int64_t size, int64_t d) {
    int groups = static_cast<int>((size - d) / kScaleGroup);
    return {load_nibbles<false>(row + d / 2, groups), load_scales<false>(row + size / 2 + d / 16, groups)};
  }
  template <bool Whole>
  static inline NibbleBlock at(const uint8_t* row, int64_t size, int64_t d) {
    return Whole ? whole(row, size, d) : rest(row, size, d);
  }
};

// With one token a group's products are summed before they are scaled; with more, weights are scaled once for all.
template <bool Whole, int R, int T>
inline void dot_block(const Rows<Type::i4, R>& rows, int64_t size, int64_t d, const float* x, int64_t stride,
                      Vec (&sums)[R][T]) {
  NibbleBlock blocks[R];
  for (int r = 0; r < R; ++r) blocks[r] = NibbleBlock::at<Whole>(rows.now[r], size, d);
  if constexpr (T == 1) {
    Vec products[R];
    for (auto& product : products) product = zero();
    for (int k = kNibbles; k-- > 0;) {
      Vec token = load(x + k * kLanes);
      for (int r = 0; r < R; ++r) products[r] = fma(next_nibble(blocks[r].left), token, products[r]);
    }
    for (int r = 0; r < R; ++r) sums[r][0] = fma(products[r], blocks[r].scales, sums[r][0]);
  } else {
    for (int k = kNibbles; k-- > 0;) {
      Vec w[R];
      for (int r = 0; r < R; ++r) w[r] = mul(next_nibble(blocks[r].left), blocks[r].scales);
      for (int t = 0; t < T; ++t) {
        Vec token = load(x + t * stride + k * kLanes);
        for (int r = 0; r < R; ++r) sums[r][t] = fma(w[r], token, sums[r][t]);
      }
    }
  }
}

// out[r * out_stride + t] = the dot product of row r with token t, float32 in expanded order.
template <int R, int T, bool Prefetch>
inline void dot_nibbles(const Rows<Type::i4, R>& rows, int64_t size, const float* x, int64_t stride, float* out,
                        int64_t out_stride) {
  Vec sums[R][T];
  for (auto& row : sums)
    for (auto& value : row) value = zero();
  int64_t d = 0;
  for (; d + kBlock <= size; d += kBlock) {
    if (Prefetch) rows.prefetch(d);
    dot_block<true>(rows, size, d, x + d, stride, sums);
  }
  if (d < size) {
    if (Prefetch) rows.prefetch(d);
    dot_block<false>(rows, size, d, x + d, stride, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[r * out_stride + t] = sum(sums[r][t]);
}

template <bool Whole, bool One, int R>
inline void down_block(const Rows<Type::i4, R>& rows, int64_t size, int64_t d, const float* a, int64_t a_stride,
                       int64_t tokens, float* partial, int64_t stride) {
  if constexpr (One) {
    Vec sums[kNibbles];
    for (int k = 0; k < kNibbles; ++k) sums[k] = load(partial + k * kLanes);
    for (int r = 0; r < R; ++r) {
      NibbleBlock block = NibbleBlock::at<Whole>(rows.now[r], size, d);
      Vec factor = mul(block.scales, broadcast(a[r * a_stride]));
      for (int k = kNibbles; k-- > 0;) sums[k] = fma(next_nibble(block.left), factor, sums[k]);
    }
    for (int k = 0; k < kNibbles; ++k) store(partial + k * kLanes, sums[k]);
  } else {
    constexpr int V = kLanes == 16 ? 4 : 2;  // as many as registers hold
    NibbleBlock blocks[R];
    for (int r = 0; r < R; ++r) blocks[r] = NibbleBlock::at<Whole>(rows.now[r], size, d);
    for (int k = kNibbles - V; k >= 0; k -= V) {
      Vec w[R][V];
      for (int r = 0; r < R; ++r)
        for (int v = V; v-- > 0;) w[r][v] = mul(next_nibble(blocks[r].left), blocks[r].scales);
      for (int64_t t = 0; t < tokens; ++t) {
        float* p = partial + t * stride + k * kLanes;
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
}

// partial[t] += sum over r of a[r][t] * row r.
template <int R, bool One>
inline void down_nibbles(const Rows<Type::i4, R>& rows, int64_t size, const float* a, int64_t a_stride, int64_t tokens,
                         float* partial, int64_t stride) {
  int64_t d = 0;
  for (; d + kBlock <= size; d += kBlock) {
    rows.prefetch(d);
    down_block<true, One>(rows, size, d, a, a_stride, tokens, partial + d, stride);
  }
  if (d < size) {
    rows.prefetch(d);
    down_block<false, One>(rows, size, d, a, a_stride, tokens, partial + d, stride);
  }
}
