// What PyTorch sees: the CPU kernel of the operator `pyprune::ffn`, through LibTorch's stable ABI.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "isa.h"
#include "run.h"

namespace pyprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

void check(bool condition, const char* argument, const char* rule) {
  STD_TORCH_CHECK(condition, argument, " must ", rule);
}

Type type_of(const Tensor& tensor, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    case ScalarType::Char:
      return Type::i8;
    default:
      check(false, argument, "be float32, bfloat16 or float16 (a record also int8)");
      return Type::f32;
  }
}

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"gelu", "gelu_tanh", "relu", "relu2", "silu", "quick_gelu"};
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  check(false, "activation", "be gelu, gelu_tanh, relu, relu2, silu or quick_gelu");
  return Activation::gelu;
}

void check_tensor(const Tensor& tensor, const char* argument, ScalarType dtype, std::initializer_list<int64_t> shape) {
  check(tensor.is_cpu(), argument, "be on the CPU");
  check(tensor.scalar_type() == dtype, argument, "have the dtype that goes with x and record");
  auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
  check(same, argument, "have the shape that goes with x and record");
}

// The operands, checked, in the layout that kernels read; holds what had to be copied for that.
class Operands {
 public:
  Operands(const Tensor& x, const Tensor& record, const Maybe& index, const Maybe& scales, const Maybe& neuron_bias,
           const Maybe& down_bias, const Maybe& residual, bool gated, const std::string& activation) {
    p_.gated = gated;
    p_.activation = activation_of(activation);
    set_tokens(x);
    set_record(record);
    set_index(index);
    int64_t rows = record.size(0);
    if (scales) p_.scales = static_cast<const float*>(dense(*scales, "scales", ScalarType::Float, {rows, p_.parts()}));
    if (neuron_bias) p_.neuron_bias = dense(*neuron_bias, "neuron_bias", x.scalar_type(), {rows, p_.parts() - 1});
    if (down_bias) p_.down_bias = dense(*down_bias, "down_bias", x.scalar_type(), {p_.hidden_size});
    if (residual) set_residual(*residual, x);
  }

  Problem& problem() { return p_; }

 private:
  const void* keep(Tensor tensor) {
    held_[count_] = std::move(tensor);
    return held_[count_++]->const_data_ptr();
  }

  const void* dense(const Tensor& tensor, const char* argument, ScalarType dtype,
                    std::initializer_list<int64_t> shape) {
    check_tensor(tensor, argument, dtype, shape);
    return tensor.is_contiguous() ? tensor.const_data_ptr() : keep(torch::stable::contiguous(tensor));
  }

  void set_tokens(const Tensor& x) {
    p_.x_type = type_of(x, "x");
    check(x.is_cpu() && p_.x_type != Type::i8, "x", "be a floating-point tensor on the CPU");
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
    check(record.is_cpu(), "record", "be on the CPU");
    check(record.dim() == 2 && record.size(1) == p_.parts() * p_.hidden_size, "record",
          "have two dimensions, the second of 2 (gated: 3) times the width of x");
    bool in_rows = record.stride(1) == 1 || record.size(1) <= 1;
    p_.record = in_rows ? record.const_data_ptr() : keep(torch::stable::contiguous(record));
    p_.record_stride = in_rows ? record.stride(0) : record.size(1);
    p_.neurons = record.size(0);
  }

  void set_index(const Maybe& index) {
    if (!index) return;
    check(index->dim() == 1, "index", "have one dimension");
    int64_t rows = p_.neurons;
    p_.neurons = index->size(0);
    p_.index = static_cast<const int32_t*>(dense(*index, "index", ScalarType::Int, {p_.neurons}));
    bool inside = true;
    for (int64_t i = 0; i < p_.neurons; ++i) inside &= p_.index[i] >= 0 && p_.index[i] < rows;
    check(inside, "index", "hold rows of the record");
  }

  void set_residual(const Tensor& residual, const Tensor& x) {
    check(residual.is_cpu() && residual.scalar_type() == x.scalar_type(), "residual", "have the device and dtype of x");
    bool same = residual.dim() == x.dim();
    for (int64_t i = 0; same && i < x.dim(); ++i) same = residual.size(i) == x.size(i);
    check(same, "residual", "have the shape of x");
    p_.residual = residual.is_contiguous() ? residual.const_data_ptr() : keep(torch::stable::contiguous(residual));
  }

  Problem p_{};
  std::array<Maybe, 7> held_;
  int count_ = 0;
};

// An uninitialised, contiguous tensor like x.
Tensor output_like(const Tensor& x) {
  auto sizes = x.sizes();
  std::array<int64_t, 8> strides;
  check(sizes.size() <= strides.size(), "x", "have at most eight dimensions");
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

void parallel_for(int64_t chunks, void (*body)(void*, int64_t), void* context) {
  if (chunks == 1) return body(context, 0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(context, i);
  });
}

// What Python's dispatcher chooses.
Tensor by_dispatch(const Tensor& x, const Tensor& record, const Maybe& index, const Maybe& scales,
                   const Maybe& neuron_bias, const Maybe& down_bias, const Maybe& residual, bool gated,
                   const std::string& activation, const std::string& backend) {
  using torch::stable::detail::from;
  std::array<StableIValue, 10> stack{from(x),         from(record),   from(index), from(scales),     from(neuron_bias),
                                     from(down_bias), from(residual), from(gated), from(activation), from(backend)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("pyprune::ffn_by_dispatch", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

bool few_tokens(const Tensor& x, int64_t most) { return most > 0 && x.dim() > 0 && x.numel() <= most * x.size(-1); }

Tensor ffn(const Tensor& x, const Tensor& record, const Maybe& index, const Maybe& scales, const Maybe& neuron_bias,
           const Maybe& down_bias, const Maybe& residual, bool gated, const std::string& activation,
           const std::string& backend, int64_t native_tokens) {
  if (!(backend == "cpu" || (backend == "auto" && few_tokens(x, native_tokens))))
    return by_dispatch(x, record, index, scales, neuron_bias, down_bias, residual, gated, activation, backend);
  Operands operands(x, record, index, scales, neuron_bias, down_bias, residual, gated, activation);
  Problem& problem = operands.problem();
  check((problem.weight_type == Type::i8) == scales.has_value(), "scales", "be given for int8 records only");
  Tensor out = output_like(x);
  problem.out = out.mutable_data_ptr();
  if (problem.hidden_size > 0) run(problem, current_kernels(), torch::stable::get_num_threads(), parallel_for);
  return out;
}

std::string cpu_isa(const std::string& wanted) {
  if (!wanted.empty()) use_kernels(wanted == "best" ? "" : wanted);
  return current_kernels().name;
}

// All that can be forced, separated by commas, the best first.
std::string cpu_isas() {
  std::string names;
  for (const Kernels* kernels : available_kernels()) names += (names.empty() ? "" : ",") + std::string(kernels->name);
  return names;
}

// Read a contiguous float32 tensor once, with all threads; the sum of it.
double cpu_read(const Tensor& buffer) {
  check(buffer.is_cpu() && buffer.scalar_type() == ScalarType::Float && buffer.is_contiguous(), "buffer",
        "be a contiguous float32 tensor on the CPU");
  return read(static_cast<const float*>(buffer.const_data_ptr()), buffer.numel(), current_kernels(),
              torch::stable::get_num_threads(), parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyprune, m) {
  m.def("cpu_isa(str wanted) -> str");
  m.def("cpu_isas() -> str");
  m.def("cpu_read(Tensor buffer) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(pyprune, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("cpu_read", TORCH_BOX(&cpu_read));
}

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) { m.impl("ffn", TORCH_BOX(&ffn)); }

}  // namespace pyprune
