// The bookkeeping of a static cache, a step at a time, on the device: a replayed graph needs no host.
//
//   A warp has one sequence. Everything about a page follows from its index p and the tokens before and after the step,
//   so nothing but their number is remembered:
//
//     old(p, n)   64 (p + 1) + recent <= n, and p is no sink        the page is full, and `recent` tokens follow it
//     entry       old(p, before): packed, else raw                  what attention reads in this step
//     job         old(p, after) and not old(p, before)              kv_pack runs after attention; the entry follows in
//                                                                   the next step
//
//   Raw pages are a ring: one is used again when the last step that reads it is over. Entries that this step may change
//   begin with the oldest page that can have become old in the step before, of at most `most` tokens.
//
//   No shared memory. A launch is a few loads and stores for each sequence; its cost is that of a launch.
//
// gate: registers 64
// gate: wants LDG.E.64 STG.E.128
#include "kernels/kv_advance.h"

#include "ptx/ptx.h"

namespace tersor {
namespace {

using Pair = ptx::Vec<int64_t, 2>;

__global__ void __launch_bounds__(32) kv_advance(const KvAdvanceArguments a) {
  const int lane = threadIdx.x, sequence = blockIdx.x;
  int32_t* state = a.state + 2 * sequence;
  const auto known = ptx::load_global(reinterpret_cast<const ptx::Vec<int32_t, 2>*>(state));
  ptx::sync_warp();  // all lanes have read what lane 0 will write
  const int before = known[0];
  const bool fits = a.tokens <= a.max_tokens - before;
  const int after = fits ? before + a.tokens : before;
  const bool packs = a.key_bits < 16 || a.value_bits < 16;
  const auto is_old = [&](int page, int tokens) {
    return packs && page >= a.sink_pages && kKvTokens * (page + 1) + a.recent <= tokens;
  };
  const auto place = [&](int64_t region, int64_t bytes, int pages, int page) {
    return region + (int64_t(sequence) * pages + page) * bytes;
  };
  const auto raw_page = [&](int page) {
    return page < a.sink_pages ? place(a.sinks, a.raw_bytes, a.sink_pages, page)
                               : place(a.raw, a.raw_bytes, a.raw_pages, (page - a.sink_pages) % a.raw_pages);
  };
  const auto packed_page = [&](int page) {
    return place(a.packed, a.packed_bytes, a.packed_pages, (page - a.sink_pages) % a.packed_pages);
  };

  ptx::region("entries");
  const int end = (after + kKvTokens - 1) / kKvTokens;
  const int changed = before - a.most - a.recent;
  for (int page = (changed > kKvTokens ? changed / kKvTokens - 1 : 0) + lane; page < end; page += 32) {
    const bool packed = is_old(page, before);
    const int left = after - kKvTokens * page;
    KvPage entry;
    entry.address = packed ? packed_page(page) : raw_page(page);
    entry.position = kKvTokens * page;
    entry.tokens = static_cast<uint8_t>(left < kKvTokens ? left : kKvTokens);
    entry.format = packed ? a.format : 0;
    entry.key_bits = packed ? a.key_bits : 16;
    entry.value_bits = packed ? a.value_bits : 16;
    ptx::store_global(a.table + int64_t(sequence) * a.table_pages + page, entry);
  }

  ptx::region("jobs");
  const int oldest = before > a.recent ? (before - a.recent) / kKvTokens : 0;  // the first that was not old
  for (int job = lane; job < a.job_pages; job += 32) {
    // Sinks never become old: a job that falls on one is for the page after them, if that is old now.
    const int page = (oldest > a.sink_pages ? oldest : a.sink_pages) + job;
    Pair addresses = {};
    if (is_old(page, after)) addresses = {{raw_page(page), packed_page(page)}};
    ptx::store_global(reinterpret_cast<Pair*>(a.jobs) + int64_t(sequence) * a.job_pages + job, addresses);
  }

  if (lane == 0) {
    ptx::store_global(a.pages + sequence, int32_t(end));
    ptx::store_global(reinterpret_cast<ptx::Vec<int32_t, 2>*>(state),
                      ptx::Vec<int32_t, 2>{{after, known[1] + (fits ? 0 : 1)}});
  }
}

const bool entered = (kv_advance_kernel = kv_advance, true);

}  // namespace
}  // namespace tersor
