// What the kernels over a paged cache share: numbers of the softmax, rows of a block, their queries in shared memory
// and the positions that they see.
#pragma once

#include "kernels/sm80_kv_attention.h"
#include "ptx/math.h"
#include "ptx/ptx.h"
#include "tile/kv_codes.h"
#include "tile/number.h"

namespace tersor {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

TERSOR_DEVICE float infinity() { return ptx::bits_to_float(0x7f800000); }
TERSOR_DEVICE float larger(float a, float b) { return a > b ? a : b; }
// What exponents are relative to: a row that has seen nothing yet has the maximum -infinity.
TERSOR_DEVICE float reference_of(float peak) { return peak == -infinity() ? 0.0f : peak; }

// Positions that rows of a block see: each of them, and any of them.
struct Limits {
  int all_from, all_to, any_from, any_to;
};

// The rows of a block: queries of the heads that share a head of keys, query by query, kRows of them from `tile` on.
template <int kDim, int kRows>
struct KvRows {
  static constexpr int kRecords = kDim / kKvRecordChannels;
  static constexpr int kOwn = kRows == 8 ? 1 : 2;  // query rows of a lane: g and g + 8

  const KvAttentionArguments& a;
  const int tile;

  TERSOR_DEVICE int head() const { return blockIdx.y % a.kv_heads; }
  TERSOR_DEVICE int sequence() const { return blockIdx.z; }
  TERSOR_DEVICE int first_row() const { return tile * kRows; }
  TERSOR_DEVICE int row_count() const { return a.queries * a.group; }
  // Index of a row of the block; rows past the last are as the last.
  TERSOR_DEVICE int index_of(int row) const {
    const int index = first_row() + row;
    return index < row_count() ? index : row_count() - 1;
  }
  TERSOR_DEVICE int query_head(int index) const { return head() * a.group + index % a.group; }

  // The queries in the order of fragments A: for each record and lane, its row's (rows') four channels.
  template <bool kFormats>
  TERSOR_DEVICE void load_queries(ptx::shared_t query) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      const int index = index_of(lane / 4 + 8 * row);
      const bool exists = first_row() + lane / 4 + 8 * row < row_count();
      const uint16_t* from = static_cast<const uint16_t*>(a.q) + sequence() * a.q_strides[0] +
                             query_head(index) * a.q_strides[1] + index / a.group * a.q_strides[2];
      for (int record = warp; record < kRecords; record += kKvWarps) {
        ptx::Vec<uint32_t, 2> pairs = {{0, 0}};
        if (exists) {
          pairs = kv_load_four(from, record * kKvRecordChannels + 4 * t,
                               kFormats && a.rotary.halves ? a.rotary.pairs : 0);
        }
        ptx::store_shared(query + (record * 32 + lane) * 8 * kOwn + 8 * row, pairs);
      }
    }
  }

  // `position`: of the first query. Each row's limits follow those of the block.
  TERSOR_DEVICE void store_limits(ptx::shared_t to_memory, int position) const {
    const int first = a.first != nullptr ? ptx::load_global_constant(a.first + sequence()) : 0;
    const int least = a.mask != nullptr && a.mask_first > first ? a.mask_first : first;
    const int most = a.mask != nullptr ? a.mask_end - 1 : INT32_MAX;
    const auto from = [&](int row) {
      const int own = position + index_of(row) / a.group;
      return a.window > 0 && own - a.window + 1 > least ? own - a.window + 1 : least;
    };
    const auto to = [&](int row) {
      const int own = position + index_of(row) / a.group;
      return a.causal && own < most ? own : most;
    };
    if (threadIdx.x < kRows) {
      const ptx::Vec<int, 2> range = {{from(threadIdx.x), to(threadIdx.x)}};
      ptx::store_shared(to_memory + 16 + 8 * threadIdx.x, range);
    } else if (threadIdx.x == kRows) {
      // With a mask no page is seen whole unread.
      const int all_from = a.mask != nullptr ? INT32_MAX : from(kRows - 1);
      ptx::store_shared(to_memory, Limits{all_from, to(0), from(0), to(kRows - 1)});
    }
  }
};

// The position of a sequence's first query.
TERSOR_DEVICE int kv_query_position(const KvAttentionArguments& a, const KvPage* table, int pages, int sequence) {
  if (a.positions != nullptr) return ptx::load_global_constant(a.positions + sequence);
  if (pages <= 0) return 0;
  const KvPage last = ptx::load_global_constant(table + pages - 1);
  return last.position + last.tokens - a.queries;
}

}  // namespace tersor
