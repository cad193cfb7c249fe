// The operands of a call of experts as PyTorch gives them: checked, and in the layout that kernels read.
//
// For the one source of a library that binds it.
#pragma once

#include "operands.h"
#include "routed.h"

namespace pyprune {
namespace {

// What the schema of every operator of experts begins with: records `rows` `[E, F, P*D]` on x `[M, D]`, routed by
// `index` and `weights` `[M, K]`; of a gather the rows `kept` `[E, most]`, of which `counts` `[E]` count.
#define PYPRUNE_ROUTED                                                                                              \
  "Tensor x, Tensor rows, Tensor? scales, Tensor? kept, Tensor? counts, Tensor index, Tensor weights, bool gated, " \
  "str activation"

class RoutedOperands {
 public:
  RoutedOperands(Place place, const Tensor& x, const Tensor& rows, const Maybe& scales, const Maybe& kept,
                 const Maybe& counts, const Tensor& index, const Tensor& weights, bool gated,
                 const std::string& activation)
      : place_(place) {
    check(x.dim() == 2, "x", "have two dimensions");
    check(rows.dim() == 3 && rows.size(0) > 0, "rows", "have three dimensions, the first of one expert at least");
    check_place(place, x, "x");
    check_place(place, rows, "rows");
    Call& call = r_.call;
    call.gated = gated;
    call.activation = activation_of(activation);
    call.x_type = type_of(x, "x");
    call.weight_type = type_of(rows, "rows");
    check(call.x_type != Type::i8 && call.x_type != Type::i4, "x", "be floating point");
    check(call.weight_type != Type::i4, "rows", "be float32, bfloat16, float16 or int8");
    call.tokens = x.size(0);
    call.hidden_size = x.size(1);
    call.neurons = call.rows = rows.size(1);
    check(rows.size(2) == call.parts() * call.hidden_size, "rows", "be 2 (gated: 3) times as wide as x");
    check(rows.stride(2) == 1 || rows.size(2) <= 1, "rows", "hold each neuron in one run of memory");
    check((call.weight_type == Type::i8) == scales.has_value(), "scales", "be given for int8 rows only");
    call.record = rows.const_data_ptr();
    call.record_stride = rows.stride(1);
    r_.experts = rows.size(0);
    r_.expert_stride = rows.stride(0);
    bool in_rows = x.stride(1) == 1 || x.size(1) <= 1;
    call.x = in_rows ? x.const_data_ptr() : keep(torch::stable::contiguous(x));
    call.x_stride = in_rows ? x.stride(0) : x.size(1);
    if (scales) {
      std::initializer_list<int64_t> shape{r_.experts, call.rows, int64_t{call.parts()}};
      call.scales = static_cast<const float*>(dense(*scales, "scales", ScalarType::Float, shape));
    }
    set_routing(index, weights);
    set_kept(kept, counts);
  }

  RoutedCall& routed() { return r_; }

 private:
  const void* keep(Tensor tensor) {
    held_.push_back(std::move(tensor));
    return held_.back().const_data_ptr();
  }

  const void* dense(const Tensor& tensor, const char* argument, ScalarType dtype,
                    std::initializer_list<int64_t> shape) {
    check_tensor(place_, tensor, argument, dtype, shape);
    return tensor.is_contiguous() ? tensor.const_data_ptr() : keep(torch::stable::contiguous(tensor));
  }

  // What is on a device would have to be waited for, so its maker has checked it.
  void set_routing(const Tensor& index, const Tensor& weights) {
    r_.picked = index.dim() == 2 ? index.size(1) : 0;
    int64_t tokens = r_.call.tokens;
    r_.index = static_cast<const int64_t*>(dense(index, "index", ScalarType::Long, {tokens, r_.picked}));
    ScalarType dtype = place_.reads_index ? ScalarType::Float : weights.scalar_type();
    r_.weights = dense(weights, "weights", dtype, {tokens, r_.picked});
    r_.weights_type = type_of(weights, "weights");
    check(r_.weights_type != Type::i8 && r_.weights_type != Type::i4, "weights", "be floating point");
    if (!place_.reads_index) return;
    bool inside = true;
    for (int64_t i = 0; i < tokens * r_.picked; ++i) inside &= r_.index[i] >= 0 && r_.index[i] < r_.experts;
    check(inside, "index", "name experts that rows has");
  }

  void set_kept(const Maybe& kept, const Maybe& counts) {
    check(kept.has_value() == counts.has_value(), "counts", "be given with kept, and there alone");
    if (!kept) return;
    Call& call = r_.call;
    check(kept->dim() == 2, "kept", "have two dimensions");
    call.neurons = kept->size(1);
    check(call.rows > 0 || call.neurons == 0, "kept", "be empty beside experts without rows");
    call.index = static_cast<const int32_t*>(dense(*kept, "kept", ScalarType::Int, {r_.experts, call.neurons}));
    r_.counts = static_cast<const int32_t*>(dense(*counts, "counts", ScalarType::Int, {r_.experts}));
    if (!place_.reads_index) return;
    bool inside = true;
    for (int64_t e = 0; e < r_.experts; ++e) {
      inside &= r_.counts[e] >= 0 && r_.counts[e] <= call.neurons;
      for (int64_t i = 0; inside && i < r_.counts[e]; ++i) {
        int32_t row = call.index[e * call.neurons + i];
        inside &= row >= 0 && row < call.rows;
      }
    }
    check(inside, "kept", "hold rows of the experts, as many as counts says");
  }

  Place place_;
  RoutedCall r_{};
  std::vector<Tensor> held_;
};

}  // namespace
}  // namespace pyprune
