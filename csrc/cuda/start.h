// How kernels are started: by CUDA, or by the simulator on a CPU.
#pragma once

#ifdef PYPRUNE_SIMULATE
#include "simulator/start.h"
#else

#include <cuda_runtime.h>

#include "params.h"

namespace pyprune {

using Stream = cudaStream_t;

template <class Given>
const void* address(void (*kernel)(Given)) {
  return reinterpret_cast<const void*>(kernel);
}

// An error's text, or null.
using Failure = const char*;

inline Failure failure(cudaError_t code) { return code == cudaSuccess ? nullptr : cudaGetErrorString(code); }

using Kernel = void (*)(Params);

// Shared memory beyond 48 KB must be asked for: all that there is, once a kernel and device, so that no call takes from
// another what it was given.
Failure allow_shared_memory(const void* kernel);

template <class Given>
inline Failure start(void (*kernel)(Given), const Grid& grid, const Given& params, Stream stream) {
  if (grid.shared > 48 * 1024)
    if (auto f = allow_shared_memory(address(kernel))) return f;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  config.attrs = attributes;
  if (grid.cluster > 1) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = grid.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (grid.overlap) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {const_cast<Given*>(&params)};
  return failure(cudaLaunchKernelExC(&config, address(kernel), arguments));
}

// Whether what the current device runs of `kernel` was compiled with clusters and with waiting for kernels before it.
inline bool has_clusters(Kernel kernel) {
  cudaFuncAttributes compiled;
  return cudaFuncGetAttributes(&compiled, address(kernel)) == cudaSuccess && compiled.ptxVersion >= 90;
}

// How many clusters of this grid run at the same time; 0 where it cannot run at all.
inline int running_clusters(Kernel kernel, const Grid& grid) {
  if (allow_shared_memory(address(kernel))) return 0;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = grid.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid.cluster;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  return cudaOccupancyMaxActiveClusters(&clusters, address(kernel), &config) == cudaSuccess ? clusters : 0;
}

}  // namespace pyprune

#endif
