// What a thread knows of the others' past: vector clocks, shared between the threads that met at a barrier.
//
// A thread's clock advances whenever it publishes its past (barrier, sync_warp, fence). An access by thread
// u of block b at clock c is known to thread t, and so ordered before what t does, when t's Knowledge holds
// c or more for (b, u). Knowledge is immutable and counted, so that a block of 256 threads that meets at a
// barrier makes one new vector, not 256.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace tersor {
namespace emulation {

template <class T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* p) : p_(p) {
    if (p_) ++p_->references;
  }
  Ref(const Ref& other) : Ref(other.p_) {}
  Ref(Ref&& other) noexcept : p_(other.p_) { other.p_ = nullptr; }
  Ref& operator=(Ref other) noexcept {
    std::swap(p_, other.p_);
    return *this;
  }
  ~Ref() {
    if (p_ && --p_->references == 0) delete p_;
  }
  T* get() const { return p_; }
  T* operator->() const { return p_; }
  T& operator*() const { return *p_; }
  explicit operator bool() const { return p_ != nullptr; }
  bool operator==(const Ref& other) const { return p_ == other.p_; }

 private:
  T* p_ = nullptr;
};

struct Clocks {  // of the threads of one block
  int references = 0;
  std::vector<uint32_t> at;
};

struct Knowledge {
  int references = 0;
  std::vector<std::pair<int, Ref<Clocks>>> blocks;  // sorted by block

  const Clocks* find(int block) const {
    for (const auto& entry : blocks)
      if (entry.first == block) return entry.second.get();
    return nullptr;
  }
};

using Past = Ref<Knowledge>;  // null: nothing is known

inline Ref<Clocks> join(const Ref<Clocks>& a, const Ref<Clocks>& b) {
  if (a == b) return a;
  const size_t n = a->at.size();
  bool a_holds = true, b_holds = true;
  for (size_t i = 0; i < n; ++i) {
    a_holds &= a->at[i] >= b->at[i];
    b_holds &= b->at[i] >= a->at[i];
  }
  if (a_holds) return a;
  if (b_holds) return b;
  Ref<Clocks> result(new Clocks(*a));
  result->references = 1;
  for (size_t i = 0; i < n; ++i) result->at[i] = a->at[i] > b->at[i] ? a->at[i] : b->at[i];
  return result;
}

inline Past join(const Past& a, const Past& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  Past result(new Knowledge);
  auto i = a->blocks.begin(), j = b->blocks.begin();
  while (i != a->blocks.end() || j != b->blocks.end()) {
    if (j == b->blocks.end() || (i != a->blocks.end() && i->first < j->first)) {
      result->blocks.push_back(*i++);
    } else if (i == a->blocks.end() || j->first < i->first) {
      result->blocks.push_back(*j++);
    } else {
      result->blocks.emplace_back(i->first, join(i->second, j->second));
      ++i, ++j;
    }
  }
  return result;
}

// `past` with clocks raised for some threads of `block`: (thread, clock) pairs.
template <class Pairs>
Past raise(const Past& past, int block, int threads, const Pairs& pairs) {
  Past result(past ? new Knowledge(*past) : new Knowledge);
  result->references = 1;
  auto entry = result->blocks.begin();
  while (entry != result->blocks.end() && entry->first < block) ++entry;
  Clocks* clocks;
  if (entry != result->blocks.end() && entry->first == block) {
    clocks = new Clocks(*entry->second);
  } else {
    clocks = new Clocks;
    clocks->at.assign(static_cast<size_t>(threads), 0);
    entry = result->blocks.emplace(entry, block, Ref<Clocks>());
  }
  clocks->references = 0;
  entry->second = Ref<Clocks>(clocks);
  for (const auto& [thread, clock] : pairs)
    if (clocks->at[thread] < clock) clocks->at[thread] = clock;
  return result;
}

// One access of a location.
struct Epoch {
  int32_t block = 0;
  uint32_t clock = 0;  // 0: none
  uint16_t thread = 0;
  uint16_t flags = 0;
};
constexpr uint16_t in_flight = 1;  // the destination of a cp.async that was not waited for
constexpr uint16_t is_relaxed = 2;  // an atomic or volatile access

// The last write of a location and the reads since, of which those are dropped that a later one knew of.
struct Cell {
  Epoch write, read;
  int32_t more = 0;  // further unordered readers: 1 + an index into Readers, or 0
};

}  // namespace emulation
}  // namespace tersor
