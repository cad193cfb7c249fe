// How the neurons of an FFN are cut into slabs: by the problem alone, so that sums do not depend on the threads.
#pragma once

#include <algorithm>

#include "threads.h"

namespace pyprune {

constexpr int64_t kMaxSlabs = 32;
constexpr int64_t kSlabBytes = 192 << 10;
// Of narrow layers a slab takes fewer bytes: each neuron adds a rounding to its sums.
constexpr int64_t kSlabMaxNeurons = 1024;
// Bounds of slabs are multiples of this, so that only the last group of neurons can be a partial one.
constexpr int64_t kSlabNeurons = 32;

// How many slabs. Enough of them to keep threads busy, each large enough that its partial result does not count, and
// eights where there are many, so that the usual numbers of threads share them evenly. Not a function of the threads.
inline int64_t count_slabs(const Call& p) {
  int64_t bytes = p.neurons * p.parts() * p.part() * element_size(p.weight_type);
  // The partials of many tokens are large beside the weights.
  int64_t most = p.tokens <= 4 ? kMaxSlabs : p.tokens <= 16 ? kMaxSlabs / 2 : kMaxSlabs / 4;
  int64_t wanted = std::min({most, std::max(bytes / kSlabBytes, p.neurons / kSlabMaxNeurons),
                             round_up(p.neurons, kSlabNeurons) / kSlabNeurons});
  if (wanted >= 8) return wanted / 8 * 8;
  return wanted >= 4 ? 4 : wanted >= 2 ? 2 : 1;
}

// The first neuron of a slab; of the one behind the last, how many there are.
inline int64_t slab_bound(int64_t neurons, int64_t slabs, int64_t slab) {
  return slab == slabs ? neurons : neurons * slab / slabs / kSlabNeurons * kSlabNeurons;
}

}  // namespace pyprune
