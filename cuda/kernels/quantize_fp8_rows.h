// What the kernel that rounds activations to e4m3 (quantize_fp8_rows.cu) and its launcher agree on.
#pragma once

#include <cstdint>

namespace tersor {

constexpr int kFp8RowThreads = 128;
constexpr int kFp8Group = 128;  // channels that share a scale where tokens have several

struct Fp8Rows {
  const void* x;     // [m, ldx]
  uint8_t* codes;    // [m, padded]
  float* scales;     // [m, groups]
  void* values;      // [m, k] of x's type instead of codes and scales, or null
  const float* top;  // the largest magnitude that all tokens share, or null
  int64_t ldx;
  int k, padded, groups;  // groups: 1, or ceil(k / 128)
  int interleaved;        // the order of channels is that of 4-bit weights
  int aligned, aligned_values;  // rows of x, of values, start at multiples of 16 bytes
};

using Fp8RowsKernel = void(Fp8Rows);
Fp8RowsKernel* fp8_rows_kernel(int dtype);  // as in enum tersor_dtype

}  // namespace tersor
