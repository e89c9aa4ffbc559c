// What the integer kernels for low-bit activations (sm80_lowbit_linear.cu, sm80_lowbit_linear_s4.cu) and their launcher
// (dispatch/lowbit_linear.cu) agree on.
#pragma once

#include <cstdint>

#include "tile/stream_k.h"

namespace tersor {

// How codes of activations are stored (tile/act_codes.h).
enum LowbitWidth { kLowbitBytes = 0, kLowbitNibbles = 1, kLowbitMixed = 2 };

struct LowbitLinearArguments {
  const uint8_t* codes;           // [m, row_bytes], 16-byte aligned rows
  const float* act_scales;        // [m, act_scale_stride] (or one row where the stride is 0)
  const int16_t* sums;            // [m, 4 stages]; looked at where weights have zero points
  const int16_t* act_zero_points;  // [m, act_groups] or null
  const int32_t* stage_starts;    // mixed: [stages + 1] 64-byte units of a row before each stage; [stages + 1] costs
  const uint8_t* qweight;         // [tiles, blocks, 64 * bits]
  const void* scales;             // [tiles, groups, 16]
  const uint8_t* zero_points;     // [tiles, groups, 16] or null
  const void* bias;               // [n], y's dtype, or null
  const void* residual;           // [m, ldr], y's dtype, or null
  void* y;                        // [m, ldy]
  uint32_t* partials;             // two slots of rows x tokens for each (token block, range): fp32 or int32
  uint32_t* counters;             // one for each (token block, row block); zero before and after
  int64_t row_bytes, act_scale_stride, ldy, ldr;
  int m, n, k;
  int tiles, blocks, stages;       // 16-row tiles, 32-k blocks, stages of 128 k
  int groups, group_blocks;        // of weight scales
  int act_groups, act_group_blocks;
  int group_slots, act_slots;      // groups that one stage can touch: 4, 2 or 1
  int group_bytes, stage_bytes;    // shared memory of a weight group's slot, and of a stage
  int scale_dtype, y_dtype;        // enum tersor_dtype
  int wide_stores;                 // y and the residual take four elements at once
  EqualRanges ranges;              // of units (row block, stage)
  int64_t row_cost, total_cost;    // mixed: of a row block, of all; ranges are of equal cost there
};

using LowbitLinearKernel = void(LowbitLinearArguments);

constexpr int lowbit_weight_bytes(int bits) { return kStreamRows * kStreamK / 8 * bits; }
constexpr int lowbit_token_bytes(int token_tiles, int width) {
  return 8 * token_tiles * kStreamK / (width == kLowbitNibbles ? 2 : 1);
}
constexpr int lowbit_group_bytes(int scale_bytes, bool zero_points) {
  return kStreamRows * (scale_bytes + (zero_points ? 1 : 0));
}
// `grouped`: scales change along k, of weights or of activations.
constexpr int lowbit_stage_bytes(int bits, int token_tiles, int width, bool grouped, int group_slots, int act_slots,
                                 int scale_bytes, bool zero_points) {
  return lowbit_weight_bytes(bits) + lowbit_token_bytes(token_tiles, width) +
         (grouped ? group_slots * lowbit_group_bytes(scale_bytes, zero_points) + act_slots * 8 * token_tiles * 4 : 0) +
         (zero_points ? 8 * token_tiles * 8 : 0);
}
// Stages in flight: as many of 4, 3, 2 as fit with the largest scales; with 128 tokens two blocks share the 164 KB of
// sm_80.
constexpr int lowbit_stages(int bits, int token_tiles, int width, bool grouped) {
  return stream_stages(lowbit_stage_bytes(bits, token_tiles, width, grouped, 4, 4, 4, true),
                       token_tiles == 16 ? 80 * 1024 : kStreamSharedLimit);
}
static_assert(2 * lowbit_stage_bytes(8, 8, kLowbitBytes, true, 4, 4, 4, true) + 16 <= kStreamSharedLimit &&
                  2 * lowbit_stage_bytes(8, 16, kLowbitBytes, false, 4, 4, 4, true) + 16 <= kStreamSharedLimit,
              "the largest stage is double-buffered on every target");

// Blocks that should share a multiprocessor: the register budget of each instance follows from it.
constexpr int lowbit_blocks_per_multiprocessor(int token_tiles, int width) {
  return token_tiles == 1 && width == kLowbitBytes ? 4 : token_tiles <= 2 ? 3 : 2;
}

// The kernel for one number of bits; null for what was not built. Each translation unit enters its own in the tables.
using LowbitLinearChooser = LowbitLinearKernel*(bool grouped, int token_tiles);
extern LowbitLinearChooser* lowbit_linear_choosers[9];  // by bits of weights, activations in bytes
// Weights of 4 bits, activations in nibbles, and in both.
extern LowbitLinearChooser* lowbit_linear_nibble_choosers[3];  // by LowbitWidth

}  // namespace tersor
