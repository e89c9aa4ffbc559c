// What the kernel for e4m3 activations (sm89_fp8_linear.cu) and its launcher agree on.
#pragma once

#include <cstdint>

#include "tile/row_stream.h"

namespace tersor {

enum Fp8Weight { kFp8Int4 = 0, kFp8E4m3 = 1 };
constexpr int kFp8ScaleE4m3 = 4;  // a kind of scales of int4 beside those of enum tersor_dtype

struct Fp8Arguments {
  RowStream rows;
  const uint8_t* x;       // [m, padded] codes of tile/fp8_codes.h
  const float* x_scales;  // [m, x_groups]
  const uint8_t* codes;   // int4: [tiles, blocks, 256] (cpp/cpu/int_layout.h); e4m3: [n, k]
  const float* scale_multiplier;  // of scales that are e4m3
  const void* scales;     // int4: [tiles, groups, 16]; e4m3: [ceil(n / scale_rows), groups]
  int k, padded, x_groups;
  int tiles, blocks;  // int4: of 16 rows, of 32 k
  int groups, group_blocks, scale_dtype, scale_rows;
  int aligned;  // e4m3: rows start at multiples of 16 bytes
};

using Fp8LinearKernel = void(Fp8Arguments);

constexpr int fp8_weight_bytes(int weight) { return kStreamRows * (weight == kFp8Int4 ? kStreamK / 2 : kStreamK); }
// Weights, tokens, scales of rows for each block of 32 k, scales of tokens.
constexpr int fp8_stage_bytes(int weight, int token_tiles) {
  return fp8_weight_bytes(weight) + 8 * token_tiles * kStreamK + 16 * kStreamRows + 32 * token_tiles;
}

using Fp8LinearChooser = Fp8LinearKernel*(bool is_bfloat16, int token_tiles);
extern Fp8LinearChooser* fp8_linear_choosers[2];

}  // namespace tersor
