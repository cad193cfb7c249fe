#include "tickets.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "layout.h"
#include "plan.h"

namespace pyprune {
namespace {

// What the widest layer needs, with the narrowest tiles.
constexpr int32_t kOfStream = kMostChannels / 128;
// 8 MB: enough for some hundred thousand captured calls.
constexpr int32_t kArena = 1 << 21;

[[noreturn]] void refuse(const std::string& what) { throw Refusal{"device", what}; }

void require(cudaError_t code) {
  if (code != cudaSuccess) refuse(std::string("give memory for tickets; CUDA said: ") + cudaGetErrorString(code));
}

// Allocated and zeroed at once, also while a graph is captured, of which this is no part.
uint32_t* zeros(int32_t count) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  require(cudaThreadExchangeStreamCaptureMode(&mode));
  void* memory = nullptr;
  cudaStream_t aside = nullptr;
  cudaError_t code = cudaMalloc(&memory, static_cast<size_t>(count) * 4);
  if (code == cudaSuccess) code = cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking);
  if (code == cudaSuccess) code = cudaMemsetAsync(memory, 0, static_cast<size_t>(count) * 4, aside);
  if (code == cudaSuccess) code = cudaStreamSynchronize(aside);
  if (aside) cudaStreamDestroy(aside);
  cudaThreadExchangeStreamCaptureMode(&mode);
  require(code);
  return static_cast<uint32_t*>(memory);
}

struct Arena {
  uint32_t* memory = nullptr;
  int32_t used = 0;
};

}  // namespace

uint32_t* tickets(int device, Stream stream, int32_t count) {
  static std::mutex mutex;
  static std::map<std::pair<int, Stream>, uint32_t*> of_streams;
  static std::map<int, Arena> arenas;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  require(cudaStreamIsCapturing(stream, &status));
  std::lock_guard<std::mutex> lock(mutex);
  if (status == cudaStreamCaptureStatusNone) {
    uint32_t*& own = of_streams[{device, stream}];
    if (!own) own = zeros(kOfStream);
    return own;
  }
  Arena& arena = arenas[device];
  if (!arena.memory) arena.memory = zeros(kArena);
  if (arena.used > kArena - count) refuse("have captured fewer calls of this kernel; 2^21 tickets are used up");
  uint32_t* own = arena.memory + arena.used;
  arena.used += count;
  return own;
}

}  // namespace pyprune
