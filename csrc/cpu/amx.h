// Matrix tiles (AMX) for bfloat16 tokens and bfloat16 or int8 weights. Included by isa_amx.cpp after kernel.h.
//
// A group of up to 32 neurons at a time. First their gate and up rows, 16 neurons times 32 elements a tile, are
// multiplied with packed tokens; then their hidden values, rounded to bfloat16, are multiplied with their down rows,
// which are interleaved in pairs of neurons as tiles need them: shifts and masks do that, with even columns in one tile
// and odd ones in the other, which is the expanded order of bfloat16.

// Fewer tokens are left to vectors: tiles would be mostly empty.
constexpr int64_t kTileTokens = 8;
constexpr int64_t kTile = 16;   // rows of a tile, and its columns in 32-bit values
constexpr int64_t kDepth = 32;  // bfloat16 values of a row
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileGroup = 32;  // neurons

inline bool use_tiles(const Call& p) {
  return p.x_type == Type::bf16 && (p.weight_type == Type::bf16 || p.weight_type == Type::i8) &&
         p.tokens >= kTileTokens;
}

inline int64_t token_tiles(const Call& p) { return (p.tokens + kTile - 1) / kTile; }

struct alignas(kLineBytes) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sixteen or 32 weights as bfloat16.
inline __m512i load_bf16(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline __m512i load_bf16(const int8_t* p) {
  __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16));
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)),
                                      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)));
}

// Up to 32 weights of which only `count` may be read, with zeros behind.
template <class E>
inline __m512i load_bf16(const E* p, int64_t count) {
  if (count >= kDepth) return load_bf16(p);
  E padded[kDepth] = {};
  __builtin_memcpy(padded, p, count * sizeof(E));
  return load_bf16(padded);
}

template <Type W>
struct TileGroup {
  const Element<W>* rows[kTileGroup];  // those behind `count` repeat the last
  int64_t count;
  bool evenly;  // rows lie `record_stride` apart

  TileGroup(const Call& p, int64_t first, int64_t neurons) : count(neurons), evenly(!p.index && neurons == kTileGroup) {
    for (int64_t n = 0; n < kTileGroup; ++n) {
      int64_t neuron = first + (n < count ? n : count - 1);
      rows[n] = Group<W, 1>::at(p, neuron);
    }
  }
};

// Prefetches the records of the next group, neuron after neuron, while this group is computed. Tiles read too many rows
// at once for the hardware's own prefetcher, which must be shown one run of memory after another; one line of eight is
// enough to lead it, and more would only hold the buffers that tile loads need.
template <Type W>
struct Ahead {
  static constexpr int64_t kStep = 8;
  const Call& p;
  int64_t neuron;
  int64_t last;
  int64_t passes;    // over gate and up rows, one for two tiles of tokens
  int64_t owed = 0;  // lines times passes
  int64_t done = 0;  // elements of `neuron`

  // As many lines as are read now, spread over the passes that read them.
  void lines(int64_t count, bool each_pass) {
    for (owed += each_pass ? count : count * passes; owed > 0 && neuron < last; owed -= kStep * passes) {
      __builtin_prefetch(Group<W, 1>::at(p, neuron) + done, 0, 2);
      done += kStep * line(W);
      if (done < p.parts() * p.hidden_size) continue;
      done = 0;
      ++neuron;
    }
  }
};

// A tile of weights: 16 rows from `first`, 32 elements from `d` on. `buffer` is used where it cannot be read in place.
#define PYPRUNE_LOAD_WEIGHTS(tile, group, first, offset, d, size, record_stride, buffer)             \
  do {                                                                                               \
    if (W == Type::bf16 && (group).evenly && (d) + kDepth <= (size)) {                               \
      _tile_loadd(tile, (group).rows[first] + (offset) + (d), (record_stride) * sizeof(Element<W>)); \
    } else {                                                                                         \
      for (int64_t r = 0; r < kTile; ++r)                                                            \
        _mm512_store_si512((buffer) + r * kDepth,                                                    \
                           load_bf16((group).rows[(first) + r] + (offset) + (d), (size) - (d)));     \
      _tile_loadd(tile, buffer, kLineBytes);                                                         \
    }                                                                                                \
  } while (0)

// Tokens in tiles of 16: for every 32 elements, 16 rows of [token][2].
inline void pack_tiles(const Call& p, const Workspace& ws, int64_t first, int64_t last) {
  const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(kTile));
  auto* x = static_cast<const uint16_t*>(p.x);
  for (int64_t t = first; t < last; ++t) {
    uint16_t* tile = static_cast<uint16_t*>(ws.tokens) + t / kTile * ws.padded * kTile + t % kTile * 2;
    for (int64_t d = 0; d < ws.padded; d += kDepth) {
      int64_t count = t < p.tokens ? p.hidden_size - d : 0;
      __m512i pairs = count > 0 ? load_bf16(x + t * p.x_stride + d, count) : _mm512_setzero_si512();
      _mm512_i32scatter_epi32(tile + d * kTile, rows, pairs, 4);
    }
  }
}

// gate (and up) [32 neurons][16 tokens of tile `t`] = dot products; rows of the result are `stride` apart.
template <Type W, bool Gated>
inline void dot_tiles(const Call& p, const Workspace& ws, const TileGroup<W>& group, Ahead<W>& ahead, int64_t t,
                      float* gate, float* up, int64_t stride) {
  alignas(kLineBytes) uint16_t buffer[kTile * kDepth];
  int64_t size = p.hidden_size;
  const uint16_t* x = ws.token<uint16_t>(t * kTile);
  _tile_zero(0);
  _tile_zero(1);
  if (Gated) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t d = 0; d < size; d += kDepth) {
    ahead.lines((Gated ? 2 : 1) * kTileGroup * kDepth / line(W), true);
    _tile_loadd(4, x + d * kTile, kLineBytes);
    PYPRUNE_LOAD_WEIGHTS(5, group, 0, 0, d, size, p.record_stride, buffer);
    _tile_dpbf16ps(0, 5, 4);
    PYPRUNE_LOAD_WEIGHTS(6, group, kTile, 0, d, size, p.record_stride, buffer);
    _tile_dpbf16ps(1, 6, 4);
    if (Gated) {
      PYPRUNE_LOAD_WEIGHTS(5, group, 0, size, d, size, p.record_stride, buffer);
      _tile_dpbf16ps(2, 5, 4);
      PYPRUNE_LOAD_WEIGHTS(6, group, kTile, size, d, size, p.record_stride, buffer);
      _tile_dpbf16ps(3, 6, 4);
    }
  }
  int64_t bytes = stride * sizeof(float);
  _tile_stored(0, gate + t * kTile, bytes);
  _tile_stored(1, gate + kTile * stride + t * kTile, bytes);
  if (Gated) {
    _tile_stored(2, up + t * kTile, bytes);
    _tile_stored(3, up + kTile * stride + t * kTile, bytes);
  }
}

// As `dot_tiles`, for one part and two tiles of tokens, so that a tile of weights is read once for both.
template <Type W>
inline void dot_tile_pair(const Call& p, const Workspace& ws, const TileGroup<W>& group, Ahead<W>& ahead, int64_t part,
                          int64_t t, float* out, int64_t stride) {
  alignas(kLineBytes) uint16_t buffer[kTile * kDepth];
  int64_t size = p.hidden_size;
  int64_t offset = part * size;
  const uint16_t* x = ws.token<uint16_t>(t * kTile);
  const uint16_t* y = ws.token<uint16_t>((t + 1) * kTile);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < size; d += kDepth) {
    ahead.lines(kTileGroup * kDepth / line(W), true);
    _tile_loadd(4, x + d * kTile, kLineBytes);
    PYPRUNE_LOAD_WEIGHTS(6, group, 0, offset, d, size, p.record_stride, buffer);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(5, y + d * kTile, kLineBytes);
    _tile_dpbf16ps(1, 6, 5);
    PYPRUNE_LOAD_WEIGHTS(7, group, kTile, offset, d, size, p.record_stride, buffer);
    _tile_dpbf16ps(2, 7, 4);
    _tile_dpbf16ps(3, 7, 5);
  }
  int64_t bytes = stride * sizeof(float);
  _tile_stored(0, out + t * kTile, bytes);
  _tile_stored(1, out + (t + 1) * kTile, bytes);
  _tile_stored(2, out + kTile * stride + t * kTile, bytes);
  _tile_stored(3, out + kTile * stride + (t + 1) * kTile, bytes);
}

// Hidden values `[32 neurons][stride]` as tiles of 16 tokens times 32 neurons in bfloat16: [token tile][16][32].
inline void pack_hidden(const float* hidden, int64_t stride, int64_t count, int64_t tiles, uint16_t* out) {
  const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(kTile));
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t n = 0; n < kTileGroup; n += 2) {
      const float* first = hidden + n * stride + t * kTile;
      __m512 low = n < count ? load(first) : zero();
      __m512 high = n + 1 < count ? load(first + stride) : zero();
      // One 32-bit value a token, the first neuron in its lower half; tokens are rows of the tile.
      __m256i a = (__m256i)_mm512_cvtneps_pbh(low);
      __m256i b = (__m256i)_mm512_cvtneps_pbh(high);
      __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
      _mm512_i32scatter_epi32(out + t * kTile * kDepth + n, rows, pairs, 4);
    }
}

// Rows 2j and 2j+1 of 32 columns, interleaved: even columns into `even`, odd ones into `odd`. For int8 the first 16
// columns and the last, which is its expanded order.
template <Type W>
inline void interleave_rows(__m512i first, __m512i second, uint16_t* even, uint16_t* odd) {
  if (W == Type::bf16) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    _mm512_store_si512(even, _mm512_or_si512(_mm512_andnot_si512(high, first), _mm512_slli_epi32(second, 16)));
    _mm512_store_si512(odd, _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(high, second)));
  } else {
    auto halves = [](__m256i a, __m256i b) {
      return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
    };
    _mm512_store_si512(even, halves(_mm512_castsi512_si256(first), _mm512_castsi512_si256(second)));
    _mm512_store_si512(odd, halves(_mm512_extracti64x4_epi64(first, 1), _mm512_extracti64x4_epi64(second, 1)));
  }
}

// Columns [d, d + 32) of the down rows as two tiles, and a prefetch of the next group's.
template <Type W>
inline void stage_down(const TileGroup<W>& group, Ahead<W>& ahead, int64_t offset, int64_t d, int64_t size,
                       uint16_t (&tiles)[2][kTile * kDepth]) {
  ahead.lines(kTileGroup * kDepth / line(W), false);
  for (int64_t n = 0; n < kTileGroup; n += 2) {
    // Rows behind the last neuron must be zeros: their hidden values are zero, but zero times infinity is not.
    __m512i first = n < group.count ? load_bf16(group.rows[n] + offset + d, size - d) : _mm512_setzero_si512();
    __m512i second = n + 1 < group.count ? load_bf16(group.rows[n + 1] + offset + d, size - d) : _mm512_setzero_si512();
    interleave_rows<W>(first, second, tiles[0] + n / 2 * kDepth, tiles[1] + n / 2 * kDepth);
  }
}

// partial += hidden values times down rows.
template <Type W>
inline void down_tiles(const Call& p, const Workspace& ws, const TileGroup<W>& group, Ahead<W>& ahead,
                       const uint16_t* hidden, float* partial) {
  // Two stages in turn: a tile load must wait until the stores it reads have left the core's buffers.
  alignas(kLineBytes) uint16_t stages[2][2][kTile * kDepth];
  int64_t size = p.hidden_size;
  int64_t offset = (p.parts() - 1) * size;
  constexpr int64_t bytes = kDepth * sizeof(float);
  stage_down<W>(group, ahead, offset, 0, size, stages[0]);
  for (int64_t d = 0, step = 0; d < size; d += kDepth, ++step) {
    if (d + kDepth < size) stage_down<W>(group, ahead, offset, d + kDepth, size, stages[(step + 1) % 2]);
    _tile_loadd(4, stages[step % 2][0], kLineBytes);
    _tile_loadd(5, stages[step % 2][1], kLineBytes);
    for (int64_t t = 0; t < token_tiles(p); ++t) {
      float* even = partial + ws.offset(t * kTile, d);
      float* odd = even + kTile;
      _tile_loadd(2, hidden + t * kTile * kDepth, kLineBytes);
      _tile_loadd(0, even, bytes);
      _tile_loadd(1, odd, bytes);
      _tile_dpbf16ps(0, 2, 4);
      _tile_dpbf16ps(1, 2, 5);
      _tile_stored(0, even, bytes);
      _tile_stored(1, odd, bytes);
    }
  }
}

template <Type W>
inline void dot_all_tiles(const Call& p, const Workspace& ws, const TileGroup<W>& group, Ahead<W>& ahead, float* gate,
                          float* up, int64_t stride) {
  int64_t tiles = token_tiles(p);
  for (int64_t part = 0; part < p.parts() - 1; ++part)
    for (int64_t t = 0; t + 1 < tiles; t += 2)
      dot_tile_pair<W>(p, ws, group, ahead, part, t, part == 0 ? gate : up, stride);
  if (tiles % 2 == 0) return;
  if (p.gated)
    dot_tiles<W, true>(p, ws, group, ahead, tiles - 1, gate, up, stride);
  else
    dot_tiles<W, false>(p, ws, group, ahead, tiles - 1, gate, up, stride);
}

template <Type W>
inline void slab_tiles(const Call& p, const Workspace& ws, int64_t first, int64_t last, float* partial) {
  alignas(kLineBytes) float gate[kTileGroup * kMaxTokens];
  alignas(kLineBytes) float up[kTileGroup * kMaxTokens];
  alignas(kLineBytes) uint16_t hidden[kTileGroup * kMaxTokens];
  int64_t tiles = token_tiles(p);
  int64_t stride = tiles * kTile;
  __builtin_memset(partial, 0, ws.rows * ws.padded * sizeof(float));
  for (int64_t n = first; n < last; n += kTileGroup) {
    TileGroup<W> group(p, n, last - n < kTileGroup ? last - n : kTileGroup);
    int64_t next = n + kTileGroup;
    Ahead<W> ahead{p, next, next + kTileGroup < p.neurons ? next + kTileGroup : p.neurons, (tiles + 1) / 2};
    dot_all_tiles<W>(p, ws, group, ahead, gate, up, stride);
    hidden_values(p, n, static_cast<int>(group.count), stride, gate, up);
    pack_hidden(gate, stride, group.count, tiles, hidden);
    down_tiles<W>(p, ws, group, ahead, hidden, partial);
  }
}

inline Shape tile_shape(const Call& p, int64_t padded) {
  if (!use_tiles(p)) return shape(p, padded);
  int64_t rows = token_tiles(p) * kTile;
  return {Form::tiles, rows, rows * padded * int64_t{sizeof(uint16_t)}, kDepth};
}

inline void tile_pack(const Call& p, const Workspace& ws, int64_t first, int64_t last) {
  if (ws.form != Form::tiles) return pack(p, ws, first, last);
  pack_tiles(p, ws, first, last == p.tokens ? ws.rows : last);
}

inline void tile_slab(const Call& p, const Workspace& ws, int64_t first, int64_t last, float* partial) {
  if (ws.form != Form::tiles) return slab(p, ws, first, last, partial);
  TileConfig config;
  _tile_loadconfig(&config);
  if (p.weight_type == Type::bf16)
    slab_tiles<Type::bf16>(p, ws, first, last, partial);
  else
    slab_tiles<Type::i8>(p, ws, first, last, partial);
  _tile_release();
}
