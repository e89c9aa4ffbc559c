// What the launchers of kernels on tile/row_stream.h share: how many tokens a block multiplies, how many ranges fill a
// device, how much scratch memory they need. The figures are data, to be replaced by measured values.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/int_layout.h"
#include "tersor.h"
#include "tile/row_stream.h"

namespace tersor {

// A range of fewer stages than this costs more in its start and its partial sums than it gains.
constexpr int kStreamMinStages = 4;

// Token tiles of 8 that a block multiplies at once; more tokens are further blocks of the grid.
constexpr int stream_token_tiles(int64_t m) { return m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8; }

// `what` names the operation in errors.
inline int check_stream(const char* what, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t limit = int64_t(1) << 25;
  if (m < 0 || m > 32 * limit || n < 0 || n > limit || k < 1 || k > limit ||
      div_up(n, kStreamRows) * div_up(k, kStreamK) > INT32_MAX) {
    return fail(TERSOR_INVALID,
                "%s: m, n, k are %lld, %lld, %lld; accepted: 0 to 2^30, 0 to 2^25, 1 to 2^25, n x k up to 2^45", what,
                (long long)m, (long long)n, (long long)k);
  }
  return TERSOR_OK;
}

inline EqualRanges equal_ranges(int64_t units, int64_t ranges) {
  return {static_cast<uint32_t>(units / ranges), static_cast<uint32_t>(units % ranges)};
}

// Ranges for one problem on a device, and the bytes of its workspace: partial sums and counters (zero before the first
// launch), none where one range sums everything itself.
inline void plan_stream(int64_t m, int64_t n, int64_t k, int stage_bytes, int multiprocessors,
                        int64_t shared_memory_per_multiprocessor, int64_t* ranges) {
  const int tiles = stream_token_tiles(m);
  const int64_t token_blocks = div_up(m, 8 * tiles), units = div_up(n, kStreamRows) * div_up(k, kStreamK);
  // The driver keeps 1 KB of each block's shared memory for itself.
  const int64_t shared_bytes = int64_t(stream_stages(stage_bytes)) * stage_bytes + 16 + 1024;
  int64_t resident = shared_memory_per_multiprocessor / shared_bytes;
  if (resident > stream_blocks_per_multiprocessor(tiles)) resident = stream_blocks_per_multiprocessor(tiles);
  if (resident < 1) resident = 1;
  int64_t count = multiprocessors * resident / (token_blocks > 0 ? token_blocks : 1);
  if (count > units / kStreamMinStages) count = units / kStreamMinStages;
  *ranges = count < 1 ? 1 : count;
}

inline void stream_workspace(int64_t m, int64_t n, int64_t ranges, int64_t* partial_bytes, int64_t* counter_bytes) {
  const int64_t tokens = 8 * stream_token_tiles(m), token_blocks = div_up(m, tokens);
  *partial_bytes = ranges == 1 ? 0 : token_blocks * ranges * 2 * kStreamRows * tokens * 4;
  *counter_bytes = ranges == 1 ? 0 : token_blocks * div_up(n, kStreamRows) * 4;
}

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// The results' part of a call's arguments; TERSOR_OK or what is wrong with them.
inline int describe_stream(const char* what, const void* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t ldy,
                           int64_t ranges, float* partials, uint32_t* counters, RowStream* a) {
  const int64_t row_blocks = div_up(n, kStreamRows), stages = div_up(k, kStreamK), units = row_blocks * stages;
  if (!y || !is_aligned(y, 2) || (m > 1 && ldy < n)) {
    return fail(TERSOR_INVALID, "%s: y is %p with ldy %lld; accepted: 2-byte aligned, ldy at least n = %lld", what, y,
                (long long)ldy, (long long)n);
  }
  if (ranges < 1 || ranges > units || ranges > 65535) {
    return fail(TERSOR_INVALID, "%s: ranges is %lld; accepted: 1 to %lld", what, (long long)ranges,
                (long long)(units < 65535 ? units : 65535));
  }
  if (ranges > 1 && (!partials || !counters || !is_aligned(partials, 16))) {
    return fail(TERSOR_INVALID,
                "%s: partials and counters: accepted is the workspace, 16-byte aligned, for ranges above 1", what);
  }
  a->bias = bias;
  a->y = y;
  a->partials = partials;
  a->counters = counters;
  a->ldy = m > 1 ? ldy : 0;
  a->m = static_cast<int>(m);
  a->n = static_cast<int>(n);
  a->row_blocks = static_cast<int>(row_blocks);
  a->stages = static_cast<int>(stages);
  a->wide_stores = is_aligned(y, 8) && (m == 1 || ldy % 4 == 0);
  a->ranges = equal_ranges(units, ranges);
  return TERSOR_OK;
}

}  // namespace tersor
