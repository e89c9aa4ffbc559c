// What the kernel that rounds activations in small groups (quantize_fp4_rows.cu) and its launcher agree on.
#pragma once

#include <cstdint>

namespace tersor {

constexpr int kFp4RowThreads = 128;

enum BlockFloat { kMxfp4 = 0, kNvfp4 = 1, kMxfp8 = 2, kMxfp6 = 3 };

struct BlockRows {
  const void* x;       // [m, ldx]
  uint8_t* codes;      // [m, padded / 2], two of e2m1 in a byte, the low one first; others [m, padded], a byte each
  uint8_t* scales;     // [m, padded / group]: exponents with a bias of 127, or e4m3 (NVFP4)
  void* values;        // [m, k] of x's type instead of codes and scales, or null
  const float* global; // NVFP4: what scales were multiplied by
  int64_t ldx;
  int k, padded;
  int aligned, aligned_values;  // rows of x, of values, start at multiples of 16 bytes
};

using BlockRowsKernel = void(BlockRows);
BlockRowsKernel* block_rows_kernel(int kind, int dtype);  // dtype as in enum tersor_dtype

}  // namespace tersor
