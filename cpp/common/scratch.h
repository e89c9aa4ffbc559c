// Memory for the length of one call: one allocation, cut into aligned pieces. In an unnamed namespace,
// because units compiled for different instruction sets must not share its code.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace tersor {
namespace {

class Scratch {
 public:
  // Counts first (reserve), then allocates, then hands out the pieces in the same order.
  template <class T>
  void reserve(size_t count) {
    bytes_ += round_up(count * sizeof(T));
  }
  bool allocate() {
    memory_ = static_cast<char*>(std::aligned_alloc(64, bytes_ ? bytes_ : 64));
    return memory_ != nullptr;
  }
  template <class T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * sizeof(T));
    return piece;
  }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

 private:
  static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }
  char* memory_ = nullptr;
  size_t bytes_ = 0, used_ = 0;
};

}  // namespace
}  // namespace tersor
