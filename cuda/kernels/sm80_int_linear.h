// What the W4A16 kernel (sm80_int_linear.cu) and its launcher (dispatch/int_linear.cu) agree on.
#pragma once

#include <cstdint>

namespace tersor {

constexpr int kIntLinearThreads = 128;
constexpr int kIntLinearRows = 128;         // output features of a block: four warps of 32
constexpr int kIntLinearStageBlocks = 4;    // a stage: four blocks of 32 k
constexpr int kIntLinearStageK = 128;
constexpr int kIntLinearSharedLimit = 99 * 1024;  // what sm_86, 89 and 120 let one block have

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
  uint32_t share, extra;                    // units (row block, stage) of a range; the first `extra` have one more
};

using IntLinearKernel = void(IntLinearArguments);

// Beside the arguments of int_linear_grouped, whose weights, scales, zero points and bias are the first expert's.
struct IntLinearExperts {
  const int32_t* ends;  // [count] the row after each expert's last
  int count, rows;
  int64_t weight_bytes, scale_bytes, zero_point_bytes;  // from one expert to the next
};
using IntLinearGroupedKernel = void(IntLinearArguments, IntLinearExperts);

constexpr int int_linear_weight_bytes(int bits) { return kIntLinearRows * kIntLinearStageK / 8 * bits; }
constexpr int int_linear_token_bytes(int token_tiles) { return 8 * token_tiles * kIntLinearStageK * 2; }
constexpr int int_linear_group_bytes(int scale_bytes, bool zero_points) {
  return kIntLinearRows * (scale_bytes + (zero_points ? 1 : 0));
}
constexpr int int_linear_stage_bytes(int bits, int token_tiles, int group_slots, int scale_bytes, bool zero_points) {
  return int_linear_weight_bytes(bits) + int_linear_token_bytes(token_tiles) +
         group_slots * int_linear_group_bytes(scale_bytes, zero_points);
}
// Stages in flight: as many of 4, 3, 2 as fit in the limit with the largest scales.
constexpr int int_linear_stages(int bits, int token_tiles) {
  const int bytes = int_linear_stage_bytes(bits, token_tiles, 4, 4, true);
  return 4 * bytes + 16 <= kIntLinearSharedLimit ? 4 : 3 * bytes + 16 <= kIntLinearSharedLimit ? 3 : 2;
}
static_assert(2 * int_linear_stage_bytes(8, 8, 4, 4, true) + 16 <= kIntLinearSharedLimit,
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
