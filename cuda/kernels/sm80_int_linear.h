// What the W4A16 kernel (sm80_int_linear.cu) and its launcher (dispatch/int_linear.cu) agree on.
#pragma once

#include <cstdint>

#include "tile/expert_rows.h"
#include "tile/stream_k.h"

namespace tersor {

struct IntLinearArguments {
  const void* x;               // [m, ldx], 16 bits; rows 16-byte aligned
  const uint8_t* qweight;      // [tiles, blocks, 64 * bits]
  const void* scales;          // [tiles, groups, 16]
  const uint8_t* zero_points;  // [tiles, groups, 16] or null
  const void* bias;            // [n], x's dtype, or null
  void* y;                     // [m, ldy]
  float* partials;             // two slots of rows x tokens for each (token block, range)
  uint32_t* counters;          // one for each (token block, row block); zero before and after
  int64_t ldx, ldy;
  int m, n, k;
  int tiles, blocks, groups, group_blocks;  // 16-row tiles, 32-k blocks, scale groups, blocks in a group
  int stages;                               // of 128 k, over all of k
  int group_slots;                          // groups that one stage can touch: 4, 2 or 1
  int group_bytes, stage_bytes;             // shared memory of a group slot, and of a stage
  int scale_dtype;                          // enum tersor_dtype
  int wide_stores;                          // y takes 8-byte stores
  EqualRanges ranges;                       // of units (row block, stage)
};

using IntLinearKernel = void(IntLinearArguments);

// Rows sorted by expert; the arguments' weights, scales, zero points and bias are the first expert's.
using IntLinearGroupedKernel = void(IntLinearArguments, ExpertWeights);

constexpr int int_linear_weight_bytes(int bits) { return kStreamRows * kStreamK / 8 * bits; }
constexpr int int_linear_token_bytes(int token_tiles) { return 8 * token_tiles * kStreamK * 2; }
constexpr int int_linear_group_bytes(int scale_bytes, bool zero_points) {
  return kStreamRows * (scale_bytes + (zero_points ? 1 : 0));
}
constexpr int int_linear_stage_bytes(int bits, int token_tiles, int group_slots, int scale_bytes, bool zero_points) {
  return int_linear_weight_bytes(bits) + int_linear_token_bytes(token_tiles) +
         group_slots * int_linear_group_bytes(scale_bytes, zero_points);
}
// Stages in flight: as many of 4, 3, 2 as fit in the limit with the largest scales.
constexpr int int_linear_stages(int bits, int token_tiles) {
  return stream_stages(int_linear_stage_bytes(bits, token_tiles, 4, 4, true));
}
static_assert(2 * int_linear_stage_bytes(8, 8, 4, 4, true) + 16 <= kStreamSharedLimit,
              "the largest stage is double-buffered on every target");

// Blocks that should share a multiprocessor: the register budget of each instance follows from it.
constexpr int int_linear_blocks_per_multiprocessor(int bits, int token_tiles) {
  return token_tiles == 1 ? (bits < 7 ? 4 : 3) : token_tiles == 2 ? 3 : 2;
}

// The kernel for one number of bits; null for token tiles that it was not built with. Each translation unit of
// sm80_int_linear.cu enters its own in the table.
using IntLinearChooser = IntLinearKernel*(bool is_bfloat16, int token_tiles);
extern IntLinearChooser* int_linear_choosers[9];
using IntLinearGroupedChooser = IntLinearGroupedKernel*(bool is_bfloat16, int token_tiles);
extern IntLinearGroupedChooser* int_linear_grouped_choosers[9];

}  // namespace tersor
