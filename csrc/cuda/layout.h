// Shapes of blocks and their shared memory, for host and device; offsets in bytes.
#pragma once

#include "params.h"

namespace pyprune {

// [flag | barriers of bulk copies | sums of warps, twice | rows of the block's neurons | a ring of weights for each
// team, later its partial]
struct SinglePassLayout {
  uint32_t sums, rows, ring, bytes;
  uint32_t part, neuron;  // bytes of one part, and of one neuron, in a ring
};

constexpr uint32_t kBarriers = 16;  // where they begin

PYPRUNE_BOTH constexpr uint32_t up_to_multiple(uint32_t n, uint32_t of) { return (n + of - 1) / of * of; }

// `threads` are those of one team. Copied in bulk, a part is as wide as it is in the record; else it has a place for
// each of a thread's pieces.
PYPRUNE_BOTH constexpr SinglePassLayout single_pass_layout(Type weights, int32_t tokens, int32_t parts,
                                                           uint32_t threads, int32_t teams, int32_t step,
                                                           int32_t stages, int32_t rows, bool bulk, uint32_t width) {
  uint32_t values = static_cast<uint32_t>((parts - 1) * most_neurons(tokens) * tokens);
  uint32_t warps = threads / kWarp * static_cast<uint32_t>(teams);
  SinglePassLayout l{};
  l.sums = kBarriers + (bulk ? up_to_multiple(static_cast<uint32_t>(teams * stages) * 8, 16) : 0);
  l.rows = l.sums + 2 * values * warps * 4;
  l.ring = up_to_multiple(l.rows + static_cast<uint32_t>(rows) * 4, 128);
  l.part = bulk ? width * static_cast<uint32_t>(bytes_of(weights)) : kChannels / piece(weights) * threads * 16;
  l.neuron = static_cast<uint32_t>(parts) * l.part;
  uint32_t ring = up_to_multiple(l.neuron * static_cast<uint32_t>(step * stages), 16);
  uint32_t partial = static_cast<uint32_t>(tokens * kChannels) * threads * 4;
  l.bytes = l.ring + (ring > partial ? ring : partial) * static_cast<uint32_t>(teams);
  return l;
}

constexpr int kTwoPassThreads = 256;
// Blocks of a multiprocessor at once, for which registers are rationed: what is under way is what loads are waited for.
// Two where three would spill.
PYPRUNE_BOTH constexpr int two_pass_blocks(Type weights, int32_t tokens) {
  bool lean = weights == Type::bf16 || weights == Type::f32;
  return tokens > 1 ? 1 : lean ? 3 : 2;
}

constexpr int kTwoPassWarps = kTwoPassThreads / static_cast<int>(kWarp);

// Channels of a tile of the down pass.
PYPRUNE_BOTH constexpr int32_t tile_channels(Type weights) { return static_cast<int32_t>(kWarp) * piece(weights); }

// Bytes of shared memory of the down pass: a flag, and one row of the tile for each warp.
PYPRUNE_BOTH constexpr uint32_t down_pass_bytes(Type weights) {
  return 16 + kTwoPassWarps * static_cast<uint32_t>(tile_channels(weights)) * 4;
}

}  // namespace pyprune
