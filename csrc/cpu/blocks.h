// Several tokens: blocks of them by rows, each weight read from memory once. Included by each instruction set's source
// file, inside that file's own namespace, after ends.h.
//
// A group of neurons at a time. Their gate and up rows are multiplied with blocks of packed tokens, four rows by some
// tokens in registers; then columns of their down rows are staged, and multiplied with the hidden values of all tokens.
// What that is done in is called the product: bfloat16 in pairs (pairs.h) where both tokens and weights fit it, else
// float32. Rows of other types are written out as that first, once for all tokens.

// What inner loops call is part of them: at a call all vectors would leave their registers. Not the loops themselves:
// among others in one large function they would leave them as well.
#define PYPRUNE_INLINE inline __attribute__((always_inline))

constexpr int kBlockRows = 4;
constexpr int kBlockTokens = kLanes == 16 ? 6 : 3;  // times the rows: as many sums as registers hold
constexpr int kDownTokens = kLanes == 16 ? 8 : 4;
constexpr int64_t kBlockNeurons = 32;
// Columns of rows that are written out, and multiplied before the next ones are.
constexpr int64_t kStagedWidth = 4096;
// Columns of partial sums that lie together, as in Workspace.
constexpr int64_t kChunk = 2 * kLanes;

// Blocks of about the same size, of at most `most` tokens.
struct Blocks {
  int64_t tokens, count;

  Blocks(int64_t all, int64_t most) : tokens(all), count((all + most - 1) / most) {}
  int64_t first(int64_t block) const { return tokens * block / count; }
  int64_t size(int64_t block) const { return first(block + 1) - first(block); }
};

// body(Number<count>()), for a count in [1, Most].
template <int N>
struct Number {
  static constexpr int value = N;
};
template <int Most, class Body>
inline void with_number(int64_t count, const Body& body) {
  if constexpr (Most > 1)
    if (count < Most) return with_number<Most - 1>(count, body);
  body(Number<Most>{});
}

// Vectors that are written out at once: a whole block, and a chunk at least.
template <Type W>
constexpr int kWritten = Weights<W>::kVectors > 2 ? Weights<W>::kVectors : 2;

// A part's columns from d on, in expanded order, with zeros behind its end.
template <Type W>
inline void written_out(const Element<W>* row, int64_t size, int64_t d, Vec (&out)[kWritten<W>]) {
  constexpr int N = kWritten<W>, V = Weights<W>::kVectors;
  if (d >= size) {
    for (auto& value : out) value = zero();
    return;
  }
  if constexpr (W == Type::i4) {
    NibbleBlock block = d + kBlock <= size ? NibbleBlock::whole(row, size, d) : NibbleBlock::rest(row, size, d);
    for (int k = N; k-- > 0;) out[k] = mul(next_nibble(block.left), block.scales);
  } else {
    Element<W> padded[N * kLanes] = {};
    const Element<W>* from = row + d;
    if (size - d < N * kLanes) {
      __builtin_memcpy(padded, from, (size - d) * sizeof padded[0]);
      from = padded;
    }
    for (int n = 0; n < N; n += V) {
      Vec values[V];
      Weights<W>::unpack(from + n * kLanes, values);
      for (int v = 0; v < V; ++v) out[n + v] = values[v];
    }
  }
}

// Products of float32.
struct Floats {
  using Element = float;
  using Vector = Vec;
  static constexpr int kDepth = kLanes;  // values of a vector
  static constexpr int kNeurons = 1;     // whose down rows one product adds
  static constexpr Type kInPlace = Type::f32;

  static inline Vector get(const float* p) { return load(p); }
  static inline void put(float* p, Vector a) { store(p, a); }
  static inline Vector of(const Vec* values) { return values[0]; }
  static inline Vec add_product(Vec sums, Vector a, Vector b) { return fma(a, b, sums); }
  static inline Vector spread(const float* p) { return broadcast(*p); }
  // Hidden values, [tokens][kBlockNeurons], in the form that `spread` reads.
  static inline const float* hidden(const float* values, int64_t, float*) { return values; }

  // Columns of a down row from d on; chunks are `apart` vectors from each other.
  template <Type W>
  static inline void stage(const typename Weights<W>::Element* const* rows, int64_t, int64_t size, int64_t d,
                           Vector* out, int64_t apart) {
    Vec values[kWritten<W>];
    written_out<W>(rows[0], size, d, values);
    for (int n = 0; n < kWritten<W>; ++n) out[n / 2 * apart + n % 2] = values[n];
  }
};

// Prefetches neurons to come, one run of memory after another and evenly over the time that products take: of the rows
// that are read now more lie side by side than the hardware's prefetcher follows. It stays ahead by the down rows of a
// group, which are read last, and some more.
struct Coming {
  static constexpr int64_t kAhead = 16;  // neurons
  const Call& p;
  const char* record;
  int64_t stride, width;  // bytes between two rows, and of one
  int64_t price;          // of a line, in bytes that are read, times tokens
  int64_t neuron;
  int64_t done = 0;
  int64_t owed = 0;

  Coming(const Call& call, int64_t first) : p(call), record(static_cast<const char*>(call.record)) {
    int64_t element = element_size(p.weight_type);
    stride = p.record_stride * element;
    width = p.parts() * p.part() * element;
    price = kLineBytes * p.tokens;
    neuron = first + kAhead;
  }

  PYPRUNE_INLINE void read(int64_t bytes) {
    for (owed += bytes; owed >= price; owed -= price) {
      if (neuron >= p.neurons) return;
      __builtin_prefetch(record + p.row(neuron) * stride + done);
      done += kLineBytes;
      if (done < width) continue;
      done = 0;
      ++neuron;
    }
  }
};

// Whether rows of a type are unpacked in their natural order, so that a vector can be had of any of their columns.
template <class P, Type W>
constexpr bool kDirect = W == P::kInPlace || Weights<W>::kVectors == 1;

template <class P, Type W>
PYPRUNE_INLINE typename P::Vector row_vector(const Element<W>* row) {
  if constexpr (W == P::kInPlace) {
    return P::get(row);
  } else {
    Vec values[P::kDepth / kLanes];
    for (int i = 0; i < P::kDepth / kLanes; ++i) values[i] = Values<W>::get(row + i * kLanes);
    return P::of(values);
  }
}

template <class P, Type W>
PYPRUNE_INLINE typename P::Vector row_vector(const Element<W>* row, int64_t count) {
  Element<W> padded[P::kDepth] = {};
  __builtin_memcpy(padded, row, count * sizeof padded[0]);
  return row_vector<P, W>(padded);
}

// out[t][r] (+)= dot products of four rows' `count` values with T tokens.
template <class P, Type W, int T>
inline void dot_block(const Element<W>* const (&rows)[kBlockRows], int64_t count, const typename P::Element* x,
                      float* out, bool more, Coming& coming, int64_t bytes) {
  Vec sums[kBlockRows][T];
  for (auto& row : sums)
    for (auto& value : row) value = zero();
  auto add_line = [&](const typename P::Vector(&w)[kBlockRows], const typename P::Element* tokens)
                      __attribute__((always_inline)) {
                        for (int t = 0; t < T; ++t) {
                          typename P::Vector token = P::get(tokens + t * P::kDepth);
                          for (int r = 0; r < kBlockRows; ++r) sums[r][t] = P::add_product(sums[r][t], w[r], token);
                        }
                      };
  typename P::Vector w[kBlockRows];
  int64_t d = 0;
  for (; d + P::kDepth <= count; d += P::kDepth) {
    coming.read(bytes * T);
    for (int r = 0; r < kBlockRows; ++r) w[r] = row_vector<P, W>(rows[r] + d);
    add_line(w, x + d * T);
  }
  if (d < count) {
    for (int r = 0; r < kBlockRows; ++r) w[r] = row_vector<P, W>(rows[r] + d, count - d);
    add_line(w, x + d * T);
  }
  for (int t = 0; t < T; ++t) {
    Vec four[kBlockRows];
    float total[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) four[r] = sums[r][t];
    sum_four(four, total);
    float* to = out + t * kBlockNeurons;
    for (int r = 0; r < kBlockRows; ++r) to[r] = more ? to[r] + total[r] : total[r];
  }
}

// As dot_block, with all tokens and `count` of their values from `start` on.
template <class P, Type W>
inline void dot_columns(const Call& p, const Workspace& ws, const Element<W>* const (&rows)[kBlockRows], int64_t start,
                        int64_t count, float* out, Coming& coming) {
  Blocks blocks(p.tokens, kBlockTokens);
  int64_t bytes = kBlockRows * coming.width * P::kDepth / (p.parts() * ws.padded);
  for (int64_t b = 0; b < blocks.count; ++b) {
    int64_t first = blocks.first(b);
    with_number<kBlockTokens>(blocks.size(b), [&](auto tokens) {
      constexpr int T = decltype(tokens)::value;
      auto* x = static_cast<const typename P::Element*>(ws.tokens) + first * ws.padded + start * T;
      dot_block<P, W, T>(rows, count, x, out + first * kBlockNeurons, start > 0, coming, bytes);
    });
  }
}

// Dot products of four rows with all tokens. One block of tokens needs no rows written out.
template <class P, Type W>
inline void dot_blocks(const Call& p, const Workspace& ws, const Element<W>* const (&rows)[kBlockRows], float* out,
                       Coming& coming) {
  if constexpr (kDirect<P, W>)
    if (W == P::kInPlace || p.tokens <= kBlockTokens)
      return dot_columns<P, W>(p, ws, rows, 0, p.hidden_size, out, coming);
  if constexpr (W != P::kInPlace) {
    alignas(kLineBytes) typename P::Element staged[kBlockRows * kStagedWidth];
    const typename P::Element* lines[kBlockRows];
    for (int r = 0; r < kBlockRows; ++r) lines[r] = staged + r * kStagedWidth;
    for (int64_t start = 0; start < ws.padded; start += kStagedWidth) {
      int64_t end = ws.padded - start < kStagedWidth ? ws.padded : start + kStagedWidth;
      for (int r = 0; r < kBlockRows; ++r)
        for (int64_t d = start; d < end; d += kWritten<W> * kLanes) {
          Vec values[kWritten<W>];
          written_out<W>(rows[r], p.hidden_size, d, values);
          for (int n = 0; n < kWritten<W>; n += P::kDepth / kLanes)
            P::put(staged + r * kStagedWidth + d - start + n * kLanes, P::of(values + n));
        }
      dot_columns<P, P::kInPlace>(p, ws, lines, start, end - start, out, coming);
    }
  }
}

// Partial sums of T tokens, a chunk of columns each, += products of hidden values and staged down rows. For few tokens
// there are two sums of each, so that the latency of additions hides.
template <class P, int T>
inline void down_block(const typename P::Vector* staged, const typename P::Element* hidden, float* partial) {
  constexpr int kSums = T < 4 ? 2 : 1;
  Vec sums[kSums][T][2];
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < 2; ++i) {
      sums[0][t][i] = load(partial + t * kChunk + i * kLanes);
      if (kSums > 1) sums[kSums - 1][t][i] = zero();
    }
  for (int n = 0; n < kBlockNeurons; n += P::kNeurons * kSums)
    for (int s = 0; s < kSums; ++s, staged += 2)
      for (int t = 0; t < T; ++t) {
        typename P::Vector values = P::spread(hidden + t * kBlockNeurons + n + s * P::kNeurons);
        for (int i = 0; i < 2; ++i) sums[s][t][i] = P::add_product(sums[s][t][i], values, staged[i]);
      }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < 2; ++i)
      store(partial + t * kChunk + i * kLanes, kSums > 1 ? add(sums[0][t][i], sums[kSums - 1][t][i]) : sums[0][t][i]);
}

template <class P, Type W>
inline void down_blocks(const Call& p, const Workspace& ws, const Element<W>* const* rows, int64_t count,
                        const typename P::Element* hidden, float* partial, Coming& coming) {
  using Vector = typename P::Vector;
  constexpr int64_t kApart = kBlockNeurons / P::kNeurons * 2;
  constexpr int64_t kChunks = kWritten<W> / 2;
  Vector staged[kChunks * kApart];
  // Neurons behind the last are zeros: their hidden values are, but zero times infinity is not.
  if (count < kBlockNeurons) __builtin_memset(staged, 0, sizeof staged);
  Blocks blocks(p.tokens, kDownTokens);
  int64_t bytes = kBlockNeurons * coming.width * kChunk / (p.parts() * ws.padded);
  for (int64_t d = 0; d < ws.padded; d += kChunks * kChunk) {
    for (int64_t n = 0; n < count; n += P::kNeurons)
      P::template stage<W>(rows + n, count - n, p.hidden_size, d, staged + n / P::kNeurons * 2, kApart);
    for (int64_t c = 0; c < kChunks; ++c)
      for (int64_t b = 0; b < blocks.count; ++b) {
        int64_t first = blocks.first(b);
        coming.read(bytes * blocks.size(b));
        with_number<kDownTokens>(blocks.size(b), [&](auto tokens) {
          down_block<P, decltype(tokens)::value>(staged + c * kApart, hidden + first * kBlockNeurons,
                                                 partial + ws.offset(first, d + c * kChunk));
        });
      }
  }
}

// From dot products [tokens][kBlockNeurons] of `count` neurons to what their down rows are multiplied by, in `gate`.
inline void block_hidden(const Call& p, int64_t first, int64_t count, float* gate, float* up) {
  float* values[] = {gate, up};
  alignas(kLineBytes) float factors[kBlockNeurons], added[kBlockNeurons];
  const int64_t size = p.tokens * kBlockNeurons;
  auto each = [&](float* data, auto change) {
    for (int64_t i = 0; i < size; i += kBlockNeurons)
      for (int64_t n = 0; n < kBlockNeurons; n += kLanes) store(data + i + n, change(load(data + i + n), n));
  };
  for (int part = 0; part < p.parts() - 1 && (p.scales || p.neuron_bias); ++part) {
    for (int64_t n = 0; n < kBlockNeurons; ++n) {
      int64_t row = p.row(first + (n < count ? n : 0));
      factors[n] = p.scales ? p.scales[row * p.parts() + part] : 1.0f;
      added[n] = p.neuron_bias ? read(p.x_type, p.neuron_bias, row * (p.parts() - 1) + part) : 0.0f;
    }
    each(values[part], [&](Vec a, int64_t n) { return fma(a, load(factors + n), load(added + n)); });
  }
  activate(p.activation, gate, size);
  if (p.gated)
    for (int64_t i = 0; i < size; i += kLanes) store(gate + i, mul(load(gate + i), load(up + i)));
  if (p.scales) {
    for (int64_t n = 0; n < kBlockNeurons; ++n)
      factors[n] = p.scales[(p.row(first + (n < count ? n : 0)) + 1) * p.parts() - 1];
    each(gate, [&](Vec a, int64_t n) { return mul(a, load(factors + n)); });
  }
  for (int64_t i = 0; i < size; i += kBlockNeurons)
    for (int64_t n = count; n < kBlockNeurons; ++n) gate[i + n] = 0.0f;
}

template <class P, Type W>
inline void slab_blocks(const Call& p, const Workspace& ws, int64_t first, int64_t last, float* partial) {
  alignas(kLineBytes) float gate[kMaxTokens * kBlockNeurons] = {};
  alignas(kLineBytes) float up[kMaxTokens * kBlockNeurons] = {};
  alignas(kLineBytes) typename P::Element hidden[kMaxTokens * kBlockNeurons];
  __builtin_memset(partial, 0, ws.rows * ws.padded * sizeof(float));
  Coming coming(p, first);
  for (int64_t n = first; n < last; n += kBlockNeurons) {
    int64_t count = last - n < kBlockNeurons ? last - n : kBlockNeurons;
    const Element<W>* rows[kBlockNeurons];  // the last is repeated
    for (int64_t i = 0; i < kBlockNeurons; ++i)
      rows[i] = static_cast<const Element<W>*>(p.record) + p.row(n + (i < count ? i : count - 1)) * p.record_stride;
    for (int64_t i = 0; i < count; i += kBlockRows)
      for (int part = 0; part < p.parts() - 1; ++part) {
        const Element<W>* four[kBlockRows];
        for (int r = 0; r < kBlockRows; ++r) four[r] = rows[i + r] + part * p.part();
        dot_blocks<P, W>(p, ws, four, (part == 0 ? gate : up) + i, coming);
      }
    block_hidden(p, n, count, gate, up);
    for (auto& row : rows) row += (p.parts() - 1) * p.part();
    down_blocks<P, W>(p, ws, rows, count, P::hidden(gate, p.tokens * kBlockNeurons, hidden), partial, coming);
  }
}

// Tokens [first, last), each block as [depths][tokens of it][depth].
template <class P, Type W, Type X>
inline void pack_blocks(const Call& p, const Workspace& ws, int64_t first, int64_t last) {
  constexpr int N = kWritten<W>, V = Weights<W>::kVectors;
  Blocks blocks(p.tokens, kBlockTokens);
  for (int64_t b = 0; b < blocks.count; ++b)
    for (int64_t t = 0; t < blocks.size(b); ++t) {
      int64_t token = blocks.first(b) + t;
      if (token < first || token >= last) continue;
      auto* x = static_cast<const typename Values<X>::Element*>(p.x) + token * p.x_stride;
      auto* out = static_cast<typename P::Element*>(ws.tokens) + blocks.first(b) * ws.padded + t * P::kDepth;
      for (int64_t d = 0; d < ws.padded; d += N * kLanes) {
        Vec values[N];
        get_block<X, N>(x + d, p.hidden_size - d, values);
        // A row that is read in place is in natural order.
        if constexpr (V > 1 && W != P::kInPlace) to_expanded<V>(values);
        for (int n = 0; n < N; n += P::kDepth / kLanes)
          P::put(out + (d + n * kLanes) * blocks.size(b), P::of(values + n));
      }
    }
}
