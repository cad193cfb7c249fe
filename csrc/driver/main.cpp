// Runs calls of the CPU kernels without torch, for machines that only an emulator has: each call's operands from a
// file, its result into another. Tests only; the writer and reader of these files is tests/test_arm.py.
//
// Operands lie at the ends of pages of which the next may not be read.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/run.h"

namespace {

void read_exactly(FILE* file, void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, file) != bytes) throw std::runtime_error("the file ends within a call");
}

int64_t read_number(FILE* file) {
  int64_t number = 0;
  read_exactly(file, &number, sizeof number);
  return number;
}

// Bytes whose last one is the last of a page, and behind that page no memory.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_t whole = (bytes + page - 1) / page * page;
    size_ = whole + page;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + whole, page, PROT_NONE) != 0)
      throw std::runtime_error("no memory");
    memory_ = static_cast<char*>(memory);
    data_ = memory_ + whole - bytes;
  }
  Guarded(Guarded&& other) noexcept : memory_(other.memory_), data_(other.data_), size_(other.size_) {
    other.memory_ = nullptr;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  Guarded& operator=(Guarded&&) = delete;
  ~Guarded() {
    if (memory_) munmap(memory_, size_);
  }
  char* data() const { return data_; }

 private:
  char* memory_;
  char* data_;
  size_t size_;
};

// One after another, backwards: no result may depend on which thread takes what.
void run_in_turn(int64_t chunks, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = chunks; i-- > 0;) body(context, i);
}

// An operand: its bytes, or null for one that is not given (a size of -1).
const void* operand(FILE* file, std::vector<Guarded>& held) {
  int64_t bytes = read_number(file);
  if (bytes < 0) return nullptr;
  held.emplace_back(static_cast<size_t>(bytes));
  read_exactly(file, held.back().data(), static_cast<size_t>(bytes));
  return held.back().data();
}

// A call, or with `write_out` its int4 rows written out; the result goes to `to`.
void run_one(FILE* from, FILE* to) {
  pyprune::Call call{};
  bool write_out = read_number(from) != 0;
  call.tokens = read_number(from);
  call.hidden_size = read_number(from);
  call.neurons = read_number(from);
  call.rows = read_number(from);
  call.gated = read_number(from) != 0;
  call.activation = static_cast<pyprune::Activation>(read_number(from));
  call.x_type = static_cast<pyprune::Type>(read_number(from));
  call.weight_type = static_cast<pyprune::Type>(read_number(from));
  call.x_stride = call.hidden_size;
  call.record_stride = call.parts() * call.part();
  std::vector<Guarded> held;
  held.reserve(7);
  call.x = operand(from, held);
  call.record = operand(from, held);
  call.index = static_cast<const int32_t*>(operand(from, held));
  call.scales = static_cast<const float*>(operand(from, held));
  call.neuron_bias = operand(from, held);
  call.down_bias = operand(from, held);
  int64_t values = write_out ? call.rows * call.parts() * call.hidden_size : call.tokens * call.hidden_size;
  size_t bytes = static_cast<size_t>(values * pyprune::element_size(call.x_type));
  held.emplace_back(bytes);
  call.out = held.back().data();
  std::memset(call.out, 0xff, bytes);  // NaN, where nothing is written
  constexpr int64_t kThreads = 3;
  if (write_out)
    pyprune::write_out(call, pyprune::current_kernels(), kThreads, run_in_turn);
  else
    pyprune::run(call, pyprune::current_kernels(), kThreads, run_in_turn);
  if (std::fwrite(call.out, 1, bytes, to) != bytes) throw std::runtime_error("the result cannot be written");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s CALLS RESULTS\n", arguments[0]);
    return 2;
  }
  FILE* from = std::fopen(arguments[1], "rb");
  FILE* to = std::fopen(arguments[2], "wb");
  if (!from || !to) {
    std::fprintf(stderr, "cannot open the files\n");
    return 2;
  }
  try {
    for (int64_t calls = read_number(from); calls > 0; --calls) run_one(from, to);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::printf("%s\n", pyprune::current_kernels().name);
  return std::fclose(to) == 0 ? 0 : 1;
}
