// Products with weights of small floats, decoded in registers: one function for each instruction set.
#pragma once

#include "cpu/isa.h"

namespace tersor {

// Values of a code: e4m3 in a byte, e2m1 in four bits or e2m3 in six, dense, the low bits first.
enum FloatElement { kE4m3 = 0, kE2m1 = 1, kE2m3 = 2 };
constexpr int element_bits(int element) { return element == kE4m3 ? 8 : element == kE2m1 ? 4 : 6; }
// Scales: a float (tersor_dtype), the exponent of a power of two with a bias of 127, or e4m3.
enum FloatScale { kScaleE8m0 = 3, kScaleE4m3 = 4 };

// w[n, k] = value * scale, rows [n][bytes of k]; scales [n / scale_rows][k / group], rounded up. `global` divides the
// scales. m may be 0 for decoding alone; else y = x w^T + bias. After validation: n, k >= 1.
struct FloatLinearArgs {
  const void* x;
  int x_dtype;
  int64_t m, k, ldx;
  const uint8_t* codes;
  int element;
  const void* scales;
  int scale_kind;
  int64_t scale_rows, group;  // group: a multiple of 16
  float global;
  const void* bias;
  void* y;
  int64_t n, ldy;
  int threads;
};

#define TERSOR_DECLARE_FLOAT(name)                     \
  namespace name {                                     \
  int float_linear(const FloatLinearArgs& arguments);  \
  int float_dequantize(const FloatLinearArgs& arguments, float* out); \
  }
TERSOR_DECLARE_FLOAT(generic)
TERSOR_DECLARE_FLOAT(avx2)
TERSOR_DECLARE_FLOAT(avx512)
TERSOR_DECLARE_FLOAT(avx512_emulated)
#undef TERSOR_DECLARE_FLOAT

}  // namespace tersor

extern "C" {
// Checked from sizes here; the pointers are the caller's.
int tersor_float_linear(const tersor::FloatLinearArgs* arguments);
int tersor_float_dequantize(const tersor::FloatLinearArgs* arguments, float* out);
}
