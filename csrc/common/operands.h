// A call's operands as PyTorch gives them: checked, and in the layout that kernels read. LibTorch's stable ABI only.
//
// For the one source of a library that binds it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"

namespace pyprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline void check(bool condition, const char* argument, const char* rule) {
  STD_TORCH_CHECK(condition, argument, " must ", rule);
}

inline Type type_of(const Tensor& tensor, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    case ScalarType::Char:
      return Type::i8;
    case ScalarType::Byte:
      return Type::i4;
    default:
      check(false, argument, "be float32, bfloat16 or float16 (a record also int8, or uint8 for int4)");
      return Type::f32;
  }
}

inline Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"gelu", "gelu_tanh", "relu", "relu2", "silu", "quick_gelu"};
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  check(false, "activation", "be gelu, gelu_tanh, relu, relu2, silu or quick_gelu");
  return Activation::gelu;
}

// Where operands must be: on the CPU, or on one CUDA device.
struct Place {
  bool cuda;
  int32_t index;
  bool reads_index;  // of neurons: on a device that would wait for it, so its maker has checked it
};

constexpr Place kCpu{false, -1, true};

inline void check_place(Place place, const Tensor& tensor, const char* argument) {
  bool here = place.cuda ? tensor.is_cuda() && tensor.get_device_index() == place.index : tensor.is_cpu();
  check(here, argument, place.cuda ? "be on the CUDA device of x" : "be on the CPU");
}

inline void check_tensor(Place place, const Tensor& tensor, const char* argument, ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  check_place(place, tensor, argument);
  check(tensor.scalar_type() == dtype, argument, "have the dtype that goes with x and record");
  auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
  check(same, argument, "have the shape that goes with x and record");
}

// What the schema of every operator begins with, and what a call brings of it.
#define PYPRUNE_OPERANDS                                                                                         \
  "Tensor x, Tensor record, Tensor? index, Tensor? scales, Tensor? neuron_bias, Tensor? down_bias, bool gated, " \
  "str activation"

struct Given {
  Tensor x, record;
  Maybe index, scales, neuron_bias, down_bias;
  bool gated;
  std::string activation;
};

constexpr size_t kGiven = 8;  // members of Given

// The kernel `Tensor kernel(const Given&, rest...)` as the dispatcher calls it: operands, then the rest of its schema.
template <auto kernel>
struct Boxed;

template <class... Rest, Tensor (*kernel)(const Given&, Rest...)>
struct Boxed<kernel> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    check(arguments == kGiven + sizeof...(Rest) && results == 1, "schema", "be that of its kernel");
    unbox(stack, std::index_sequence_for<Rest...>());
  }

 private:
  template <size_t... i>
  static void unbox(StableIValue* stack, std::index_sequence<i...>) {
    using torch::stable::detail::to;
    Given given{to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Maybe>(stack[2]), to<Maybe>(stack[3]),
                to<Maybe>(stack[4]),  to<Maybe>(stack[5]),  to<bool>(stack[6]),  to<std::string>(stack[7])};
    std::tuple<std::decay_t<Rest>...> rest{to<std::decay_t<Rest>>(stack[kGiven + i])...};
    stack[0] = torch::stable::detail::from(kernel(given, std::get<i>(rest)...));
  }
};

// The operands, checked, in the layout that kernels read; holds what had to be copied for that.
class Operands {
 public:
  Operands(Place place, const Given& given) : place_(place) {
    p_.gated = given.gated;
    p_.activation = activation_of(given.activation);
    set_tokens(given.x);
    set_record(given.record);
    set_index(given.index);
    const auto& [scales, neuron_bias, down_bias] = std::tie(given.scales, given.neuron_bias, given.down_bias);
    if (scales)
      p_.scales = static_cast<const float*>(dense(*scales, "scales", ScalarType::Float, {p_.rows, p_.parts()}));
    if (neuron_bias)
      p_.neuron_bias = dense(*neuron_bias, "neuron_bias", given.x.scalar_type(), {p_.rows, p_.parts() - 1});
    if (down_bias) p_.down_bias = dense(*down_bias, "down_bias", given.x.scalar_type(), {p_.hidden_size});
    check((p_.weight_type == Type::i8) == scales.has_value(), "scales", "be given for int8 records only");
  }

  Call& call() { return p_; }

 private:
  const void* keep(Tensor tensor) {
    held_[count_] = std::move(tensor);
    return held_[count_++]->const_data_ptr();
  }

  const void* dense(const Tensor& tensor, const char* argument, ScalarType dtype,
                    std::initializer_list<int64_t> shape) {
    check_tensor(place_, tensor, argument, dtype, shape);
    return tensor.is_contiguous() ? tensor.const_data_ptr() : keep(torch::stable::contiguous(tensor));
  }

  void set_tokens(const Tensor& x) {
    p_.x_type = type_of(x, "x");
    check_place(place_, x, "x");
    check(p_.x_type != Type::i8 && p_.x_type != Type::i4, "x", "be floating point");
    check(x.dim() >= 1, "x", "have at least one dimension");
    auto sizes = x.sizes();
    p_.hidden_size = sizes[sizes.size() - 1];
    p_.tokens = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) p_.tokens *= sizes[i];
    p_.x_stride = p_.hidden_size;
    if (x.is_contiguous()) {
      p_.x = x.const_data_ptr();
    } else if (x.dim() == 2 && x.stride(1) == 1) {
      p_.x = x.const_data_ptr();
      p_.x_stride = x.stride(0);
    } else {
      p_.x = keep(torch::stable::contiguous(x));
    }
  }

  void set_record(const Tensor& record) {
    p_.weight_type = type_of(record, "record");
    check_place(place_, record, "record");
    bool int4 = p_.weight_type == Type::i4;
    check(!int4 || !place_.cuda, "record", "not be int4 on a CUDA device");
    check(!int4 || p_.hidden_size % kScaleGroup == 0, "x", "have a multiple of 32 columns beside an int4 record");
    check(record.dim() == 2 && record.size(1) == p_.parts() * p_.part(), "record",
          "have two dimensions, the second of 2 (gated: 3) times the width of x (int4: of its bytes)");
    bool in_rows = record.stride(1) == 1 || record.size(1) <= 1;
    p_.record = in_rows ? record.const_data_ptr() : keep(torch::stable::contiguous(record));
    p_.record_stride = in_rows ? record.stride(0) : record.size(1);
    p_.neurons = p_.rows = record.size(0);
  }

  void set_index(const Maybe& index) {
    if (!index) return;
    check(index->dim() == 1, "index", "have one dimension");
    p_.neurons = index->size(0);
    check(p_.rows > 0 || p_.neurons == 0, "index", "be empty beside a record without rows");
    p_.index = static_cast<const int32_t*>(dense(*index, "index", ScalarType::Int, {p_.neurons}));
    if (!place_.reads_index) return;
    bool inside = true;
    for (int64_t i = 0; i < p_.neurons; ++i) inside &= p_.index[i] >= 0 && p_.index[i] < p_.rows;
    check(inside, "index", "hold rows of the record");
  }

  Place place_;
  Call p_{};
  std::array<Maybe, 6> held_;
  int count_ = 0;
};

// An uninitialised, contiguous tensor like x, on its device.
inline Tensor output_like(const Tensor& x) {
  auto sizes = x.sizes();
  std::array<int64_t, 8> strides;
  check(sizes.size() <= strides.size(), "x", "have at most eight dimensions");
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  int32_t dtype = 0, device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, device, index, &handle));
  return Tensor(handle);
}

// What Python's dispatcher chooses.
inline Tensor by_dispatch(const Given& given, const std::string& backend, bool batch_invariant) {
  using torch::stable::detail::from;
  std::array<StableIValue, kGiven + 3> stack{from(given.x),      from(given.record),      from(given.index),
                                             from(given.scales), from(given.neuron_bias), from(given.down_bias),
                                             from(given.gated),  from(given.activation),  from(backend),
                                             from(int64_t{0}),   from(batch_invariant)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("pyprune::ffn_by_dispatch", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline bool few_tokens(const Tensor& x, int64_t most) {
  return most > 0 && x.dim() > 0 && x.numel() <= most * x.size(-1);
}

}  // namespace
}  // namespace pyprune
