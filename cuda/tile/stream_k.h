// What kernels that compute 128 output features in a block share: the ranges of stream-K, the pipeline of stages, the
// sums of ranges that share a row block, and the store in 16 bits.
//
//   Units (row block, stage of 128 k), in this order, are cut into gridDim.y ranges, one for each blockIdx.y;
//   blockIdx.x counts blocks of tokens.
//
//   warp w has features 32w .. 32w + 31 of the block; a lane (g, c) = (lane / 4, lane % 4) has features 4g .. 4g + 3 of
//   the warp's: fragment rows g and g + 8 of product j are features 2j and 2j + 1 of its four, so the results for a
//   token are four consecutive ones. Tokens 2c and 2c + 1 of each tile of eight are the lane's: [product][tile of
//   tokens][fragment register].
#pragma once

#include <cstdint>

#include "ptx/ptx.h"

namespace tersor {

constexpr int kStreamThreads = 128;
constexpr int kStreamRows = 128;                   // output features of a block: four warps of 32
constexpr int kStreamK = 128, kStreamBlocks = 4;   // of a stage: four blocks of 32 k
constexpr int kStreamSharedLimit = 99 * 1024;      // what sm_86, 89 and 120 let one block have

// Stages in flight: as many of 4, 3, 2 as fit.
constexpr int stream_stages(int stage_bytes, int limit = kStreamSharedLimit) {
  return 4 * stage_bytes + 16 <= limit ? 4 : 3 * stage_bytes + 16 <= limit ? 3 : 2;
}

// Ranges of `share` units; the first `extra` have one more.
struct EqualRanges {
  uint32_t share, extra;

  TERSOR_DEVICE uint32_t first_unit(uint32_t range) const { return range * share + (range < extra ? range : extra); }
  TERSOR_DEVICE uint32_t range_of(uint32_t unit) const {
    const uint32_t longer = extra * (share + 1);
    return unit < longer ? unit / (share + 1) : extra + (unit - longer) / share;
  }
};

struct StreamPosition {
  int row_block, stage;

  TERSOR_DEVICE void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      ++row_block;
    }
  }
};
TERSOR_DEVICE StreamPosition position_of(uint32_t unit, int stages) {
  return {static_cast<int>(unit / stages), static_cast<int>(unit % stages)};
}

// Units begin .. end - 1 through kStages places of shared memory, fetched kStages - 1 ahead.
//   fetch(slot, unit)                starts the copies of the next unit, into place `slot`
//   settle()                         stores what a fetch has loaded into registers
//   multiply(slot, position, unit)
//   finish(position)                 behind the range's last stage of a row block
template <int kStages, class Fetch, class Settle, class Multiply, class Finish>
TERSOR_DEVICE void run_stages(uint32_t begin, uint32_t end, int stages, const Fetch& fetch, const Settle& settle,
                              const Multiply& multiply, const Finish& finish) {
  StreamPosition at = position_of(begin, stages);
  const auto fetch_next = [&](uint32_t unit, int slot) {
    if (unit < end) fetch(slot, unit);
    ptx::cp_async_commit();  // also when empty: the wait below counts groups
  };
  ptx::region("start");
  for (int slot = 0; slot < kStages - 1; ++slot) {
    fetch_next(begin + slot, slot);
    settle();
  }
  int slot = 0, free_slot = kStages - 1;
  for (uint32_t unit = begin; unit < end; ++unit) {
    ptx::region("main loop");
    settle();
    ptx::cp_async_wait<kStages - 2>();  // this thread's part of the stage is there
    ptx::barrier();                     // everyone's part is, and nobody reads the stage before it any more
    fetch_next(unit + kStages - 1, free_slot);
    free_slot = slot;
    multiply(slot, at, unit);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    if (at.stage + 1 == stages || unit + 1 == end) {
      ptx::region("results");
      finish(at);
      at = {at.row_block + 1, -1};
    }
    ++at.stage;
  }
}
template <int kStages, class Fetch, class Multiply, class Finish>
TERSOR_DEVICE void run_stages(uint32_t begin, uint32_t end, int stages, const Fetch& fetch, const Multiply& multiply,
                              const Finish& finish) {
  run_stages<kStages>(begin, end, stages, fetch, [] {}, multiply, finish);
}

template <int kTokenTiles, class Sum>
TERSOR_DEVICE void clear_sums(Sum (&sums)[2][kTokenTiles][4]) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][t][i] = 0;
}

// Whether this block now holds the whole sums of a row block. A row block that several ranges share is summed by the
// last of them to arrive, in the order of the ranges: nobody waits, and the result is the same whoever is last. The
// counter wraps to zero, so it is ready for the next launch.
//   a       partials: two slots of rows x tokens for each (token block, range); counters: one for each (token block,
//           row block), zero before and after
//   flag    four bytes of shared memory
// A load takes half a microsecond to arrive: those of kRangesAtOnce ranges (the last range's for none) and kTilesAtOnce
// tiles go at once, as many as the registers hold.
template <int kRangesAtOnce, int kTilesAtOnce, int kTokenTiles, class Sum, class Arguments, class Ranges>
TERSOR_DEVICE bool sum_ranges(Sum (&sums)[2][kTokenTiles][4], const Arguments& a, const Ranges& ranges, int row_block,
                              int row_blocks, ptx::shared_t flag) {
  using Four = ptx::Vec<Sum, 4>;
  const uint32_t first_unit_of_rows = uint32_t(row_block) * a.stages;
  const uint32_t first = ranges.range_of(first_unit_of_rows), last = ranges.range_of(first_unit_of_rows + a.stages - 1);
  if (first == last) return true;
  // A range's first row block goes to its even slot, its last one, if another, to the odd one.
  const auto partial = [&](uint32_t range) {
    const uint32_t slot = 2 * range + (ranges.first_unit(range) < first_unit_of_rows ? 1 : 0);
    const int64_t at = (int64_t(blockIdx.x) * gridDim.y * 2 + slot) * (kStreamRows * 8 * kTokenTiles);
    return reinterpret_cast<Four*>(a.partials + at) + threadIdx.x;
  };

  Four* mine = partial(blockIdx.y);
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Four four;
      for (int i = 0; i < 4; ++i) four[i] = sums[j][t][i];
      ptx::store_global(mine + (2 * t + j) * kStreamThreads, four);
    }
  ptx::barrier();
  if (threadIdx.x == 0) {
    ptx::fence();  // what the block stored before the barrier, before the arrival
    const uint32_t arrived = ptx::atomic_inc_wrap(a.counters + blockIdx.x * row_blocks + row_block, last - first);
    ptx::fence();  // the others' arrivals, before their sums are read
    ptx::store_shared<uint32_t>(flag, arrived);
  }
  ptx::barrier();
  if (ptx::load_shared<uint32_t>(flag) != last - first) return false;

  clear_sums(sums);
  for (uint32_t range = first; range <= last; range += kRangesAtOnce) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; t += kTilesAtOnce) {
      Four theirs[kRangesAtOnce][2 * kTilesAtOnce];
#pragma unroll
      for (int r = 0; r < kRangesAtOnce; ++r)
#pragma unroll
        for (int i = 0; i < 2 * kTilesAtOnce; ++i) {
          const Four* from = partial(r == 0 || range + r < last ? range + r : last);
          theirs[r][i] = ptx::load_global_volatile(from + (2 * t + i) * kStreamThreads);
        }
#pragma unroll
      for (int r = 0; r < kRangesAtOnce; ++r)
#pragma unroll
        for (int i = 0; i < 2 * kTilesAtOnce; ++i)
#pragma unroll
          for (int f = 0; f < 4; ++f) {
            if (r == 0 || range + r <= last) sums[i % 2][t + i / 2][f] += theirs[r][i][f];
          }
    }
  }
  return true;
}

// Sums times factor(token), plus the bias, as 16-bit floats. to: bias [n] or null, y [m, ldy], m, n, and wide_stores
// where y takes 8-byte stores.
template <class Type, int kTokenTiles, class Arguments, class Factor>
TERSOR_DEVICE void store_rows(const float (&sums)[2][kTokenTiles][4], const Arguments& to, int row_block, int token0,
                              const Factor& factor) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int row = row_block * kStreamRows + 32 * (threadIdx.x / 32) + 4 * g;
  const int rows = to.n - row;  // four are the lane's; none where this is not positive
  float bias[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint16_t* source = static_cast<const uint16_t*>(to.bias) + row + i;
    bias[i] = to.bias != nullptr && i < rows ? Type::low(ptx::load_global_constant(source)) : 0.0f;
  }
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = token0 + 8 * t + 2 * c + e;
      if (token >= to.m) continue;
      const float f = factor(token);
      uint16_t* y = static_cast<uint16_t*>(to.y) + token * to.ldy + row;
      const ptx::Vec<uint32_t, 2> pairs = {{Type::pack(sums[0][t][e] * f + bias[0], sums[0][t][e + 2] * f + bias[1]),
                                            Type::pack(sums[1][t][e] * f + bias[2], sums[1][t][e + 2] * f + bias[3])}};
      if (rows >= 4 && to.wide_stores) {
        ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(y), pairs);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i < rows) ptx::store_global(y + i, static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2))));
        }
      }
    }
}

// total += scale[row] * sum, sum = 0.
template <int kTokenTiles, class Scale>
TERSOR_DEVICE void promote(float (&total)[2][kTokenTiles][4], float (&sum)[2][kTokenTiles][4], const Scale& scale) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[j][t][i] += scale[2 * j + i / 2] * sum[j][t][i];
        sum[j][t][i] = 0;
      }
}

}  // namespace tersor
