// What the kernel for weights of small floats (sm80_float_linear.cu) and its launcher agree on.
#pragma once

#include <cstdint>

#include "tile/row_stream.h"
#include "tile/six_bits.h"

namespace tersor {

// Instances: e4m3, e2m1 or e2m3 codes with scales on sums, and e2m1 with e4m3 scales that enter the weights (NVFP4).
enum FloatWeight { kFloatE4m3 = 0, kFloatE2m1 = 1, kFloatNv = 2, kFloatE2m3 = 3 };
constexpr int kFloatWeights = 4;
// Kinds of scales beside those of enum tersor_dtype (as in cpp/cpu/float_linear.h).
constexpr int kFloatScaleE8m0 = 3, kFloatScaleE4m3 = 4;

struct FloatRows {
  RowStream rows;
  const void* x;          // [m, ldx], 16 bits; rows 16-byte aligned
  const uint8_t* codes;   // [n, row_bytes]
  const void* scales;     // [ceil(n / scale_rows), groups]
  const float* global;    // divides the scales of NVFP4
  int64_t ldx, row_bytes;
  int k, groups, scale_kind, scale_rows;
  int group_stages;  // stages that share a scale of a float type
  int aligned;       // rows of codes start at multiples of 16 bytes
};

using FloatLinearKernel = void(FloatRows);

constexpr int float_row_bytes(int weight) {
  return weight == kFloatE4m3 ? kStreamK : weight == kFloatE2m3 ? kSixRowBytes : kStreamK / 2;
}
constexpr int float_weight_bytes(int weight) {
  return weight == kFloatE2m3 ? six_bytes(kStreamRows) : kStreamRows * float_row_bytes(weight);
}
constexpr int float_token_bytes(int token_tiles) { return 8 * token_tiles * kStreamK * 2; }
constexpr int float_scale_bytes(int weight) { return kStreamRows * (weight == kFloatNv ? 8 : 16); }
constexpr int float_stage_bytes(int weight, int token_tiles) {
  return float_weight_bytes(weight) + float_token_bytes(token_tiles) + float_scale_bytes(weight);
}
static_assert(2 * float_stage_bytes(kFloatE4m3, 8) + 16 <= kStreamSharedLimit,
              "the largest stage is double-buffered on every target");

// The kernel of one kind of weight; null for token tiles that it was not built with. Each translation unit of
// sm80_float_linear.cu enters its own in the table.
using FloatLinearChooser = FloatLinearKernel*(bool is_bfloat16, int token_tiles);
extern FloatLinearChooser* float_linear_choosers[kFloatWeights];

}  // namespace tersor
