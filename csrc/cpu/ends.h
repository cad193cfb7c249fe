// The two ends of a call: tokens into expanded order, and partials into the output, of one FFN or of a token's experts.
// Included by each instruction set's
// source file, inside that file's own namespace.

// Blocks of four floats, which int4 keeps together: block k of group g to block g of vector k, and back.
template <int V>
inline void move_fours(Vec (&values)[V], bool to_natural) {
  constexpr int kGroups = kLanes / 4;
  alignas(kLineBytes) float from[V * kLanes], to[V * kLanes];
  for (int v = 0; v < V; ++v) store(from + v * kLanes, values[v]);
  for (int v = 0; v < V; ++v)
    for (int g = 0; g < kGroups; ++g) {
      int natural = 4 * (g * V + v), expanded = 4 * (v * kGroups + g);
      __builtin_memcpy(to + (to_natural ? natural : expanded), from + (to_natural ? expanded : natural),
                       4 * sizeof(float));
    }
  for (int v = 0; v < V; ++v) values[v] = load(to + v * kLanes);
}

template <int V>
inline void to_expanded(Vec (&values)[V]) {
  if constexpr (V == 2) deinterleave(values[0], values[1], values[0], values[1]);
  if constexpr (V == kNibbles) move_fours<V>(values, false);
}

template <int V>
inline void to_natural(Vec (&values)[V]) {
  if constexpr (V == 2) interleave(values[0], values[1], values[0], values[1]);
  if constexpr (V == kNibbles) move_fours<V>(values, true);
}

// One token.
template <Type W, Type X>
inline void pack_as(const Call& p, float* out, int64_t padded) {
  constexpr int V = Weights<W>::kVectors;
  auto* x = static_cast<const typename Values<X>::Element*>(p.x);
  for (int64_t d = 0; d < padded; d += V * kLanes) {
    Vec values[V];
    get_block<X, V>(x + d, p.hidden_size - d, values);
    to_expanded<V>(values);
    for (int v = 0; v < V; ++v) store(out + d + v * kLanes, values[v]);
  }
}

// The sum of all partials of one token at the block from column d on, in expanded order.
template <int V>
inline void sum_block(const Workspace& ws, int64_t slabs, int64_t t, int64_t d, Vec (&sums)[V]) {
  for (int v = 0; v < V; ++v) {
    const float* partial = ws.partials + ws.offset(t, d + v * kLanes);
    sums[v] = load(partial);
    for (int64_t s = 1; s < slabs; ++s) {
      partial += ws.rows * ws.padded;
      sums[v] = add(sums[v], load(partial));
    }
  }
}

// Writes one block in natural order, of which `count` values belong to the output.
template <Type X, int V>
inline void put_block(const Vec (&sums)[V], typename Values<X>::Element* out, int64_t count) {
  typename Values<X>::Element rest[V * kLanes];
  bool whole = count >= V * kLanes;
  for (int v = 0; v < V; ++v) Values<X>::put((whole ? out : rest) + v * kLanes, sums[v]);
  if (!whole) __builtin_memcpy(out, rest, count * sizeof rest[0]);
}

template <Type W, Type X>
inline void finish_columns(const Call& p, const Workspace& ws, int64_t slabs, int64_t t, int64_t first, int64_t last) {
  using Value = typename Values<X>::Element;
  constexpr int V = Weights<W>::kVectors;
  auto* bias = static_cast<const Value*>(p.down_bias);
  Value* out = static_cast<Value*>(p.out) + t * p.hidden_size;
  for (int64_t d = first; d < last; d += V * kLanes) {
    Vec sums[V];
    sum_block<V>(ws, slabs, t, d, sums);
    to_natural<V>(sums);
    if (bias) {
      Vec values[V];
      get_block<X, V>(bias + d, last - d, values);
      for (int v = 0; v < V; ++v) sums[v] = add(sums[v], values[v]);
    }
    put_block<X, V>(sums, out + d, last - d);
  }
}

template <Type W, Type X>
inline void finish_as(const Call& p, const Workspace& ws, int64_t slabs, int64_t first, int64_t last) {
  int64_t pieces = finish_pieces(p.hidden_size);
  for (int64_t i = first; i < last; ++i) {
    int64_t d = i % pieces * kFinishColumns;
    int64_t end = p.hidden_size - d < kFinishColumns ? p.hidden_size : d + kFinishColumns;
    finish_columns<W, X>(p, ws, slabs, i / pieces, d, end);
  }
}

// Columns [first, last) of one token: the sum of what its experts gave, weighted, in the order of `given`.
template <Type W, Type X>
inline void combine_as(const Contribution* given, int64_t count, int64_t first, int64_t last, void* row) {
  constexpr int V = Weights<W>::kVectors;
  auto* out = static_cast<typename Values<X>::Element*>(row);
  for (int64_t d = first; d < last; d += V * kLanes) {
    Vec total[V];
    for (int v = 0; v < V; ++v) total[v] = zero();
    for (int64_t i = 0; i < count; ++i) {
      const Workspace& ws = *given[i].workspace;
      Vec sums[V];
      sum_block<V>(ws, given[i].slabs, given[i].token, d, sums);
      for (int v = 0; v < V; ++v) total[v] = fma(broadcast(given[i].weight), sums[v], total[v]);
    }
    to_natural<V>(total);
    put_block<X, V>(total, out + d, last - d);
  }
}

template <Type X>
inline void write_out_as(const Call& p, int64_t first, int64_t last) {
  using Value = typename Values<X>::Element;
  const int64_t size = p.hidden_size;
  for (int64_t n = first; n < last; ++n)
    for (int64_t part = 0; part < p.parts(); ++part) {
      auto* row = static_cast<const uint8_t*>(p.record) + n * p.record_stride + part * p.part();
      Value* out = static_cast<Value*>(p.out) + (n * p.parts() + part) * size;
      for (int64_t d = 0; d < size; d += kBlock) {
        NibbleBlock block = d + kBlock <= size ? NibbleBlock::whole(row, size, d) : NibbleBlock::rest(row, size, d);
        Vec values[kNibbles];
        for (int k = kNibbles; k-- > 0;) values[k] = mul(next_nibble(block.left), block.scales);
        to_natural<kNibbles>(values);
        Value rest[kBlock];
        bool whole = d + kBlock <= size;
        for (int v = 0; v < kNibbles; ++v) Values<X>::put((whole ? out + d : rest) + v * kLanes, values[v]);
        if (!whole) __builtin_memcpy(out + d, rest, (size - d) * sizeof(Value));
      }
    }
}
