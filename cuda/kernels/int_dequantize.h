// What the dequantization kernel (int_dequantize.cu) and its launcher (dispatch/int_dequantize.cu) agree on.
#pragma once

#include <cstdint>

namespace tersor {

constexpr int kIntDequantizeThreads = 128;

struct IntDequantizeArguments {
  const uint8_t* qweight;      // [tiles, blocks, 64 * bits]
  const void* scales;          // [tiles, groups, 16]
  const uint8_t* zero_points;  // [tiles, groups, 16] or null
  void* out;                   // [n, k]
  int n, k, blocks, groups, group_blocks;
  int scale_dtype, out_dtype;  // enum tersor_dtype
  int wide_stores;             // rows of out take 16-byte stores
};

using IntDequantizeKernel = void(IntDequantizeArguments);

// The kernel of each number of bits; null for those that were not built.
extern IntDequantizeKernel* int_dequantize_kernels[9];

}  // namespace tersor
