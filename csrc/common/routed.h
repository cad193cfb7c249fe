// What one call of a mixture's experts computes, after their router: `call` for each pair of token and expert.
#pragma once

#include "call.h"

namespace pyprune {

struct RoutedCall {
  Call call;              // x and out of all tokens, and the record of the first expert; without biases
  int64_t experts;        // E
  int64_t expert_stride;  // elements between two experts' records
  int64_t picked;         // K, of each token
  const int64_t* index;   // [M, K] in [0, E)
  const void* weights;    // [M, K]
  Type weights_type;
  const int32_t* counts;  // [E] how many of its line of call.index, [E, neurons], an expert computes; null without it
};

}  // namespace pyprune
