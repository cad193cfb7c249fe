#include "start.h"

#include <mutex>
#include <set>
#include <utility>

namespace pyprune {

Failure allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  if (auto f = failure(cudaGetDevice(&device))) return f;
  std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return nullptr;
  if (auto f = failure(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))) return f;
  if (auto f = failure(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most))) return f;
  allowed.emplace(kernel, device);
  return nullptr;
}

}  // namespace pyprune
