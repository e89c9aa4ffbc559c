// Runs the threads of a grid as fibers, in an order drawn from a seed.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "emulation/internal.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace tersor {
namespace emulation {

Launch current_launch;
Thread* current = nullptr;
uint64_t launch_number = 0;

namespace {

uint64_t seed = 0, random_state = 1;
std::string first_error;
bool aborted = false;
Fiber launcher;
std::vector<Thread*> runnable;
std::vector<Block*> resident;
std::vector<int> pending_blocks;  // not yet started, in reverse order of starting
std::vector<Block*> ended;
int budget = 1;                   // accesses until the running thread gives way
uint64_t idle_spins = 0;          // volatile loads since something last changed
bool gives_way = true;

constexpr uint64_t spin_bound = 50000;

uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

void draw_budget() { budget = gives_way ? 1 + static_cast<int>(random_bits() % 256) : 1 << 30; }

void switch_to(Thread* next) {
  Fiber& from = current ? current->fiber : launcher;
  const bool leaving = current && current->state == State::done;
  if (current && overflowed(current->fiber)) {
    std::fprintf(stderr, "tersor emulation: %s ran past its stack of %zu bytes\n", name_of(*current).c_str(),
                 stack_bytes);
    std::abort();
  }
  current = next;
  if (next) {
    threadIdx = next->position;
    blockIdx = next->block->position;
    draw_budget();
  }
  switch_fiber(from, next ? next->fiber : launcher, leaving);
}

// Of two drawn at random the one whose warp has the higher priority: some warps run far ahead.
Thread* pick() {
  if (runnable.empty()) return nullptr;
  size_t chosen = random_bits() % runnable.size();
  const size_t other = random_bits() % runnable.size();
  if (runnable[other]->warp->priority > runnable[chosen]->warp->priority) chosen = other;
  Thread* thread = runnable[chosen];
  runnable[chosen] = runnable.back();
  runnable.pop_back();
  return thread;
}

void release(Thread* thread) {
  thread->state = State::runnable;
  runnable.push_back(thread);
}

void block_current(State state) {
  current->state = state;
  switch_to(pick());
}

void complete(Block& block, int id) {
  Barrier& barrier = block.barriers[id];
  std::vector<Thread*> waiting;
  waiting.swap(barrier.waiting);
  std::vector<Arrival> arrivals;
  arrivals.swap(barrier.arrivals);
  barrier.threads = barrier.arrived = 0;
  if (id) {  // a device counts warps, not threads
    std::vector<uint32_t> lanes(block.warps.size(), 0);
    for (const Arrival& arrival : arrivals) lanes[arrival.thread / 32] |= 1u << arrival.thread % 32;
    for (size_t w = 0; w < lanes.size(); ++w)
      if (lanes[w] != 0 && lanes[w] != 0xffffffffu)
        violation("named barrier %d of block %d: of warp %zu only lanes of mask 0x%08x came", id, block.index, w,
                  lanes[w]);
  }
  meet(block, arrivals, waiting.data(), waiting.size());
  count_barrier();
  std::vector<uint32_t> together(block.warps.size(), id ? 0u : 0xffffffffu);
  for (const Thread* thread : waiting) together[thread->index / 32] |= 1u << thread->lane;
  for (size_t w = 0; w < together.size(); ++w)  // not the warps that only arrived or are elsewhere
    if (together[w] == 0xffffffffu) meet_warp(block.warps[w]);
  for (Thread* thread : waiting)
    if (thread != current) release(thread);
  current->state = State::runnable;
  progress();
}

void fiber_main() {
  enter_fiber();
  current_launch.call(current_launch.arguments);
  Thread& me = *current;
  Block& block = *me.block;
  me.state = State::done;
  me.warp->ended |= 1u << me.lane;
  drop_copies(me);
  --block.live;
  progress();
  if (me.warp->arrived && me.warp->kind != Collective::none)
    violation("%s has ended, while other lanes of its warp wait for it at %s", name_of(me).c_str(),
              name_of(me.warp->kind));
  // The barrier of the whole block waits for the threads that have not ended.
  Barrier& all = block.barriers[0];
  if (all.arrived && all.arrived == block.live) {
    complete(block, 0);
    me.state = State::done;
  }
  if (block.live == 0) {
    ended.push_back(&block);
    switch_to(nullptr);  // the launcher reuses the block
  } else {
    switch_to(pick());
  }
  std::abort();
}

void start_block(Block& block, int index) {
  const dim3 grid = current_launch.grid, size = current_launch.block;
  block.index = index;
  block.position = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
  const int n = current_launch.threads;
  block.live = n;
  block.threads.resize(n);
  block.warps.resize((n + 31) / 32);
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  start_shared(block, current_launch.shared_bytes);
  for (int w = 0; w < static_cast<int>(block.warps.size()); ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.index = w;
    warp.first = w * 32;
    warp.count = std::min(32, n - w * 32);
    warp.kind = Collective::none;
    warp.arrived = warp.ended = 0;
    warp.priority = static_cast<uint32_t>(random_bits());
    meet_warp(warp);
  }
  for (int i = 0; i < n; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.warp = &block.warps[i / 32];
    thread.index = i;
    thread.lane = i % 32;
    thread.position = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    thread.state = State::runnable;
    thread.region = 0;
    thread.clock = 1;
    thread.seen = thread.fenced = thread.pending = Past();
    thread.copies.clear();
    thread.groups.clear();
    thread.uncommitted = 0;
    prepare(thread.fiber, block.stacks + static_cast<size_t>(i) * stack_bytes, fiber_main);
    runnable.push_back(&thread);
  }
}

const char* describe_wait(const Thread& thread, char (&text)[96]) {
  if (thread.state == State::waits_for_warp)
    std::snprintf(text, sizeof text, "at %s", name_of(thread.warp->kind));
  else if (thread.state == State::waits_at_barrier)
    std::snprintf(text, sizeof text, "at barrier %d (%d of %d threads there)", thread.barrier,
                  thread.block->barriers[thread.barrier].arrived,
                  thread.barrier ? thread.block->barriers[thread.barrier].threads : thread.block->live);
  else
    std::snprintf(text, sizeof text, "%s", thread.state == State::done ? "ended" : "running");
  return text;
}

// Who waits where, one clause per run of threads that wait alike.
std::string describe_waiting() {
  std::string result;
  char text[96], last[96] = "";
  for (const Block* block : resident) {
    if (!block->live) continue;
    int from = 0;
    for (int i = 0; i <= current_launch.threads; ++i) {
      const char* here = i < current_launch.threads ? describe_wait(block->threads[i], text) : "";
      if (i && std::strcmp(here, last) != 0) {
        result += "; block " + std::to_string(block->index) + " threads " + std::to_string(from) + " to " +
                  std::to_string(i - 1) + " " + last;
        from = i;
      }
      std::strcpy(last, here);
    }
    if (result.size() > 1200) return result + "; ...";
  }
  return result;
}

void record(const std::string& text) {
  if (first_error.empty())
    first_error = text + " [kernel " + current_launch.kernel + ", seed " + std::to_string(seed) + "]";
  aborted = true;
}

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info)) return "(unknown)";
  if (!info.dli_sname || info.dli_saddr != kernel) {
    // Of an unnamed namespace, so not among the dynamic symbols: the harness looks the offset up.
    char text[32];
    std::snprintf(text, sizeof text, "+0x%llx",
                  static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(kernel) -
                                                  reinterpret_cast<uintptr_t>(info.dli_fbase)));
    return text;
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = demangled ? demangled : info.dli_sname;
  std::free(demangled);
  return name;
}

}  // namespace

uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1dull >> 11;
}

std::string name_of(int block, int thread) {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / 32) + ", lane " +
         std::to_string(thread % 32) + ") of block " + std::to_string(block);
}

std::string name_of(const Thread& thread) { return name_of(thread.block->index, thread.index); }

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::sync_warp: return "sync_warp";
    case Collective::shuffle: return "a shuffle";
    case Collective::ballot: return "a vote";
    case Collective::mma: return "an mma";
    case Collective::load_matrix: return "ldmatrix";
    case Collective::none: break;
  }
  return "no collective";
}

void violation(const char* format, ...) {
  char text[2048];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  record(text);
  // The fibers are abandoned where they stand: kernels own nothing that needs a destructor.
  current->state = State::done;
  switch_to(nullptr);
  std::abort();
}

void yield() {
  runnable.push_back(current);
  Thread* next = pick();
  if (next == current)
    draw_budget();
  else
    switch_to(next);
}

void maybe_yield() {
  if (--budget <= 0) {
    if (random_bits() % 64 == 0) current->warp->priority = static_cast<uint32_t>(random_bits());
    yield();
  }
}

void progress() { idle_spins = 0; }

void spin() {
  if (++idle_spins > spin_bound)
    violation("deadlock: %llu volatile loads in which nothing changed, the last by %s%s%s",
              static_cast<unsigned long long>(spin_bound), name_of(*current).c_str(), describe_waiting().c_str(),
              pending_blocks.empty() ? ""
                                     : "; some blocks have not started: launch_resident starts all at once");
  if (runnable.empty()) return;
  yield();
}

void collective(Collective kind, uint32_t detail, void (*finish)(Warp&)) {
  Warp& warp = *current->warp;
  if (warp.count != 32)
    violation("%s reached %s, but its warp has only %d threads", name_of(*current).c_str(), name_of(kind), warp.count);
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.detail = detail;
  } else if (warp.kind != kind || warp.detail != detail) {
    violation("%s is at %s%s, while lanes of mask 0x%08x of its warp wait at %s: the warp is divergent",
              name_of(*current).c_str(), name_of(kind), warp.kind == kind ? " of another kind" : "", warp.arrived,
              name_of(warp.kind));
  }
  warp.arrived |= 1u << current->lane;
  if (warp.ended)
    violation("%s waits at %s for lane %d of its warp, which has ended", name_of(*current).c_str(), name_of(kind),
              __builtin_ctz(warp.ended));
  if (warp.arrived != 0xffffffffu) {
    block_current(State::waits_for_warp);
    return;
  }
  finish(warp);
  warp.arrived = 0;
  warp.kind = Collective::none;
  meet_warp(warp);
  for (int i = 0; i < 32; ++i) {
    Thread* other = &warp.block->threads[warp.first + i];
    if (other != current) release(other);
  }
  progress();
}

void barrier(int id, int threads, bool wait) {
  Block& block = *current->block;
  Barrier& barrier = block.barriers[id & 15];
  if (threads != 0 && (id < 1 || id > 15))
    violation("%s: named barrier %d; 1 to 15 are named, 0 is the whole block's", name_of(*current).c_str(), id);
  if (id == 0) {
    threads = block.live;
  } else {
    if (threads <= 0 || threads % 32 != 0 || threads > current_launch.threads)
      violation("%s: named barrier %d for %d threads; a multiple of 32 up to the block's %d is wanted",
                name_of(*current).c_str(), id, threads, current_launch.threads);
    if (barrier.threads && barrier.threads != threads)
      violation("%s comes to named barrier %d for %d threads, where others wait for %d", name_of(*current).c_str(), id,
                threads, barrier.threads);
    barrier.threads = threads;
  }
  Thread& me = *current;
  const uint32_t clock = me.clock++;
  barrier.arrivals.push_back({me.seen, me.fenced, me.pending, me.index, clock});
  ++barrier.arrived;
  if (wait) barrier.waiting.push_back(&me);
  if (barrier.arrived == threads) {
    complete(block, id);
    maybe_yield();
  } else if (wait) {
    me.barrier = id;
    block_current(State::waits_at_barrier);
  }
}

int lane() { return current->lane; }

int run(dim3 grid, dim3 block, size_t shared_bytes, bool all_resident, const void* kernel, void (*call)(void*),
        void* arguments) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  Launch launch;
  launch.grid = grid;
  launch.block = block;
  launch.threads = static_cast<int>(threads);
  launch.shared_bytes = shared_bytes;
  launch.call = call;
  launch.arguments = arguments;
  launch.kernel = kernel_name(kernel);
  current_launch = launch;
  aborted = false;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    record("launch of a " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
           " grid of " + std::to_string(threads) +
           " threads; 1 to 1024 threads and at most 65535 blocks in y and z run");
    return 1;
  }
  if (shared_bytes > 227 * 1024) {
    record("launch with " + std::to_string(shared_bytes) + " bytes of shared memory; no device has more than 232448");
    return 1;
  }
  ++launch_number;
  random_state = mix(seed * 0x1000 + launch_number % 0x1000) | 1;
  gives_way = seed % 4 != 3;  // every fourth seed runs each thread from one wait to the next
  blockDim = block;
  gridDim = grid;
  runnable.clear();
  ended.clear();
  idle_spins = 0;
  start_launch_memory();
  count_launch();

  pending_blocks.resize(blocks);
  for (size_t i = 0; i < blocks; ++i) pending_blocks[i] = static_cast<int>(i);
  for (size_t i = blocks; i > 1; --i) std::swap(pending_blocks[i - 1], pending_blocks[random_bits() % i]);
  const size_t together = all_resident ? blocks : std::min<size_t>(blocks, 1 + random_bits() % 2);
  char* memory = stacks(together * threads);
  std::vector<Block> held(together);
  resident.clear();
  for (size_t i = 0; i < together; ++i) {
    held[i].stacks = memory + i * threads * stack_bytes;
    resident.push_back(&held[i]);
    start_block(held[i], pending_blocks.back());
    pending_blocks.pop_back();
  }
  current = nullptr;
  while (!aborted) {
    Thread* next = pick();
    if (next) {
      switch_to(next);
    } else if (ended.empty()) {
      bool live = false;
      for (const Block& b : held) live |= b.live != 0;
      if (live) record("deadlock: no thread can go on" + describe_waiting());
      break;
    }
    for (Block* b : ended) {
      if (pending_blocks.empty()) break;
      start_block(*b, pending_blocks.back());
      pending_blocks.pop_back();
    }
    ended.clear();
  }
  current = nullptr;
  for (Block& b : held)
    for (Warp& warp : b.warps) meet_warp(warp);
  runnable.clear();
  resident.clear();
  clear_readers();
  return aborted ? 1 : 0;
}

}  // namespace emulation
}  // namespace tersor

extern "C" {

void emulation_seed(uint64_t value) {
  tersor::emulation::seed = value;
  tersor::emulation::launch_number = 0;
}

const char* emulation_error() { return tersor::emulation::first_error.c_str(); }

// Called by emulation_clear.
void emulation_forget_error() { tersor::emulation::first_error.clear(); }
}
