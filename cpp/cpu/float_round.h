// Activations rounded to small floats, in one function for each instruction set.
#pragma once

#include "cpu/float_linear.h"

namespace tersor {

// Scales that groups of a row are divided by: their largest magnitude over e4m3's largest; that of the whole input; a
// power of two; e4m3 under one number for the whole input (NVFP4).
enum RoundScale { kRoundLargest = 0, kRoundWhole = 1, kRoundPower = 2, kRoundE4m3 = 3 };

// y = element(x / scale) * scale for rows of k values of one dtype; rows, k >= 1, group a multiple of 16, or k and
// more. With `steps`, x goes through their norm or gate, permutation, signs and products before that (row_transform.h),
// in fp32. A group with a number that the dtype cannot hold is NaN; what rounding brings beyond its largest number
// becomes that.
struct FloatRoundArgs {
  const void* x;
  void* y;
  int dtype;
  int64_t rows, k, ldx;  // y lies without gaps
  int element, scale;
  int64_t group;
  int threads;
  const tersor_input* steps;  // null: none
};

namespace generic { int float_round(const FloatRoundArgs& arguments); }
namespace avx2 { int float_round(const FloatRoundArgs& arguments); }
namespace avx512 { int float_round(const FloatRoundArgs& arguments); }
namespace avx512_emulated { int float_round(const FloatRoundArgs& arguments); }

}  // namespace tersor

extern "C" int tersor_float_round(const tersor::FloatRoundArgs* arguments);
