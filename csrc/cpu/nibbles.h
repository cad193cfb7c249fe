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

// A group's products are summed before they are scaled.
template <bool Whole, int R>
inline void dot_nibble_block(const Rows<Type::i4, R>& rows, int64_t size, int64_t d, const float* x, Vec (&sums)[R]) {
  NibbleBlock blocks[R];
  Vec products[R];
  for (int r = 0; r < R; ++r) blocks[r] = NibbleBlock::at<Whole>(rows.now[r], size, d);
  for (auto& product : products) product = zero();
  for (int k = kNibbles; k-- > 0;) {
    Vec token = load(x + k * kLanes);
    for (int r = 0; r < R; ++r) products[r] = fma(next_nibble(blocks[r].left), token, products[r]);
  }
  for (int r = 0; r < R; ++r) sums[r] = fma(products[r], blocks[r].scales, sums[r]);
}

// out[r] = the dot product of row r with the token, float32 in expanded order.
template <int R>
inline void dot_nibbles(const Rows<Type::i4, R>& rows, int64_t size, const float* x, float* out) {
  Vec sums[R];
  for (auto& value : sums) value = zero();
  int64_t d = 0;
  for (; d + kBlock <= size; d += kBlock) {
    rows.prefetch(d);
    dot_nibble_block<true>(rows, size, d, x + d, sums);
  }
  if (d < size) {
    rows.prefetch(d);
    dot_nibble_block<false>(rows, size, d, x + d, sums);
  }
  for (int r = 0; r < R; ++r) out[r] = sum(sums[r]);
}

template <bool Whole, int R>
inline void down_nibble_block(const Rows<Type::i4, R>& rows, int64_t size, int64_t d, const float* a, float* partial) {
  Vec sums[kNibbles];
  for (int k = 0; k < kNibbles; ++k) sums[k] = load(partial + k * kLanes);
  for (int r = 0; r < R; ++r) {
    NibbleBlock block = NibbleBlock::at<Whole>(rows.now[r], size, d);
    Vec factor = mul(block.scales, broadcast(a[r]));
    for (int k = kNibbles; k-- > 0;) sums[k] = fma(next_nibble(block.left), factor, sums[k]);
  }
  for (int k = 0; k < kNibbles; ++k) store(partial + k * kLanes, sums[k]);
}

// partial += sum over r of a[r] * row r.
template <int R>
inline void down_nibbles(const Rows<Type::i4, R>& rows, int64_t size, const float* a, float* partial) {
  int64_t d = 0;
  for (; d + kBlock <= size; d += kBlock) {
    rows.prefetch(d);
    down_nibble_block<true>(rows, size, d, a, partial + d);
  }
  if (d < size) {
    rows.prefetch(d);
    down_nibble_block<false>(rows, size, d, a, partial + d);
  }
}
