// AVX2, FMA and F16C.
#include <immintrin.h>

#include "kernels.h"

namespace pyprune {
namespace {

#include "scalar.h"
#include "simd_avx2.h"
#include "activation.h"
#include "rows.h"
#include "nibbles.h"
#include "no_dot_bf16.h"
#include "products.h"
#include "ends.h"
#include "blocks.h"
constexpr bool kIntegersInFours = false;
#include "kernel.h"

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels{"avx2", shape, pack, slab, finish, combine, write_out, read_all};
  bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return supported ? &kernels : nullptr;
}

}  // namespace pyprune
