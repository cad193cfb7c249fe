// How a call's operands lie, and its scratch memory; for the host.
#pragma once

#include "params.h"

namespace pyprune {

inline bool on_16_bytes(const void* start, int64_t elements, Type type) {
  return reinterpret_cast<uintptr_t>(start) % 16 == 0 && elements * bytes_of(type) % 16 == 0;
}

inline bool aligned(const Call& p) {
  return on_16_bytes(p.record, p.record_stride, p.weight_type) && on_16_bytes(p.record, p.hidden_size, p.weight_type);
}

// As torch promotes: eager modules round to this.
inline Type rounds_to(const Call& p) {
  if (p.weight_type == Type::i8) return p.x_type == Type::f16 ? Type::f32 : p.x_type;
  return p.x_type == p.weight_type ? p.x_type : Type::f32;
}

// Parts of one allocation, each on 256 bytes.
class Carver {
 public:
  int64_t take(int64_t bytes) {
    int64_t at = size_;
    size_ += (bytes + 255) / 256 * 256;
    return at;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// Whether kernels can read x where it is: see Params.
inline bool needs_widening(const Call& p) {
  bool whole = p.hidden_size % piece(p.weight_type) == 0 && on_16_bytes(p.x, p.x_stride, p.x_type);
  return !whole || (p.weight_type == Type::f32 && p.x_type != Type::f32);
}

}  // namespace pyprune
