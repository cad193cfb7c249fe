// AVX-512 F, BW, VL and DQ.
#include <immintrin.h>

#include "kernels.h"

namespace pyprune {
namespace {

#include "scalar.h"
#include "simd_avx512.h"
#include "activation.h"
#include "rows.h"
#include "nibbles.h"
#include "no_dot_bf16.h"
#include "products.h"
#include "ends.h"
#include "blocks.h"
constexpr bool kIntegersInFours = true;
#include "kernel.h"

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels{"avx512", shape, pack, slab, finish, combine, write_out, read_all};
  bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return supported ? &kernels : nullptr;
}

}  // namespace pyprune
