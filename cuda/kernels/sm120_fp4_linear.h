// What the kernel for e2m1 activations and weights (sm120_fp4_linear.cu) and its launcher agree on.
#pragma once

#include <cstdint>

#include "tile/row_stream.h"

namespace tersor {

struct Fp4Arguments {
  RowStream rows;
  const uint8_t* x;         // [m, padded / 2]
  const uint8_t* x_scales;  // [m, padded / group]
  const uint8_t* codes;     // [n, row_bytes]
  const uint8_t* scales;    // [n, groups]
  const float* x_global;    // NVFP4: what divides the scales of x, and of the weights
  const float* global;
  int64_t row_bytes;
  int padded, groups;
  int aligned;         // rows of codes start at multiples of 16 bytes
  int aligned_scales;  // a row's scales of a stage are one word or two, whole
};

using Fp4LinearKernel = void(Fp4Arguments);

// A group is 32 (MXFP4) or 16 (NVFP4) channels; its scales of a row and stage are 4 or 8 bytes.
constexpr int fp4_scale_bytes(bool nv) { return nv ? 8 : 4; }
constexpr int fp4_stage_bytes(bool nv, int token_tiles) {
  return (kStreamRows + 8 * token_tiles) * (kStreamK / 2 + fp4_scale_bytes(nv));
}

using Fp4LinearChooser = Fp4LinearKernel*(bool is_bfloat16, int token_tiles);
extern Fp4LinearChooser* fp4_linear_choosers[2];  // MXFP4, NVFP4

}  // namespace tersor
