#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pyprune {
namespace {

const Kernels* find(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : available_kernels()) {
    if (name.empty() || name == kernels->name) return kernels;
    names += names.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::runtime_error("the instruction set must be one that this machine and this build have (" + names +
                           "); got " + name);
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
  for (const Kernels* kernels : {
#ifdef PYPRUNE_HAS_AMX
           amx_kernels(),
#endif
#ifdef PYPRUNE_HAS_AVX512_BF16
           avx512_bf16_kernels(),
#endif
#ifdef PYPRUNE_HAS_AVX512
           avx512_kernels(),
#endif
#ifdef PYPRUNE_HAS_AVX2
           avx2_kernels(),
#endif
           portable_kernels()})
    if (kernels) found.push_back(kernels);
  return found;
}

const Kernels& current_kernels() {
  const Kernels* kernels = in_use.load(std::memory_order_acquire);
  if (!kernels) {
    const char* wanted = std::getenv("PYPRUNE_CPU_ISA");
    use_kernels(wanted ? wanted : "");
    kernels = in_use.load(std::memory_order_acquire);
  }
  return *kernels;
}

void use_kernels(const std::string& name) { in_use.store(find(name), std::memory_order_release); }

}  // namespace pyprune
