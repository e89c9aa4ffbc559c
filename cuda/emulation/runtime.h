// Host execution of CUDA kernels: what the wrappers in ptx/ and the launchers call. docs/emulation.md says
// what is checked and counted, and how.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emulation/cuda.h"

namespace tersor {
namespace emulation {

// ---- launching -------------------------------------------------------------------------------------------
// Runs call(arguments) once for each thread of the grid. resident: all blocks make progress together, as a
// kernel whose blocks wait for one another needs; otherwise a block may start after another has ended.
// Returns 0, or 1 when something was violated; emulation_error() then says what.
int run(dim3 grid, dim3 block, size_t shared_bytes, bool resident, const void* kernel, void (*call)(void*),
        void* arguments);

template <class... P, class... A>
int launch(dim3 grid, dim3 block, size_t shared_bytes, bool resident, void (*kernel)(P...), A... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
  } call{kernel, std::tuple<std::decay_t<P>...>(arguments...)};
  return run(
      grid, block, shared_bytes, resident, reinterpret_cast<const void*>(kernel),
      [](void* data) {
        Call& c = *static_cast<Call*>(data);
        std::apply(c.kernel, c.arguments);
      },
      &call);
}

template <class... P, class... A>
int launch(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(P...), A... arguments) {
  return launch(grid, block, shared_bytes, false, kernel, arguments...);
}

// ---- memory ----------------------------------------------------------------------------------------------
// relaxed: a volatile access, which may meet atomics. constant: through the read-only path.
enum class Order { plain, constant, relaxed };

uint32_t dynamic_shared();
void read_shared(void* value, uint32_t address, int bytes);
void write_shared(uint32_t address, const void* value, int bytes);
void read_global(void* value, const void* p, int bytes, Order order);
void write_global(void* p, const void* value, int bytes, Order order);

void copy_async(uint32_t shared, const void* global, int bytes, int source_bytes);
void commit_async();
void wait_async(int groups);

// ---- synchronisation -------------------------------------------------------------------------------------
void barrier(int id, int threads, bool wait);  // threads = 0: all of the block
void sync_warp();
void fence();

void begin_atomic(void* p, int bytes);
void end_atomic(void* p, int bytes, bool changed);

template <class T, class Update>
T atomic(T* p, T operand, const Update& update) {
  begin_atomic(p, sizeof(T));
  T old, value;
  std::memcpy(&old, p, sizeof(T));
  value = update(old, operand);
  std::memcpy(p, &value, sizeof(T));
  end_atomic(p, sizeof(T), std::memcmp(&old, &value, sizeof(T)) != 0);
  return old;
}

// ---- warps -----------------------------------------------------------------------------------------------
int lane();
void shuffle_bytes(void* value, int bytes, int from);
uint32_t ballot(bool predicate);

template <class T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves one or two words");
  shuffle_bytes(&value, sizeof(T), from);
  return value;
}

enum class Mma {
  m16n8k16_f16,
  m16n8k16_bf16,
  m16n8k32_s8,
  m16n8k64_s4,
  m16n8k256_b1,
  sp_m16n8k32_f16,
  sp_m16n8k32_bf16,
  sp_m16n8k64_s8,
};
constexpr int mma_kinds = 8;

// d: four 32-bit accumulators of this lane, updated; a: four registers; b: two, or four for sparse kinds.
void mma(Mma kind, void* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector);
void load_matrix(uint32_t* registers, int count, uint32_t row_address, bool transposed);

// ---- floats ---------------------------------------------------------------------------------------
inline float flush_subnormal(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

enum Format16 { f16, bf16 };
float f16_to_float(uint32_t bits);
uint32_t pack(Format16 format, float low, float high);
uint32_t fma_pair(Format16 format, uint32_t a, uint32_t b, uint32_t c);

void region(const char* name);

}  // namespace emulation
}  // namespace tersor

// ---- for the test harness --------------------------------------------------------------------------------
extern "C" {
// Memory that kernels may access, from now until emulation_clear.
void emulation_register(const void* p, size_t bytes, const char* name, int writable);
// `bytes` of zeros, gigabytes from any other, at an address that is `offset` modulo 256; null when there is no room.
void* emulation_allocate(size_t bytes, size_t offset);
// Gives all allocations back.
void emulation_release();
// Forgets buffers, counters and errors.
void emulation_clear();
// What the order of threads and blocks, and the moment at which copies read, are drawn from.
void emulation_seed(uint64_t seed);
// Counters on (the default) or off.
void emulation_count(int on);
// The counters since emulation_clear as JSON; returns the bytes needed, the final zero included.
size_t emulation_counters(char* json, size_t size);
// The first violation since emulation_clear, or "".
const char* emulation_error();
}
