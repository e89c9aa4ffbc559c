// What the kernels that round rows of activations (quantize_rows.cu, producer_rows.cu, producer_products.cu) and their
// launcher (dispatch/quantize_rows.cu) agree on.
#pragma once

#include <cstdint>

#include "tile/act_codes.h"

namespace tersor {

constexpr int kQuantizeThreads = 256;

struct QuantizeRowsArguments {
  // in
  const void *x, *other, *norm_weight;  // of one dtype; other: SiLU(x) * other; both of these may be null
  const float* static_scales;           // [groups] or null
  const uint8_t* block_bits;            // [blocks] of 4 or 8 instead of `bits`, or null
  const int32_t* index;                 // [k] or null
  const float* signs;                   // [k] or null
  const uint32_t *left, *right;         // fragments of the small matrices (tile/producer_products.h), or null
  // out
  uint8_t* codes;
  float* scales;
  int16_t *sums, *zero_points;  // sums may be null; zero_points are there for asymmetric codes of 8 bits
  int64_t ldx, ldother;         // elements
  int64_t row_bytes;            // of codes
  int k, blocks, groups;        // channels, 128-channel blocks, groups of a token
  int group_sums;               // kActSumK channels of a group; of one that is the whole token, all of the padded ones
  int dtype;                    // enum tersor_dtype, of x, other and norm_weight
  int bits, width;              // width 4 or 8; 0: each block's own
  int asymmetric;
  int wide;  // rows of x (and other) take 16-byte loads
  float clip, epsilon;
  // The row as [k / (rows * columns)][rows][columns], each such matrix in `lines` lines of shared memory, `line_bytes`
  // apart; without matrices all is one line.
  int rows, columns, lines, line_bytes;
  int left_parts;   // of its numbers in bf16: 1 where they are exact, else 2
  int butterflies;  // size of the Hadamard matrix along the columns, a power of two; 1: none
  float factor;     // of the input of a Hadamard transform
};

using QuantizeRowsKernel = void(QuantizeRowsArguments);
extern QuantizeRowsKernel *quantize_rows_kernel, *producer_rows_kernel;
extern QuantizeRowsKernel* producer_products_kernels[2];  // of matrices up to 128, and up to kMostFactor

constexpr int kMostFactor = 256;  // order of a small matrix

// Bytes of shared memory that rounding needs besides the row: sums of squares by warp, starts of mixed blocks, ranges
// of each 32 channels and, for groups that no warp holds, their quanta.
constexpr int kReduceBytes = kQuantizeThreads / 32 * 4;
__host__ __device__ constexpr bool group_in_warp(int group_sums) {
  return group_sums == 1 || group_sums == 2 || group_sums == 4 || group_sums == 8;
}
constexpr int64_t quantize_scratch_bytes(int64_t blocks, int64_t groups, int group_sums, bool mixed) {
  const int64_t starts = mixed ? div_up(4 * blocks, 16) * 16 : 0;
  const int64_t ranges = 8 * blocks * (kActBlockK / kActSumK) + div_up(8 * groups, 16) * 16;
  return kReduceBytes + starts + (group_in_warp(group_sums) ? 0 : ranges);
}

}  // namespace tersor
