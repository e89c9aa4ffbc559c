// What kernels with 128 output features in a block share: the ranges of stream-K, the pipeline of stages, the sum of
// partial results in a fixed order, and the store. A kernel brings a Work (below) that fetches and multiplies stages.
//
//   warp w has features 32w .. 32w + 31 of the block; a lane (g, c) = (lane / 4, lane % 4) has features 4g .. 4g + 3 of
//   the warp's: fragment rows g and g + 8 of product j are features 2j and 2j + 1 of its four, so the results for a
//   token are four consecutive ones. Tokens 2c and 2c + 1 of each tile of eight are the lane's.
//
// Units (row block, stage of 128 k), in this order, are cut into gridDim.y equal ranges, one for each blockIdx.y.
#pragma once

#include <cstdint>

#include "ptx/ptx.h"
#include "tile/number.h"

namespace tersor {

constexpr int kStreamThreads = 128;
constexpr int kStreamRows = 128;  // output features of a block: four warps of 32
constexpr int kStreamK = 128;     // of a stage
constexpr int kStreamSharedLimit = 99 * 1024;  // what sm_86, 89 and 120 let one block have
constexpr int kPieceBytes16 = 16;              // of one cp.async

// Results and ranges, as a launcher describes them.
struct RowStream {
  const void* bias;    // [n], y's dtype, or null
  void* y;             // [m, ldy], 16 bits
  float* partials;     // two slots of rows x tokens for each (token block, range)
  uint32_t* counters;  // one for each (token block, row block); zero before and after
  int64_t ldy;
  int m, n, row_blocks, stages;
  int wide_stores;        // y takes 8-byte stores
  uint32_t share, extra;  // units of a range; the first `extra` have one more
};

// Stages in flight: as many of 4, 3, 2 as fit.
constexpr int stream_stages(int stage_bytes) {
  return 4 * stage_bytes + 16 <= kStreamSharedLimit ? 4 : 3 * stage_bytes + 16 <= kStreamSharedLimit ? 3 : 2;
}
// Blocks that should share a multiprocessor: the register budget of each instance follows from it.
constexpr int stream_blocks_per_multiprocessor(int token_tiles) { return token_tiles < 4 ? 3 : 2; }

// Work: fetch(stage address, row block, stage) starts copies and loads what settle(stage address) stores before the
// next stage begins; multiply(stage address, totals) adds a stage to the totals.
template <class Type, int kTokenTiles>
class RowBlock {
 public:
  using Totals = float[2][kTokenTiles][4];  // [product][tile of tokens][fragment register]
  static constexpr int kTokens = 8 * kTokenTiles;

  TERSOR_DEVICE explicit RowBlock(const RowStream& arguments) : a(arguments) {}

  template <int kStages, class Work>
  TERSOR_DEVICE void run(Work& work, int stage_bytes) {
    flag_ = shared_ + kStages * stage_bytes;
    const uint32_t begin = first_unit(blockIdx.y), end = first_unit(blockIdx.y + 1);
    int row_block = static_cast<int>(begin / a.stages), stage = static_cast<int>(begin % a.stages);
    int next_row_block = row_block, next_stage = stage;
    shared_t unsettled = 0;  // the stage whose loads are on their way; 0: none
    bool waiting = false;
    const auto settle = [&]() {
      if (waiting) work.settle(unsettled);
      waiting = false;
    };
    const auto fetch_next = [&](uint32_t unit, int slot) {
      if (unit < end) {
        unsettled = shared_ + slot * stage_bytes;
        work.fetch(unsettled, next_row_block, next_stage);
        waiting = true;
        if (++next_stage == a.stages) {
          next_stage = 0;
          ++next_row_block;
        }
      }
      ptx::cp_async_commit();  // also when empty: the wait below counts groups
    };
    ptx::region("start");
    for (int slot = 0; slot < kStages - 1; ++slot) {
      fetch_next(begin + slot, slot);
      settle();
    }
    clear();
    int slot = 0, free_slot = kStages - 1;
    for (uint32_t unit = begin; unit < end; ++unit) {
      ptx::region("main loop");
      settle();
      ptx::cp_async_wait<kStages - 2>();  // this thread's part of the stage is there
      ptx::barrier();                     // everyone's part is, and nobody reads the stage before it any more
      fetch_next(unit + kStages - 1, free_slot);
      free_slot = slot;
      work.multiply(shared_ + slot * stage_bytes, total);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      if (stage + 1 == a.stages || unit + 1 == end) {
        ptx::region("results");
        if (reduce(row_block)) store(row_block, work);
        clear();
        stage = -1;
        ++row_block;
      }
      ++stage;
    }
  }

 private:
  using shared_t = ptx::shared_t;
  using Four = ptx::Vec<float, 4>;

  TERSOR_DEVICE uint32_t first_unit(uint32_t range) const {
    return range * a.share + (range < a.extra ? range : a.extra);
  }
  TERSOR_DEVICE uint32_t range_of(uint32_t unit) const {
    const uint32_t longer = a.extra * (a.share + 1);
    return unit < longer ? unit / (a.share + 1) : a.extra + (unit - longer) / a.share;
  }

  TERSOR_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[j][t][i] = 0;
  }

  TERSOR_DEVICE Four* partial(uint32_t slot) const {
    constexpr int floats = kStreamRows * kTokens;
    const int64_t at = (int64_t(blockIdx.x) * gridDim.y * 2 + slot) * floats;
    return reinterpret_cast<Four*>(a.partials + at) + threadIdx.x;
  }

  // Whether this block now holds the whole sum of the row block. Of the ranges that share one, the last to arrive adds
  // all in their order: nobody waits, and the result does not depend on who is last. The counter wraps to zero.
  TERSOR_DEVICE bool reduce(int row_block) {
    const uint32_t first_unit_of_rows = uint32_t(row_block) * a.stages;
    const uint32_t first = range_of(first_unit_of_rows), last = range_of(first_unit_of_rows + a.stages - 1);
    if (first == last) return true;
    // A range's first row block goes to its even slot, its last one, if another, to the odd one.
    const auto slot_of = [&](uint32_t range) { return 2 * range + (first_unit(range) < first_unit_of_rows ? 1 : 0); };

    Four* mine = partial(slot_of(blockIdx.y));
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Four four;
        for (int i = 0; i < 4; ++i) four[i] = total[j][t][i];
        ptx::store_global(mine + (2 * t + j) * kStreamThreads, four);
      }
    ptx::barrier();
    if (threadIdx.x == 0) {
      ptx::fence();  // what the block stored before the barrier, before the arrival
      const uint32_t arrived = ptx::atomic_inc_wrap(a.counters + blockIdx.x * a.row_blocks + row_block, last - first);
      ptx::fence();  // the others' arrivals, before their sums are read
      ptx::store_shared<uint32_t>(flag_, arrived);
    }
    ptx::barrier();
    if (ptx::load_shared<uint32_t>(flag_) != last - first) return false;

    clear();
    // A load takes half a microsecond to arrive: those of several ranges go at once, the last range's for none.
    constexpr int at_once = kTokenTiles < 4 ? 4 / kTokenTiles : 1;
    for (uint32_t range = first; range <= last; range += at_once) {
      Four theirs[at_once][2 * kTokenTiles];
#pragma unroll
      for (int r = 0; r < at_once; ++r)
#pragma unroll
        for (int i = 0; i < 2 * kTokenTiles; ++i) {
          const Four* from = partial(slot_of(range + r < last ? range + r : last));
          theirs[r][i] = ptx::load_global_volatile(from + i * kStreamThreads);
        }
#pragma unroll
      for (int r = 0; r < at_once; ++r)
#pragma unroll
        for (int i = 0; i < 2 * kTokenTiles; ++i)
#pragma unroll
          for (int f = 0; f < 4; ++f) {
            if (range + r <= last) total[i % 2][i / 2][f] += theirs[r][i][f];
          }
    }
    return true;
  }

  // Results times work.factor(token), plus the bias.
  template <class Work>
  TERSOR_DEVICE void store(int row_block, const Work& work) const {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int row = row_block * kStreamRows + 32 * (threadIdx.x / 32) + 4 * g;
    const int rows = a.n - row;  // four are the lane's; none where this is not positive
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t* source = static_cast<const uint16_t*>(a.bias) + row + i;
      bias[i] = a.bias != nullptr && i < rows ? Type::low(ptx::load_global_constant(source)) : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = blockIdx.x * kTokens + 8 * t + 2 * c + e;
        if (token >= a.m) continue;
        const float factor = work.factor(token);
        uint16_t* y = static_cast<uint16_t*>(a.y) + token * a.ldy + row;
        const ptx::Vec<uint32_t, 2> pairs = {
            {Type::pack(total[0][t][e] * factor + bias[0], total[0][t][e + 2] * factor + bias[1]),
             Type::pack(total[1][t][e] * factor + bias[2], total[1][t][e + 2] * factor + bias[3])}};
        if (rows >= 4 && a.wide_stores) {
          ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(y), pairs);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (i < rows) ptx::store_global(y + i, static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2))));
          }
        }
      }
  }

  const RowStream& a;
  const shared_t shared_ = ptx::dynamic_shared();
  shared_t flag_;
  Totals total;
};

// ---- pieces of Work -------------------------------------------------------------------------------------------------

// Sixteen bytes of a row-major matrix to shared memory, zeros beyond the row's `left` bytes (which may be negative).
// Rows that do not start at multiples of 16 bytes are read a byte at a time.
TERSOR_DEVICE void fetch_piece(ptx::shared_t target, const uint8_t* source, int left, bool aligned) {
  const int bytes = left <= 0 ? 0 : left < kPieceBytes16 ? left : kPieceBytes16;
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

// total += scale[row] * sum, sum = 0.
template <int kTokenTiles>
TERSOR_DEVICE void promote(float (&total)[2][kTokenTiles][4], float (&sum)[2][kTokenTiles][4],
                           const ptx::Vec<float, 4>& scale) {
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

// A number of a float type at `address` as fp32; dtype as in enum tersor_dtype.
TERSOR_DEVICE float load_number(const void* base, int64_t index, int dtype) {
  if (dtype == 0) return ptx::load_global_constant(static_cast<const float*>(base) + index);
  const uint32_t bits = ptx::load_global_constant(static_cast<const uint16_t*>(base) + index);
  return dtype == 1 ? BFloat16::low(bits) : Float16::low(bits);
}

}  // namespace tersor
