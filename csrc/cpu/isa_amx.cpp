// AVX-512 with BF16, and matrix tiles for several tokens.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

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
constexpr bool kIntegersInFours = false;
#include "kernel.h"
#include "amx.h"

// Whether the processor has tiles, and the system lets this process use them: it must be asked, once.
bool tiles_allowed() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16AndTile = 1u << 22 | 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16AndTile) != kBf16AndTile) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels{"amx", tile_shape, tile_pack, tile_slab, finish, combine, write_out, read_all};
  static const bool supported = avx512_bf16_kernels() && tiles_allowed();
  return supported ? &kernels : nullptr;
}

}  // namespace pyprune
