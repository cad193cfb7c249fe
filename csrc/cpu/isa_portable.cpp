// The baseline that runs everywhere.

#include "kernels.h"

namespace pyprune {
namespace {

#include "scalar.h"
#include "simd_portable.h"
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

const Kernels* portable_kernels() {
  static const Kernels kernels{"portable", shape, pack, slab, finish, combine, write_out, read_all};
  bool supported = true;
  return supported ? &kernels : nullptr;
}

}  // namespace pyprune
