// Checked memory: registered global buffers, shared memory with one cell per word, and cp.async.
#include <algorithm>
#include <cstdlib>

#include "emulation/internal.h"

namespace tersor {
namespace emulation {
namespace {

struct Buffer {
  uintptr_t begin = 0;
  size_t bytes = 0;
  std::string name;
  bool writable = false;
  int number = 0;           // of its counters
  Cell* cells = nullptr;    // one for each 1 << shift bytes, of the launch `stamp`; only of writable buffers
  int shift = 2;
  uint64_t stamp = 0;
};

std::vector<Buffer> buffers;  // sorted by address
Buffer* last_hit = nullptr;
int registered = 0;
std::unordered_map<uintptr_t, Past> published;  // by atomics and volatile stores to an address

const char* verb(bool store) { return store ? "writes" : "reads"; }

[[noreturn]] void outside(uintptr_t at, int bytes, bool store) {
  const Buffer* nearest = nullptr;
  long long best = 0;
  for (const Buffer& b : buffers) {
    // Negative: before the buffer; positive: past its end.
    const long long distance = at < b.begin ? -static_cast<long long>(b.begin - at)
                                            : static_cast<long long>(at + bytes - (b.begin + b.bytes));
    if (!nearest || std::llabs(distance) < std::llabs(best)) {
      nearest = &b;
      best = distance;
    }
  }
  if (!nearest)
    violation("%s %s %d bytes of global memory, where no buffer is registered", name_of(*current).c_str(), verb(store),
              bytes);
  violation("%s %s %d bytes out of bounds: they %s %lld bytes %s buffer %s (%zu bytes)", name_of(*current).c_str(),
            verb(store), bytes, best < 0 ? "start" : "end", std::llabs(best), best < 0 ? "before" : "past the end of",
            nearest->name.c_str(), nearest->bytes);
}

Buffer& find(const void* p, int bytes, bool store) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (last_hit && at >= last_hit->begin && at + bytes <= last_hit->begin + last_hit->bytes) return *last_hit;
  auto next = std::upper_bound(buffers.begin(), buffers.end(), at,
                               [](uintptr_t a, const Buffer& b) { return a < b.begin; });
  if (next == buffers.begin()) outside(at, bytes, store);
  Buffer& b = *(next - 1);
  if (at + bytes > b.begin + b.bytes) outside(at, bytes, store);
  last_hit = &b;
  return b;
}

void check_alignment(uint64_t at, int bytes, const char* what, bool store) {
  if (at % bytes)
    violation("%s %s %d bytes of %s memory at an address that is %llu modulo %d: not aligned",
              name_of(*current).c_str(), verb(store), bytes, what, static_cast<unsigned long long>(at % bytes), bytes);
}

Cell* split(Cell* cells, size_t count) {  // words into bytes
  Cell* bytes = static_cast<Cell*>(std::calloc(count * 4, sizeof(Cell)));
  for (size_t i = 0; i < count * 4; ++i) {
    bytes[i] = cells[i / 4];
    if (i % 4) bytes[i].more = copy_readers(cells[i / 4].more);
  }
  return bytes;
}

Cell* global_cells(Buffer& b, uint64_t offset, int bytes) {
  if (b.stamp != launch_number || !b.cells) {
    std::free(b.cells);
    b.shift = b.begin % 4 ? 0 : 2;
    b.cells = static_cast<Cell*>(std::calloc((b.bytes >> b.shift) + 1, sizeof(Cell)));
    b.stamp = launch_number;
  }
  if (b.shift == 2 && bytes < 4) {
    Cell* words = b.cells;
    b.cells = split(words, (b.bytes >> 2) + 1);
    std::free(words);
    b.shift = 0;
  }
  return b.cells + (offset >> b.shift);
}

template <class Check>
void each_cell(Buffer& b, uint64_t offset, int bytes, const Check& check) {
  Cell* cells = global_cells(b, offset, bytes);
  const int step = 1 << b.shift;
  const Where base{b.name.c_str(), 0};
  for (int i = 0; i < bytes; i += step) check(cells[i >> b.shift], Where{base.space, offset + i});
}

void check_global_read(Buffer& b, const void* p, int bytes, Order order) {
  if (!b.writable) return;
  const uint64_t offset = reinterpret_cast<uintptr_t>(p) - b.begin;
  each_cell(b, offset, bytes, [order](Cell& cell, const Where& where) {
    if (order == Order::constant && cell.write.clock)
      violation("%s reads byte %llu of %s through the constant path, which %s wrote in the same launch",
                name_of(*current).c_str(), static_cast<unsigned long long>(where.offset), where.space,
                name_of(cell.write.block, cell.write.thread).c_str());
    check_read(cell, order == Order::relaxed ? is_relaxed : 0, where);
  });
}

void check_global_write(Buffer& b, const void* p, int bytes, uint16_t flags) {
  if (!b.writable)
    violation("%s writes %d bytes to buffer %s, which is read-only", name_of(*current).c_str(), bytes, b.name.c_str());
  const uint64_t offset = reinterpret_cast<uintptr_t>(p) - b.begin;
  each_cell(b, offset, bytes, [flags](Cell& cell, const Where& where) { check_write(cell, flags, where); });
}

void acquire(const void* p) {
  const auto it = published.find(reinterpret_cast<uintptr_t>(p));
  if (it != published.end()) current->pending = join(current->pending, it->second);
}

// The bytes at a shared address; checked to lie inside, to be aligned.
unsigned char* shared_bytes_at(Block& block, uint32_t address, int bytes, bool store) {
  check_alignment(address, bytes, "shared", store);
  const uint64_t offset = uint64_t{address} - block.shared_base;
  if (address < block.shared_base || offset + bytes > block.shared.size())
    violation("%s %s %d shared bytes out of bounds: offset %lld of %zu", name_of(*current).c_str(), verb(store), bytes,
              static_cast<long long>(address) - static_cast<long long>(block.shared_base), block.shared.size());
  if (block.shift == 2 && bytes < 4) {
    std::vector<Cell> split_cells(block.cells.size() * 4);
    for (size_t i = 0; i < split_cells.size(); ++i) {
      split_cells[i] = block.cells[i / 4];
      if (i % 4) split_cells[i].more = copy_readers(block.cells[i / 4].more);
    }
    block.cells.swap(split_cells);
    block.shift = 0;
  }
  return block.shared.data() + offset;
}

template <class Check>
void each_shared_cell(Block& block, uint32_t address, int bytes, const Check& check) {
  const uint32_t offset = address - block.shared_base;
  for (int i = 0; i < bytes; i += 1 << block.shift)
    check(block.cells[(offset + i) >> block.shift], Where{"shared memory", offset + i});
}

void check_shared_read(Block& block, uint32_t address, int bytes) {
  each_shared_cell(block, address, bytes, [](Cell& cell, const Where& where) {
    if (!cell.write.clock)
      violation("%s reads byte %llu of shared memory, which nothing has written", name_of(*current).c_str(),
                static_cast<unsigned long long>(where.offset));
    check_read(cell, 0, where);
  });
}

void land(Thread& thread, Copy& copy) {
  Block& block = *thread.block;
  if (copy.source_bytes && std::memcmp(copy.data, copy.global, copy.source_bytes) != 0)
    violation("%s waited for a cp.async whose source changed between issue and wait: which bytes it copied is open",
              name_of(thread).c_str());
  std::memcpy(block.shared.data() + (copy.shared - block.shared_base), copy.data, copy.bytes);
  each_shared_cell(block, copy.shared, copy.bytes, [&](Cell& cell, const Where&) {
    cell.write.flags &= static_cast<uint16_t>(~in_flight);
    cell.write.clock = thread.clock;
  });
}

}  // namespace

void start_launch_memory() { published.clear(); }

void start_shared(Block& block, size_t bytes) {
  block.shared_base = 128 * (1 + static_cast<uint32_t>(random_bits() % 8));
  block.shared.assign(bytes, 0xff);  // NaN in every float type
  block.shift = 2;
  block.cells.assign((bytes + 3) / 4, Cell());
}

uint32_t dynamic_shared() { return current->block->shared_base; }

void read_shared(void* value, uint32_t address, int bytes) {
  const void* site = __builtin_return_address(0);
  maybe_yield();
  const unsigned char* p = shared_bytes_at(*current->block, address, bytes, false);
  check_shared_read(*current->block, address, bytes);
  std::memcpy(value, p, bytes);
  count_shared(SharedKind::load, site, address, bytes);
}

void write_shared(uint32_t address, const void* value, int bytes) {
  const void* site = __builtin_return_address(0);
  maybe_yield();
  unsigned char* p = shared_bytes_at(*current->block, address, bytes, true);
  each_shared_cell(*current->block, address, bytes,
                   [](Cell& cell, const Where& where) { check_write(cell, 0, where); });
  std::memcpy(p, value, bytes);
  count_shared(SharedKind::store, site, address, bytes);
  progress();
}

const unsigned char* shared_row(Thread& thread, uint32_t address) {
  Thread* running = current;
  current = &thread;  // the row is read by the lane that gave its address
  const unsigned char* p = shared_bytes_at(*thread.block, address, 16, false);
  check_shared_read(*thread.block, address, 16);
  current = running;
  return p;
}

void read_global(void* value, const void* p, int bytes, Order order) {
  const void* site = __builtin_return_address(0);
  if (order == Order::relaxed)
    spin();
  else
    maybe_yield();
  check_alignment(reinterpret_cast<uintptr_t>(p), bytes, "global", false);
  Buffer& b = find(p, bytes, false);
  check_global_read(b, p, bytes, order);
  if (order == Order::relaxed) acquire(p);
  std::memcpy(value, p, bytes);
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  count_global(false, site, b.number, at - b.begin, bytes, bytes);
}

void write_global(void* p, const void* value, int bytes, Order order) {
  const void* site = __builtin_return_address(0);
  maybe_yield();
  check_alignment(reinterpret_cast<uintptr_t>(p), bytes, "global", true);
  Buffer& b = find(p, bytes, true);
  check_global_write(b, p, bytes, order == Order::relaxed ? is_relaxed : 0);
  std::memcpy(p, value, bytes);
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (order == Order::relaxed) published[at] = current->fenced;
  count_global(true, site, b.number, at - b.begin, bytes, bytes);
  progress();
}

void begin_atomic(void* p, int bytes) {
  yield();
  check_alignment(reinterpret_cast<uintptr_t>(p), bytes, "global", true);
  Buffer& b = find(p, bytes, true);
  // Exclusive already, so a write that meets relaxed accesses; what it read is what it found.
  check_global_write(b, p, bytes, is_relaxed);
  acquire(p);
}

void end_atomic(void* p, int bytes, bool changed) {
  const void* site = __builtin_return_address(0);
  if (current->fenced) {
    Past& past = published[reinterpret_cast<uintptr_t>(p)];
    past = join(past, current->fenced);
  }
  const Buffer& b = find(p, bytes, true);
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  count_global(true, site, b.number, at - b.begin, bytes, bytes);
  if (changed) progress();
}

void copy_async(uint32_t shared, const void* global, int bytes, int source_bytes) {
  const void* site = __builtin_return_address(0);
  maybe_yield();
  Thread& me = *current;
  if (source_bytes < 0 || source_bytes > bytes)
    violation("%s copies %d of %d bytes with cp.async", name_of(me).c_str(), source_bytes, bytes);
  shared_bytes_at(*me.block, shared, bytes, true);
  check_alignment(reinterpret_cast<uintptr_t>(global), bytes, "global", false);
  Copy copy;
  copy.shared = shared;
  copy.global = global;
  copy.bytes = bytes;
  copy.source_bytes = source_bytes;
  if (source_bytes) {
    Buffer& b = find(global, source_bytes, false);
    check_global_read(b, global, source_bytes, Order::plain);
    const uintptr_t at = reinterpret_cast<uintptr_t>(global);
    count_global(false, site, b.number, at - b.begin, bytes, source_bytes);
  }
  std::memset(copy.data, 0, sizeof copy.data);
  if (source_bytes) std::memcpy(copy.data, global, source_bytes);
  each_shared_cell(*me.block, shared, bytes,
                   [](Cell& cell, const Where& where) { check_write(cell, in_flight, where); });
  // Until it lands the destination holds neither the old bytes nor the new.
  std::memset(me.block->shared.data() + (shared - me.block->shared_base), 0xff, bytes);
  me.copies.push_back(copy);
  ++me.uncommitted;
  count_shared(SharedKind::copy, site, shared, bytes);
  progress();
}

void commit_async() {
  current->groups.push_back(current->uncommitted);
  current->uncommitted = 0;
}

void wait_async(int groups) {
  Thread& me = *current;
  size_t landing = 0, closed = 0;
  while (me.groups.size() - closed > static_cast<size_t>(groups)) landing += me.groups[closed++];
  for (size_t i = 0; i < landing; ++i) land(me, me.copies[i]);
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(landing));
  me.groups.erase(me.groups.begin(), me.groups.begin() + static_cast<std::ptrdiff_t>(closed));
  maybe_yield();
}

void drop_copies(Thread& thread) {
  thread.copies.clear();
  thread.groups.clear();
  thread.uncommitted = 0;
}

}  // namespace emulation
}  // namespace tersor

extern "C" {

void emulation_forget_error();

void emulation_register(const void* p, size_t bytes, const char* name, int writable) {
  using namespace tersor::emulation;
  if (bytes == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  last_hit = nullptr;
  for (Buffer& b : buffers)
    if (b.begin == begin && b.bytes == bytes) {  // the same tensor passed twice
      b.writable |= writable != 0;
      return;
    }
  Buffer b;
  b.begin = begin;
  b.bytes = bytes;
  b.name = name;
  b.writable = writable != 0;
  b.number = registered++;
  register_counts(b.number, name, bytes);
  buffers.insert(std::upper_bound(buffers.begin(), buffers.end(), begin,
                                  [](uintptr_t a, const Buffer& other) { return a < other.begin; }),
                 b);
}

void emulation_clear() {
  using namespace tersor::emulation;
  for (Buffer& b : buffers) std::free(b.cells);
  buffers.clear();
  last_hit = nullptr;
  registered = 0;
  published.clear();
  clear_counts();
  emulation_forget_error();
}
}
