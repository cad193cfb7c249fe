// From PyTorch's tensors to `run`, for the device and for its simulator.
#pragma once

#include "../common/operands.h"
#include "run.h"

namespace pyprune {
namespace {

// What `plan` gives, in the order of PlanOptions; nothing given leaves all to the analysis.
inline PlanOptions options_of(const std::vector<int64_t>& plan) {
  PlanOptions c;
  int32_t* members[] = {&c.algorithm, &c.blocks,      &c.cluster, &c.teams, &c.step, &c.stages,
                        &c.splits,    &c.evict_first, &c.overlap, &c.early, &c.bulk};
  static_assert(std::size(members) == kPlanOptions, "every choice can be given");
  check(plan.size() <= kPlanOptions, "plan", "have at most eleven numbers");
  for (size_t i = 0; i < plan.size(); ++i) {
    check(plan[i] >= -1 && plan[i] < 1 << 24, "plan", "hold numbers from -1 to 2^24");
    *members[i] = static_cast<int32_t>(plan[i]);
  }
  return c;
}

inline Type type_named(const std::string& name) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "int8"};  // in the order of Type
  for (size_t i = 0; i < std::size(names); ++i)
    if (name == names[i]) return static_cast<Type>(i);
  check(false, "weights", "be float32, bfloat16, float16 or int8");
  return Type::f32;
}

[[noreturn]] inline void refuse(const Refusal& refusal) {
  check(false, refusal.argument.c_str(), refusal.rule.c_str());
  std::abort();
}

// The plan for these sizes, as JSON.
inline std::string describe_plan(const Sizes& sizes, const std::vector<int64_t>& plan, const Device& device) {
  try {
    return describe(make_plan(sizes, options_of(plan), device, running));
  } catch (const Refusal& refusal) {
    refuse(refusal);
  }
}

inline const void* after(const void* values, int64_t elements, Type type) {
  return static_cast<const char*>(values) + elements * bytes_of(type);
}

// Memory of a call whose chunks are run one by one. Their kernels follow each other as those of calls on one stream do,
// so a chunk is given what the one before it was, scratch memory and tickets; more where it needs more.
class OfChunks {
 public:
  explicit OfChunks(const Memory& memory) : from_(memory) {}

  Memory memory() {
    return {[](void* self, int64_t bytes) { return static_cast<OfChunks*>(self)->allocate(bytes); },
            [](void* self, int32_t count) { return static_cast<OfChunks*>(self)->take_tickets(count); }, this};
  }

 private:
  void* allocate(int64_t bytes) {
    if (bytes > bytes_) {
      scratch_ = from_.allocate(from_.context, bytes);
      bytes_ = bytes;
    }
    return scratch_;
  }

  uint32_t* take_tickets(int32_t count) {
    if (count > count_) {
      tickets_ = from_.tickets(from_.context, count);
      count_ = count;
    }
    return tickets_;
  }

  Memory from_;
  void* scratch_ = nullptr;
  int64_t bytes_ = -1;
  uint32_t* tickets_ = nullptr;
  int32_t count_ = -1;
};

// The FFN on `device`, in chunks of as many tokens as kernels take.
inline Tensor compute(Place place, const Given& given, const std::vector<int64_t>& plan, const Device& device,
                      const Memory& memory, Stream stream) {
  Operands operands(place, given);
  PlanOptions options = options_of(plan);
  Tensor out = output_like(given.x);
  Call& whole = operands.call();
  whole.out = out.mutable_data_ptr();
  if (whole.hidden_size == 0) return out;
  OfChunks of_chunks(memory);
  for (int64_t first = 0; first < whole.tokens; first += kMaxTokens) {
    Call part = whole;
    part.tokens = whole.tokens - first < kMaxTokens ? whole.tokens - first : kMaxTokens;
    part.x = after(whole.x, first * whole.x_stride, whole.x_type);
    part.out = const_cast<void*>(after(whole.out, first * whole.hidden_size, whole.x_type));
    Failure failure = nullptr;
    try {
      failure = run(part, options, device, of_chunks.memory(), stream);
    } catch (const Refusal& refusal) {
      refuse(refusal);
    }
    STD_TORCH_CHECK(!failure, "CUDA said: ", failure ? failure : "");
  }
  return out;
}

}  // namespace
}  // namespace pyprune
