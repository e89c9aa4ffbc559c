// What the kernel for MXFP8 and MXFP6 activations (sm120_mx_linear.cu) and its launcher agree on.
#pragma once

#include <cstdint>

#include "ptx/matrix_mx.h"
#include "tile/row_stream.h"
#include "tile/six_bits.h"

namespace tersor {

// Elements are ptx::MxElement: 0 e4m3, 1 e2m3, 2 e2m1 (weights only).
struct MxArguments {
  RowStream rows;
  const uint8_t* x;         // [m, 128 stages], a byte for each channel
  const uint8_t* x_scales;  // [m, 4 stages]
  const uint8_t* codes;     // [n, row_bytes], 8, 6 or 4 bits for each channel
  const uint8_t* scales;    // [n, groups]
  int64_t row_bytes;
  int groups;
  int aligned;         // rows of codes start at multiples of 16 bytes
  int aligned_scales;  // a row's scales of a stage are one word, whole
};

using MxLinearKernel = void(MxArguments);

constexpr int mx_weight_bytes(int weight) {
  return weight == ptx::kMxE2m3 ? six_bytes(kStreamRows) : kStreamRows * kStreamK / (weight == ptx::kMxE4m3 ? 1 : 2);
}
// Weights, tokens, and a word of scales for each row and token.
constexpr int mx_stage_bytes(int weight, int token_tiles) {
  return mx_weight_bytes(weight) + 8 * token_tiles * kStreamK + 4 * (kStreamRows + 8 * token_tiles);
}

using MxLinearChooser = MxLinearKernel*(bool is_bfloat16, int token_tiles);
extern MxLinearChooser* mx_linear_choosers[6];  // weight + 3 input

}  // namespace tersor
