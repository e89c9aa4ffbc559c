// Happens-before race detection on the cells of shared and global memory.
#include <algorithm>

#include "emulation/internal.h"

namespace tersor {
namespace emulation {
namespace {

std::vector<std::vector<Epoch>> reader_lists;  // of cells that several unordered threads have read
std::vector<int> free_lists;

Epoch here(uint16_t flags) {
  Epoch epoch;
  epoch.block = current->block->index;
  epoch.clock = current->clock;
  epoch.thread = static_cast<uint16_t>(current->index);
  epoch.flags = flags;
  return epoch;
}

void drop_readers(Cell& cell) {
  cell.read.clock = 0;
  if (cell.more) {
    reader_lists[cell.more - 1].clear();
    free_lists.push_back(cell.more - 1);
    cell.more = 0;
  }
}

[[noreturn]] void race(const char* does, const char* did, const Epoch& other, const Where& where) {
  const bool across = other.block != current->block->index;
  violation("race: %s %s byte %llu of %s, which %s %s, with %s between them", name_of(*current).c_str(), does,
            static_cast<unsigned long long>(where.offset), where.space, name_of(other.block, other.thread).c_str(), did,
            across ? "no fence, atomic and fence" : "no barrier (or sync_warp)");
}

[[noreturn]] void touches_flight(const char* does, const Epoch& other, const Where& where) {
  violation("%s %s byte %llu of %s while a cp.async of %s to it is in flight: a wait for its group is missing",
            name_of(*current).c_str(), does, static_cast<unsigned long long>(where.offset), where.space,
            name_of(other.block, other.thread).c_str());
}

}  // namespace

bool knows(const Thread& thread, const Epoch& epoch) {
  if (epoch.block == thread.block->index && epoch.thread == thread.index) return true;
  if (!thread.seen) return false;
  const Clocks* clocks = thread.seen->find(epoch.block);
  return clocks && clocks->at[epoch.thread] >= epoch.clock;
}

int copy_readers(int more) {
  if (!more) return 0;
  reader_lists.push_back(std::vector<Epoch>(reader_lists[more - 1]));
  return static_cast<int>(reader_lists.size());
}

void clear_readers() {
  reader_lists.clear();
  free_lists.clear();
}

void check_read(Cell& cell, uint16_t flags, const Where& where) {
  const Epoch& write = cell.write;
  if (write.clock) {
    if (write.flags & in_flight) touches_flight("reads", write, where);
    if (!(write.flags & flags & is_relaxed) && !knows(*current, write))
      race("reads", write.flags & is_relaxed ? "changed atomically" : "wrote", write, where);
  }
  if (cell.read.clock == 0 || knows(*current, cell.read)) {
    cell.read = here(flags);
    return;
  }
  // Readers that nobody ordered: each must be known to the next writer.
  std::vector<Epoch>* list;
  if (cell.more) {
    list = &reader_lists[cell.more - 1];
  } else {
    if (free_lists.empty()) {
      free_lists.push_back(static_cast<int>(reader_lists.size()));
      reader_lists.emplace_back();
    }
    cell.more = free_lists.back() + 1;
    free_lists.pop_back();
    list = &reader_lists[cell.more - 1];
  }
  const Epoch now = here(flags);
  if (cell.read.thread == now.thread && cell.read.block == now.block) {
    cell.read = now;
    return;
  }
  for (Epoch& other : *list)
    if (other.thread == now.thread && other.block == now.block) {
      other = now;
      return;
    }
  if (list->size() >= 32)
    list->erase(std::remove_if(list->begin(), list->end(), [](const Epoch& e) { return knows(*current, e); }),
                list->end());
  list->push_back(now);
}

void check_write(Cell& cell, uint16_t flags, const Where& where) {
  const Epoch& write = cell.write;
  if (write.clock) {
    if (write.flags & in_flight) touches_flight("writes", write, where);
    if (!(write.flags & flags & is_relaxed) && !knows(*current, write))
      race("writes", write.flags & is_relaxed ? "changed atomically" : "wrote", write, where);
  }
  const auto check = [&](const Epoch& read) {
    if (read.clock && !(read.flags & flags & is_relaxed) && !knows(*current, read)) race("writes", "read", read, where);
  };
  check(cell.read);
  if (cell.more)
    for (const Epoch& read : reader_lists[cell.more - 1]) check(read);
  drop_readers(cell);
  cell.write = here(flags);
}

Past snapshot(Thread& thread) {
  const std::pair<int, uint32_t> own[] = {{thread.index, thread.clock}};
  ++thread.clock;
  return raise(thread.seen, thread.block->index, current_launch.threads, own);
}

void meet(Block& block, std::vector<Arrival>& arrivals, Thread* const* receivers, size_t count) {
  Past seen, fenced, pending;
  std::vector<std::pair<int, uint32_t>> clocks;
  clocks.reserve(arrivals.size());
  const Knowledge* last = nullptr;
  for (const Arrival& arrival : arrivals) {
    if (arrival.seen.get() != last) {
      seen = join(seen, arrival.seen);
      last = arrival.seen.get();
    }
    fenced = join(fenced, arrival.fenced);
    pending = join(pending, arrival.pending);
    clocks.emplace_back(arrival.thread, arrival.clock);
  }
  seen = raise(seen, block.index, current_launch.threads, clocks);
  for (size_t i = 0; i < count; ++i) {
    // An arrival may lie in the past of a receiver that has gone on since: never at a plain barrier.
    receivers[i]->seen = seen;
    receivers[i]->fenced = fenced;
    receivers[i]->pending = pending;
  }
}

void sync_warp() {
  collective(Collective::sync_warp, 0, [](Warp& warp) {
    std::vector<Arrival> arrivals;
    Thread* receivers[32];
    for (int i = 0; i < 32; ++i) {
      Thread& thread = warp.block->threads[warp.first + i];
      arrivals.push_back({thread.seen, thread.fenced, thread.pending, thread.index, thread.clock++});
      receivers[i] = &thread;
    }
    meet(*warp.block, arrivals, receivers, 32);
  });
}

void fence() {
  if (current->pending) {
    current->seen = join(current->seen, current->pending);
    current->pending = Past();
  }
  current->fenced = snapshot(*current);
  maybe_yield();
}

}  // namespace emulation
}  // namespace tersor
