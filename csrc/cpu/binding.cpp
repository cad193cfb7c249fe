// What PyTorch sees: the CPU kernel of the operator `pyprune::ffn`, and `pyprune::moe_cpu` for the experts of a
// mixture, through LibTorch's stable ABI.

#include "../common/routed_operands.h"
#include "experts.h"
#include "isa.h"
#include "run.h"

namespace pyprune {
namespace {

void parallel_for(int64_t chunks, void (*body)(void*, int64_t), void* context) {
  if (chunks == 1) return body(context, 0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(context, i);
  });
}

Tensor ffn(const Given& given, const std::string& backend, int64_t native_tokens, bool batch_invariant) {
  bool own = backend == "cpu" || (backend == "auto" && few_tokens(given.x, native_tokens));
  if (!own || batch_invariant) return by_dispatch(given, backend, batch_invariant);
  Operands operands(kCpu, given);
  Tensor out = output_like(given.x);
  Call& call = operands.call();
  call.out = out.mutable_data_ptr();
  if (call.hidden_size > 0) run(call, current_kernels(), torch::stable::get_num_threads(), parallel_for);
  return out;
}

Tensor moe_cpu(const Tensor& x, const Tensor& rows, const Maybe& scales, const Maybe& kept, const Maybe& counts,
               const Tensor& index, const Tensor& weights, bool gated, const std::string& activation) {
  RoutedOperands operands(kCpu, x, rows, scales, kept, counts, index, weights, gated, activation);
  Tensor out = output_like(x);
  RoutedCall& routed = operands.routed();
  routed.call.out = out.mutable_data_ptr();
  if (routed.call.hidden_size > 0)
    run_experts(routed, current_kernels(), torch::stable::get_num_threads(), parallel_for);
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

// Write the weights of int4 rows (`[n, parts * bytes]`) into `out`, `[n, parts * D]`.
void cpu_write_out(const Tensor& rows, int64_t parts, Tensor out) {
  check(rows.is_cpu() && rows.dim() == 2 && rows.scalar_type() == ScalarType::Byte && rows.stride(1) == 1, "rows",
        "be uint8 of two dimensions on the CPU, contiguous along a row");
  check(out.is_cpu() && out.dim() == 2 && out.is_contiguous(), "out", "be contiguous, of two dimensions, on the CPU");
  check(parts == 2 || parts == 3, "parts", "be 2 or 3");
  Call call{};
  call.gated = parts == 3;
  call.weight_type = Type::i4;
  call.x_type = type_of(out, "out");
  check(call.x_type != Type::i8 && call.x_type != Type::i4, "out", "be floating point");
  call.hidden_size = out.size(1) / parts;
  call.rows = rows.size(0);
  check(call.hidden_size % kScaleGroup == 0 && out.size(0) == call.rows && out.size(1) == parts * call.hidden_size &&
            rows.size(1) == parts * call.part(),
        "out", "have the shape that goes with rows and parts");
  call.record = rows.const_data_ptr();
  call.record_stride = rows.stride(0);
  call.out = out.mutable_data_ptr();
  write_out(call, current_kernels(), torch::stable::get_num_threads(), parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyprune, m) {
  m.def("cpu_isa(str wanted) -> str");
  m.def("cpu_isas() -> str");
  m.def("cpu_read(Tensor buffer) -> float");
  m.def("moe_cpu(" PYPRUNE_ROUTED ") -> Tensor");
  m.def("cpu_write_out(Tensor rows, int parts, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyprune, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("cpu_read", TORCH_BOX(&cpu_read));
  m.impl("cpu_write_out", TORCH_BOX(&cpu_write_out));
}

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("ffn", &Boxed<&ffn>::call);
  m.impl("moe_cpu", TORCH_BOX(&moe_cpu));
}

}  // namespace pyprune
