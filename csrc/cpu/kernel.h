// The kernel, over the float vectors of one instruction set. Included by each instruction set's source file after its
// `simd_*.h`, inside that file's own namespace, so that no code of one set can be linked in the place of another's.

// Neurons of one group of a call of one token (of more: blocks.h): their dot products, their activations, and then
// their down rows are computed together. No more than hides the latency of additions, for nearer prefetches. A gather
// skips neurons, which ends the hardware's prefetching of a run of memory; more rows in turn keep memory busier then.
// Of int8 and int4 only narrow parts go in fours, where the source file of the instruction set says so: what is between
// two groups counts more there than a near prefetch.
constexpr int kGroupOne = 2;
constexpr int kGroupWide = 4;
constexpr int64_t kNarrowBytes = 1024;
static_assert(kGroupOne <= kMostInGroup && kGroupWide <= kMostInGroup);

// From the dot products of `count` neurons (rows `stride` apart) to what their down rows are multiplied by, in place in
// `gate`: scales, biases, activation, gate times up, and the down row's own scale.
inline void hidden_values(const Call& p, int64_t first, int count, int64_t stride, float* gate, float* up) {
  for (int n = 0; n < count; ++n) {
    int64_t row = p.row(first + n);
    float* values[] = {gate + n * stride, up + n * stride};
    for (int part = 0; part < p.parts() - 1; ++part) {
      float scale = p.scales ? p.scales[row * p.parts() + part] : 1.0f;
      float bias = p.neuron_bias ? read(p.x_type, p.neuron_bias, row * (p.parts() - 1) + part) : 0.0f;
      if (!p.scales && !p.neuron_bias) continue;
      for (int64_t t = 0; t < p.tokens; ++t) values[part][t] = values[part][t] * scale + bias;
    }
  }
  int64_t size = count * stride;
  activate(p.activation, gate, size);
  if (p.gated)
    for (int64_t i = 0; i < size; i += kLanes) store(gate + i, mul(load(gate + i), load(up + i)));
  if (!p.scales) return;
  for (int n = 0; n < count; ++n) {
    float scale = p.scales[(p.row(first + n) + 1) * p.parts() - 1];
    for (int64_t t = 0; t < p.tokens; ++t) gate[n * stride + t] *= scale;
  }
}

// Dot products of rows with the token.
template <Type W, int R>
inline void dot_token(const Call& p, const Workspace& ws, const Rows<W, R>& rows, float* out) {
  if constexpr (kDotBf16 && W == Type::bf16)
    if (ws.form == Form::pairs) return dot<W, R>(rows, p.hidden_size, static_cast<const uint16_t*>(ws.tokens), out);
  if constexpr (kDotBf16 && (W == Type::i8 || W == Type::i4))
    if (ws.form == Form::bytes) return dot_bytes<R>(rows, p.hidden_size, ws, out);
  if constexpr (W == Type::i4)
    dot_nibbles<R>(rows, p.hidden_size, static_cast<const float*>(ws.tokens), out);
  else
    dot<W, R>(rows, p.hidden_size, static_cast<const float*>(ws.tokens), out);
}

// The first of each neuron's rows, for a group and for the next one (at the end, for itself again).
template <Type W, int G>
struct Group {
  const Element<W>* now[G];
  const Element<W>* next[G];

  Group(const Call& p, int64_t first, int64_t count) {
    for (int n = 0; n < G; ++n) {
      int64_t neuron = first + (n < count ? n : count - 1);
      now[n] = at(p, neuron);
      next[n] = at(p, neuron + G < p.neurons ? neuron + G : neuron);
    }
  }

  static const Element<W>* at(const Call& p, int64_t neuron) {
    return static_cast<const Element<W>*>(p.record) + p.row(neuron) * p.record_stride;
  }

  // R rows of one part, from neuron `first` of the group.
  template <int R>
  Rows<W, R> rows(int64_t offset, int first = 0) const {
    Rows<W, R> found;
    for (int r = 0; r < R; ++r) {
      found.now[r] = now[first + r] + offset;
      found.next[r] = next[first + r] + offset;
    }
    return found;
  }

  // The first part of every neuron, then the second, `part` elements behind.
  Rows<W, 2 * G> two_parts(int64_t part) const {
    Rows<W, 2 * G> found;
    for (int i = 0; i < 2 * G; ++i) {
      found.now[i] = now[i % G] + i / G * part;
      found.next[i] = next[i % G] + i / G * part;
    }
    return found;
  }
};

template <int G>
struct Group<Type::i4, G> {
  const uint8_t* now[G];
  mutable Lead lead;

  Group(const Call& p, int64_t first, int64_t count) {
    lead.count = G;
    lead.size = p.parts() * p.part();
    int64_t ahead = (kLeadBytes / (G * lead.size) + 1) * G;
    for (int n = 0; n < G; ++n) {
      int64_t neuron = first + (n < count ? n : count - 1);
      now[n] = at(p, neuron);
      lead.rows[n] = at(p, neuron + ahead < p.neurons ? neuron + ahead : neuron);
    }
  }

  static const uint8_t* at(const Call& p, int64_t neuron) {
    return static_cast<const uint8_t*>(p.record) + p.row(neuron) * p.record_stride;
  }

  template <int R>
  Rows<Type::i4, R> rows(int64_t offset, int first = 0) const {
    Rows<Type::i4, R> found;
    for (int r = 0; r < R; ++r) found.now[r] = now[first + r] + offset;
    found.lead = &lead;
    return found;
  }

  Rows<Type::i4, 2 * G> two_parts(int64_t part) const {
    Rows<Type::i4, 2 * G> found;
    for (int i = 0; i < 2 * G; ++i) found.now[i] = now[i % G] + i / G * part;
    found.lead = &lead;
    return found;
  }
};

template <Type W, int R>
inline void down_group(const Call& p, const Rows<W, R>& rows, const float* a, float* partial) {
  if constexpr (W == Type::i4)
    down_nibbles<R>(rows, p.hidden_size, a, partial);
  else
    down<W, R>(rows, p.hidden_size, a, partial);
}

template <Type W, int G>
inline void down_all(const Call& p, const Group<W, G>& group, int64_t count, const float* a, float* partial) {
  int64_t offset = (p.parts() - 1) * p.part();
  if (count == G) return down_group<W, G>(p, group.template rows<G>(offset), a, partial);
  for (int n = 0; n < count; ++n) down_group<W, 1>(p, group.template rows<1>(offset, n), a + n, partial);
}

// Dot products of a group's gate and up rows.
template <Type W, int G>
inline void dot_all(const Call& p, const Workspace& ws, const Group<W, G>& group, float* gate, float* up) {
  if (!p.gated) return dot_token<W, G>(p, ws, group.template rows<G>(0), gate);
  float sums[2 * G];
  dot_token<W, 2 * G>(p, ws, group.two_parts(p.part()), sums);
  for (int i = 0; i < G; ++i) {
    gate[i] = sums[i];
    up[i] = sums[G + i];
  }
}

// With `Late`, down rows one group late, so that activations hide behind the next group's dot products.
template <Type W, int G, bool Late = false>
inline void slab_one(const Call& p, const Workspace& ws, int64_t first, int64_t last, float* partial) {
  // Padded to whole vectors; what stands in the padding is computed on and never read.
  alignas(kLineBytes) float gate[kLanes] = {};
  alignas(kLineBytes) float up[kLanes] = {};
  alignas(kLineBytes) float late[kLanes];
  auto size = [&](int64_t n) { return last - n < G ? last - n : G; };
  for (int64_t n = first; n < last; n += G) {
    Group<W, G> group(p, n, size(n));
    dot_all<W, G>(p, ws, group, gate, up);
    if (Late && n > first) down_all<W, G>(p, Group<W, G>(p, n - G, G), G, late, partial);
    hidden_values(p, n, static_cast<int>(size(n)), 1, gate, up);
    if (!Late || n + G >= last)
      down_all<W, G>(p, group, size(n), gate, partial);
    else
      store(late, load(gate));
  }
}

// One token.
template <Type W>
inline void slab_of(const Call& p, const Workspace& ws, int64_t first, int64_t last, float* partial) {
  __builtin_memset(partial, 0, ws.padded * sizeof(float));
  constexpr bool kInteger = W == Type::i8 || W == Type::i4;
  if (kInteger && kIntegersInFours && p.part() <= kNarrowBytes) {
    if constexpr (kIntegersInFours) slab_one<W, kGroupWide, W == Type::i8>(p, ws, first, last, partial);
  } else if (!kInteger && p.index) {
    slab_one<W, kGroupWide>(p, ws, first, last, partial);
  } else {
    slab_one<W, kGroupOne>(p, ws, first, last, partial);
  }
}

// Eight streams of additions, so that their latency hides behind the loads.
inline double read_all(const float* p, int64_t count) {
  Vec sums[8];
  for (auto& value : sums) value = zero();
  int64_t i = 0;
  for (; i + 8 * kLanes <= count; i += 8 * kLanes)
    for (int v = 0; v < 8; ++v) sums[v] = add(sums[v], load(p + i + v * kLanes));
  double total = 0;
  for (auto& value : sums) total += sum(value);
  for (; i < count; ++i) total += p[i];
  return total;
}

inline Shape shape(const Call& p, int64_t padded) {
  int64_t values = p.tokens * padded;
  if (p.tokens > 1) return {Form::blocks, p.tokens, values * int64_t{sizeof(float)}, kChunk};
  if (kDotBf16 && p.weight_type == Type::bf16 && p.x_type == Type::bf16)
    return {Form::pairs, 1, values * int64_t{sizeof(uint16_t)}, 0};
  if (kDotBf16 && fits_bytes(p)) return {Form::bytes, 1, bytes_of_token(p, padded), 0};
  return {Form::floats, 1, values * int64_t{sizeof(float)}, 0};
}

inline void pack_pairs(const Call& p, const Workspace& ws) {
  uint16_t* out = static_cast<uint16_t*>(ws.tokens);
  __builtin_memcpy(out, p.x, p.hidden_size * sizeof(uint16_t));
  __builtin_memset(out + p.hidden_size, 0, (ws.padded - p.hidden_size) * sizeof(uint16_t));
}

// Whether blocks of tokens by weights of these types are multiplied as bfloat16 in pairs.
constexpr bool fits_pairs(Type w, Type x) {
  return kDotBf16 && x == Type::bf16 && (w == Type::bf16 || w == Type::i8 || w == Type::i4);
}

// Calls `body` with the types of weights and x as compile-time constants.
template <Type T>
struct Constant {
  static constexpr Type value = T;
};

template <class Body>
inline void with_weights(const Call& p, const Body& body) {
  switch (p.weight_type) {
    case Type::f32:
      return body(Constant<Type::f32>{});
    case Type::bf16:
      return body(Constant<Type::bf16>{});
    case Type::f16:
      return body(Constant<Type::f16>{});
    case Type::i8:
      return body(Constant<Type::i8>{});
    case Type::i4:
      return body(Constant<Type::i4>{});
  }
}

template <class Body>
inline void with_types(const Call& p, const Body& body) {
  with_weights(p, [&](auto w) {
    if (p.x_type == Type::f32)
      body(w, Constant<Type::f32>{});
    else if (p.x_type == Type::bf16)
      body(w, Constant<Type::bf16>{});
    else
      body(w, Constant<Type::f16>{});
  });
}

inline void pack(const Call& p, const Workspace& ws, int64_t first, int64_t last) {
  if (ws.form == Form::pairs) return pack_pairs(p, ws);
  if (ws.form == Form::bytes) return pack_bytes(p, ws);
  with_types(p, [&](auto w, auto x) {
    constexpr Type W = decltype(w)::value, X = decltype(x)::value;
    if (ws.form == Form::floats) return pack_as<W, X>(p, static_cast<float*>(ws.tokens), ws.padded);
    if constexpr (fits_pairs(W, X))
      pack_blocks<Pairs, W, X>(p, ws, first, last);
    else
      pack_blocks<Floats, W, X>(p, ws, first, last);
  });
}

inline void slab(const Call& p, const Workspace& ws, int64_t first, int64_t last, float* partial) {
  with_weights(p, [&](auto w) {
    constexpr Type W = decltype(w)::value;
    if (ws.form != Form::blocks) return slab_of<W>(p, ws, first, last, partial);
    if constexpr (fits_pairs(W, Type::bf16))
      if (fits_pairs(W, p.x_type)) return slab_blocks<Pairs, W>(p, ws, first, last, partial);
    slab_blocks<Floats, W>(p, ws, first, last, partial);
  });
}

inline void finish(const Call& p, const Workspace& ws, int64_t slabs, int64_t first, int64_t last) {
  with_types(p, [&](auto w, auto x) { finish_as<decltype(w)::value, decltype(x)::value>(p, ws, slabs, first, last); });
}

inline void combine(const Call& p, const Contribution* given, int64_t count, int64_t first, int64_t last, void* row) {
  with_types(
      p, [&](auto w, auto x) { combine_as<decltype(w)::value, decltype(x)::value>(given, count, first, last, row); });
}

inline void write_out(const Call& p, int64_t first, int64_t last) {
  if (p.x_type == Type::f32)
    write_out_as<Type::f32>(p, first, last);
  else if (p.x_type == Type::bf16)
    write_out_as<Type::bf16>(p, first, last);
  else
    write_out_as<Type::f16>(p, first, last);
}
