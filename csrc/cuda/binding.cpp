// What PyTorch sees: the CUDA kernel of the operator `pyprune::ffn`, `ffn_cuda`, which takes a plan, and
// `moe_cuda` for the experts of a mixture.

#include "compute_experts.h"
#include "kernels.h"
#include "tickets.h"

#include <torch/csrc/stable/accelerator.h>

#include <dlfcn.h>

#include <map>
#include <mutex>

namespace pyprune {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// Of torch's CUDA half, or null: this library is also built against, and loaded beside, a torch that has none.
CurrentStream current_stream() {
  static const auto found = [] {
    void* half = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return half ? reinterpret_cast<CurrentStream>(dlsym(half, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return found;
}

const Device& facts(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(index);
  if (found != known.end()) return found->second;
  int processors = 0, shared = 0, major = 0;
  bool right = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index) == cudaSuccess &&
               cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) == cudaSuccess &&
               cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess;
  check(right && major >= 8, "device", "be a CUDA device of compute capability 8.0 or newer");
  // What the device runs decides, machine code or PTX, and not what it could do.
  bool clusters = major >= 9 && has_clusters(kernels(Type::bf16, 1, true).single_pass);
  return known.emplace(index, Device{index, processors, static_cast<uint32_t>(shared), clusters}).first->second;
}

// The current device and its current stream, while a call is made.
class Session {
 public:
  explicit Session(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {
    check(current_stream() != nullptr, "torch", "be built with CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Memory memory() {
    return {[](void* self, int64_t bytes) { return static_cast<Session*>(self)->allocate(bytes); },
            [](void* self, int32_t count) { return static_cast<Session*>(self)->take_tickets(count); }, this};
  }

  const Device& device() const { return facts(index_); }
  cudaStream_t stream() const { return stream_; }

 private:
  // By torch, which hands it out again to later calls on this stream, and keeps it for a graph that is captured.
  void* allocate(int64_t bytes) {
    int64_t stride = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                                    aoti_torch_device_type_cuda(), index_, &handle));
    held_.emplace_back(handle);
    return held_.back().mutable_data_ptr();
  }

  uint32_t* take_tickets(int32_t count) { return tickets(index_, stream_, count); }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> held_;
};

Tensor ffn_cuda(const Given& given, const std::vector<int64_t>& plan) {
  check(given.x.is_cuda(), "x", "be on a CUDA device");
  Session session(given.x);
  Place place{true, given.x.get_device_index(), false};
  return compute(place, given, plan, session.device(), session.memory(), session.stream());
}

Tensor ffn(const Given& given, const std::string& backend, int64_t native_tokens, bool batch_invariant) {
  bool own = backend == "auto" && few_tokens(given.x, native_tokens);
  return own && !batch_invariant ? ffn_cuda(given, {}) : by_dispatch(given, backend, batch_invariant);
}

Tensor moe_cuda(const Tensor& x, const Tensor& rows, const Maybe& scales, const Maybe& kept, const Maybe& counts,
                const Tensor& index, const Tensor& weights, bool gated, const std::string& activation,
                const std::vector<int64_t>& plan) {
  check(x.is_cuda(), "x", "be on a CUDA device");
  Session session(x);
  Place place{true, x.get_device_index(), false};
  RoutedOperands operands(place, x, rows, scales, kept, counts, index, weights, gated, activation);
  return compute_experts(operands, x, plan, session.device(), session.memory(), session.stream());
}

// What the analysis plans on device `device` for these sizes, with what `plan` chooses, as JSON.
std::string cuda_plan(int64_t device, int64_t tokens, int64_t hidden_size, int64_t neurons, bool gated, bool indexed,
                      const std::string& weights, const std::vector<int64_t>& plan) {
  torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return describe_plan({tokens, hidden_size, neurons, gated, indexed, type_named(weights),
                        hidden_size * bytes_of(type_named(weights)) % 16 == 0},
                       plan, facts(static_cast<int>(device)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyprune, m) {
  m.def(
      "cuda_plan(int device, int tokens, int hidden_size, int neurons, bool gated, bool indexed, "
      "str weights, int[] plan) -> str");
  m.def("ffn_cuda(" PYPRUNE_OPERANDS ", int[] plan) -> Tensor");
  m.def("moe_cuda(" PYPRUNE_ROUTED ", int[] plan) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyprune, CompositeExplicitAutograd, m) { m.impl("cuda_plan", TORCH_BOX(&cuda_plan)); }

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("ffn", &Boxed<&ffn>::call);
  m.impl("ffn_cuda", &Boxed<&ffn_cuda>::call);
  m.impl("moe_cuda", TORCH_BOX(&moe_cuda));
}

}  // namespace pyprune
