// AVX-512 with BF16 and VNNI.
#include <immintrin.h>

#include "kernels.h"

namespace pyprune {
namespace {

#include "scalar.h"
#include "simd_avx512.h"
#include "activation.h"
#include "rows.h"
#include "nibbles.h"
#include "dot_bf16.h"
#include "products.h"
#include "ends.h"
#include "blocks.h"
#include "pairs.h"
#include "dot_bytes.h"
#include "dot_nibbles.h"
constexpr bool kIntegersInFours = true;
#include "kernel.h"

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels{"avx512_bf16", shape, pack, slab, finish, combine, write_out, read_all};
  bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return supported ? &kernels : nullptr;
}

}  // namespace pyprune
