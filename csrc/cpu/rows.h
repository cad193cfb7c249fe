// Rows of weights and blocks of tokens as kernels read them. Included by each instruction set's source file, inside
// that file's own namespace.

template <Type W>
using Element = typename Weights<W>::Element;

// Most neurons whose rows are read side by side.
constexpr int kMostInGroup = 4;

// Rows of weights, and the rows that will be read after them; those are prefetched a line for each line that is read,
// so that memory is busy also while registers are summed up and activations computed.
template <Type W, int R>
struct Rows {
  const Element<W>* now[R];
  const Element<W>* next[R];

  inline void prefetch(int64_t d) const {
    for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + d);
  }
};

// The last, partial line of some rows, with zeros behind.
template <Type W, int R>
struct Tail {
  alignas(kLineBytes) Element<W> lines[R][line(W)];

  Tail(const Rows<W, R>& rows, int64_t d, int64_t count) {
    __builtin_memset(lines, 0, sizeof lines);
    for (int r = 0; r < R; ++r) __builtin_memcpy(lines[r], rows.now[r] + d, count * sizeof(Element<W>));
  }
};

// Up to one block of values of type X from `p`, of which `count` may be read, with zeros behind.
template <Type X, int V>
inline void get_block(const typename Values<X>::Element* p, int64_t count, Vec (&out)[V]) {
  typename Values<X>::Element padded[V * kLanes] = {};
  if (count < V * kLanes) {
    if (count > 0) __builtin_memcpy(padded, p, count * sizeof padded[0]);
    p = padded;
  }
  for (int v = 0; v < V; ++v) out[v] = Values<X>::get(p + v * kLanes);
}
