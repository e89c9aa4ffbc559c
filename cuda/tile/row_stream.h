// What the kernels for weights of small floats and for e4m3 tokens share on top of tile/stream_k.h: sums in fp32,
// results in 16 bits, and the launcher's description of them (dispatch/stream_plan.h). A kernel brings a Work (below)
// that fetches and multiplies stages; what several of them do alike follows.
#pragma once

#include <cstdint>

#include "tile/number.h"
#include "tile/stream_k.h"
#include "tile/token_tile.h"

namespace tersor {

// Results and ranges, as a launcher describes them.
struct RowStream {
  const void* bias;    // [n], y's dtype, or null
  void* y;             // [m, ldy], 16 bits
  float* partials;     // two slots of rows x tokens for each (token block, range)
  uint32_t* counters;  // one for each (token block, row block); zero before and after
  int64_t ldy;
  int m, n, row_blocks, stages;
  int wide_stores;     // y takes 8-byte stores
  EqualRanges ranges;  // of units
};

// Blocks that should share a multiprocessor: the register budget of each instance follows from it.
constexpr int stream_blocks_per_multiprocessor(int token_tiles) { return token_tiles < 4 ? 3 : 2; }

// Work: fetch(stage address, row block, stage) starts copies and loads what settle(stage address) stores before the
// next stage begins; multiply(stage address, totals) adds a stage to the totals; factor(token) multiplies the results.
template <class Type, int kTokenTiles, class Work>
TERSOR_DEVICE void run_rows(const RowStream& a, Work& work) {
  constexpr int stage_bytes = Work::kStageBytes, tokens = 8 * kTokenTiles;
  const ptx::shared_t shared = ptx::dynamic_shared();
  const uint32_t begin = a.ranges.first_unit(blockIdx.y), end = a.ranges.first_unit(blockIdx.y + 1);
  StreamPosition next = position_of(begin, a.stages);
  ptx::shared_t unsettled = 0;  // the stage whose loads are on their way
  bool waiting = false;
  float total[2][kTokenTiles][4];
  const auto fetch = [&](int slot, uint32_t) {
    unsettled = shared + slot * stage_bytes;
    work.fetch(unsettled, next.row_block, next.stage);
    waiting = true;
    next.advance(a.stages);
  };
  const auto settle = [&]() {
    if (waiting) work.settle(unsettled);
    waiting = false;
  };
  const auto multiply = [&](int slot, const StreamPosition&, uint32_t) {
    work.multiply(shared + slot * stage_bytes, total);
  };
  const auto finish = [&](const StreamPosition& at) {
    constexpr int at_once = kTokenTiles < 4 ? 4 / kTokenTiles : 1;
    const ptx::shared_t flag = shared + Work::kStages * stage_bytes;
    if (sum_ranges<at_once, kTokenTiles>(total, a, a.ranges, at.row_block, a.row_blocks, flag)) {
      const auto factor = [&](int token) { return work.factor(token); };
      store_rows<Type>(total, a, at.row_block, blockIdx.x * tokens, factor);
    }
    clear_sums(total);
  };
  clear_sums(total);
  run_stages<Work::kStages>(begin, end, a.stages, fetch, settle, multiply, finish);
}

// ---- pieces of Work -------------------------------------------------------------------------------------------------

// Sixteen bytes of a row-major matrix to shared memory, zeros beyond the row's `left` bytes (which may be negative).
// Rows that do not start at multiples of 16 bytes are read a byte at a time.
TERSOR_DEVICE void fetch_piece(ptx::shared_t target, const uint8_t* source, int left, bool aligned) {
  const int bytes = left <= 0 ? 0 : left < kPieceBytes ? left : kPieceBytes;
  if (aligned) {
    ptx::cp_async_16_once(target, source, bytes);
    return;
  }
  uint32_t words[4] = {};
#pragma unroll 1
  for (int i = 0; i < bytes; ++i) {
    const uint32_t byte = ptx::load_global_constant(source + i);
    words[0] |= i < 4 ? byte << (8 * (i & 3)) : 0;
    words[1] |= i >> 2 == 1 ? byte << (8 * (i & 3)) : 0;
    words[2] |= i >> 2 == 2 ? byte << (8 * (i & 3)) : 0;
    words[3] |= i >> 2 == 3 ? byte << (8 * (i & 3)) : 0;
  }
  ptx::store_shared(target, ptx::Vec<uint32_t, 4>{{words[0], words[1], words[2], words[3]}});
}

// A row block's codes of stage `index`, rows of row_bytes as checkpoints store them; zeros past row n. Threads take
// neighbouring pieces, kAcross of a row at once. place(row, piece): where a piece lies, counted from the first row.
template <int kRowBytes, int kAcross, bool kUnrolled, class Place>
TERSOR_DEVICE void fetch_rows(ptx::shared_t stage, const uint8_t* codes, int64_t row_bytes, bool aligned, int row_block,
                              int n, int index, const Place& place) {
  constexpr int pieces = kRowBytes / kPieceBytes, at_once = kStreamThreads / kAcross;
  const int first = threadIdx.x / kAcross, across = threadIdx.x % kAcross;
#pragma unroll(kUnrolled ? pieces / kAcross : 1)
  for (int start = 0; start < pieces; start += kAcross) {
    const int piece = start + across;
    const int64_t column = int64_t(index) * kRowBytes + piece * kPieceBytes;
    const int left = row_bytes - column < kPieceBytes ? static_cast<int>(row_bytes - column) : kPieceBytes;
    const uint8_t* source = codes + (int64_t(row_block) * kStreamRows + first) * row_bytes + column;
#pragma unroll(kUnrolled ? kStreamRows / at_once : 1)
    for (int i = 0; i < kStreamRows / at_once; ++i) {
      const int row = first + at_once * i;
      fetch_piece(stage + place(row, piece) * kPieceBytes, source, row_block * kStreamRows + row < n ? left : 0,
                  aligned);
      source += at_once * row_bytes;
    }
  }
}

// kCount scales of a byte from number `first` on of a row of `groups`, zeros past its end. aligned: they are one load.
template <int kCount>
TERSOR_DEVICE ptx::Vec<uint32_t, kCount / 4> load_scale_bytes(const uint8_t* row, int first, int groups, bool aligned) {
  using Words = ptx::Vec<uint32_t, kCount / 4>;
  if (aligned) return ptx::load_global_constant(reinterpret_cast<const Words*>(row + first));
  Words words = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i < groups) words[i / 4] |= uint32_t(ptx::load_global_constant(row + first + i)) << (8 * (i % 4));
  }
  return words;
}

// A number of a float type at `address` as fp32; dtype as in enum tersor_dtype.
TERSOR_DEVICE float load_number(const void* base, int64_t index, int dtype) {
  if (dtype == 0) return ptx::load_global_constant(static_cast<const float*>(base) + index);
  const uint32_t bits = ptx::load_global_constant(static_cast<const uint16_t*>(base) + index);
  return dtype == 1 ? BFloat16::low(bits) : Float16::low(bits);
}

}  // namespace tersor
