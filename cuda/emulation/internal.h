// The state of a launch, shared by the parts of the host run.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation/clocks.h"
#include "emulation/fiber.h"
#include "emulation/runtime.h"

namespace tersor {
namespace emulation {

struct Block;
struct Warp;

struct Copy {  // one cp.async
  uint32_t shared;
  const void* global;
  int bytes, source_bytes;
  unsigned char data[16];  // of the source when it was issued
};

enum class State : uint8_t { runnable, waits_for_warp, waits_at_barrier, done };

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;  // in the block
  int lane = 0;
  dim3 position;
  State state = State::runnable;
  int barrier = 0;  // the one it waits at
  int region = 0;
  uint32_t clock = 1;
  Past seen;     // ordered before what the thread does now
  Past fenced;   // what its next atomic publishes
  Past pending;  // published by what its atomics met; seen after the next fence
  std::vector<Copy> copies;      // not yet landed, in order of issue
  std::vector<size_t> groups;    // copies in each committed group that has not landed
  size_t uncommitted = 0;
};

enum class Collective : uint8_t { none, sync_warp, shuffle, ballot, mma, load_matrix };

struct Warp {
  Block* block = nullptr;
  int index = 0, first = 0, count = 0;  // threads first .. first + count - 1 of the block
  Collective kind = Collective::none;
  uint32_t detail = 0;  // e.g. the kind of mma: all lanes must agree
  uint32_t arrived = 0;  // lanes
  uint64_t generation = 0;
  uint32_t priority = 0;
  uint32_t ended = 0;  // lanes whose thread has returned
  struct WarpSites* sites = nullptr;  // of the counters
  alignas(64) uint32_t in[32][12];
  alignas(64) uint32_t out[32][4];
};

struct Arrival {
  Past seen, fenced, pending;
  int thread;
  uint32_t clock;
};

struct Barrier {
  int threads = 0;  // expected; 0 while nobody is there
  int arrived = 0;
  std::vector<Arrival> arrivals;
  std::vector<Thread*> waiting;
};

struct Block {
  int index = 0;  // in the grid
  dim3 position;
  int live = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  uint32_t shared_base = 0;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;  // of shared memory
  int shift = 2;            // log2 of the bytes of a cell
  char* stacks = nullptr;
};

struct Launch {
  dim3 grid, block;
  int threads = 0;  // of a block
  size_t shared_bytes = 0;
  void (*call)(void*) = nullptr;
  void* arguments = nullptr;
  std::string kernel;
};

extern Launch current_launch;
extern Thread* current;  // the thread that runs
extern uint64_t launch_number;

uint64_t random_bits();

// Records the first violation and ends the launch.
[[noreturn]] void violation(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string name_of(const Thread& thread);
std::string name_of(int block, int thread);

void maybe_yield();  // lets another thread run, now and then
void yield();
void progress();     // something changed that a spinning thread may wait for
void spin();         // a volatile load: counted, and always a chance for others

// Waits until all lanes of the warp are here; the last to come runs `finish(warp)` for all.
void collective(Collective kind, uint32_t detail, void (*finish)(Warp&));
const char* name_of(Collective kind);

// ---- race detection (races.cpp) ----------------------------------------------------------------------------
bool knows(const Thread& thread, const Epoch& epoch);
void clear_readers();
int copy_readers(int more);  // for a cell that takes over another's readers
// Each checks one cell against the access of `current` and records it. `where` makes the location's name.
struct Where {
  const char* space;  // "shared" or a buffer's name
  uint64_t offset;
};
void check_read(Cell& cell, uint16_t flags, const Where& where);
void check_write(Cell& cell, uint16_t flags, const Where& where);
Past snapshot(Thread& thread);  // what the thread has done and knows; its clock advances
void meet(Block& block, std::vector<Arrival>& arrivals, Thread* const* receivers, size_t count);

// ---- memory.cpp --------------------------------------------------------------------------------------------
void start_shared(Block& block, size_t bytes);
void start_launch_memory();
// For ldmatrix: 16 bytes of a row, read on behalf of `thread`.
const unsigned char* shared_row(Thread& thread, uint32_t address);
void drop_copies(Thread& thread);

// ---- counters.cpp ------------------------------------------------------------------------------------------
enum class SharedKind : uint8_t { load, store, copy, matrix };
void count_shared(SharedKind kind, const void* site, uint32_t address, int bytes);
void count_matrix_rows(const uint32_t* rows, int count);
void count_global(bool store, const void* site, int buffer, uint64_t offset, int width, int bytes);
void count_barrier();
void count_mma(Mma kind);
constexpr int float_mma_kinds = 9;  // of matrix_float.h
void count_float_mma(int kind);
void count_launch();
void meet_warp(Warp& warp);  // the lanes are together: what they did before is grouped no further
void register_counts(int buffer, const char* name, size_t bytes);
void clear_counts();

}  // namespace emulation
}  // namespace tersor
