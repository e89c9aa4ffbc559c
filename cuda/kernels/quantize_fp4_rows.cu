// Activations rounded in groups of a row: MXFP4, MXFP6 (e2m3), MXFP8 (32 channels under a power of two), NVFP4 (16
// under e4m3).
//
// Out come the codes and scales that sm120_fp4_linear.cu (e2m1) or sm120_mx_linear.cu multiply, or the rounded numbers
// in x's type, for products in 16 bits. A block of 128 threads takes a token and reads it once; a thread takes eight
// channels, 16 or 32 contiguous bytes, and stores 4 or 8 bytes of codes; two or four lanes share a group and exchange
// its largest magnitude.
// What is computed is what ops_round.float_round says, each step rounded once:
//     power of two   exponent of the largest, one more from 1.75 on (e2m3: 1.9375), less that of the element's largest;
//                    -126 to 127
//     e4m3           e4m3(largest / 6 * global), at least 2^-9, over global
// A group with NaN or Inf has the scale NaN (255; e4m3: 127) and codes 0. Behind k, up to a multiple of 128, codes and
// scales are zero numbers. Rounded numbers beyond the largest of x's type (float16 60000 gives 65536) become
// that; codes hold them as they are.
//
// gate: registers 64
// gate: lacks HMMA
//
// FLOORS. k = 4096 in bf16 brings 8 KB and takes 2.3 or 4.2 KB (codes) or 8 KB (numbers) for a token. Nothing here was
// measured on hardware. LIMITS. As in quantize_fp8_rows.cu: rows that do not start at multiples of 16 bytes are slower.
#include "kernels/quantize_fp4_rows.h"

#include "tile/fp8_codes.h"
#include "tile/row_numbers.h"
#include "tile/six_bits.h"

namespace tersor {
namespace {

struct Scale {
  uint32_t code;
  float value;  // what a number is divided by; NaN for a group that is not finite
};

template <int kKind>
TERSOR_DEVICE Scale scale_of(uint32_t top, float global) {
  constexpr int element_exponent = kKind == kMxfp8 ? 8 : 2;  // of the largest element's
  const float nan = ptx::bits_to_float(0x7fc00000);
  if constexpr (kKind == kNvfp4) {
    if (top >= kInfinity) return {127, nan};
    const float wanted = ptx::bits_to_float(top) / 6.0f * global;
    uint32_t code = e4m3_code(wanted > 448.0f ? 448.0f : wanted);
    if (code == 0) code = 1;
    return {code, e4m3_value(code) / global};
  } else {
    if (top >= kInfinity) return {255, nan};
    // Mantissas from here on would round beyond the element's last binade. Below 2^-124 all have the least exponent.
    constexpr uint32_t up = kKind == kMxfp6 ? 0x780000 : 0x600000;
    int code = static_cast<int>(top >> 23) + ((top & 0x7fffff) >= up ? 1 : 0) - element_exponent;
    if (code < 1) code = 1;
    return {static_cast<uint32_t>(code), ptx::bits_to_float(static_cast<uint32_t>(code) << 23)};
  }
}

template <class Type>
constexpr float kMost = 65504.0f;  // of float16
template <>
constexpr float kMost<BFloat16> = 0x1.fep127f;
template <>
constexpr float kMost<Float32> = 0x1.fffffep127f;

template <class Type, int kKind>
__global__ void __launch_bounds__(kFp4RowThreads) quantize_fp4_rows(const BlockRows a) {
  constexpr int group = kKind == kNvfp4 ? 16 : 32, lanes = group / 8;
  constexpr float limit = kKind == kMxfp8 ? 448.0f : kKind == kMxfp6 ? 7.5f : 6.0f;
  constexpr bool bytes = kKind == kMxfp8 || kKind == kMxfp6;
  const int64_t row = blockIdx.x;
  const char* source = static_cast<const char*>(a.x) + row * a.ldx * RowNumbers<Type>::kBytes;
  const float global = kKind == kNvfp4 ? ptx::load_global_constant(a.global) : 1.0f;
  constexpr int step = 8 * kFp4RowThreads;
  for (int first = 0; first < a.padded; first += step) {
    const int channel = first + 8 * threadIdx.x;
    float x[8];
    load_channels<Type>(source, channel, a.k, a.aligned != 0, x);
    uint32_t top = largest_of(x);
#pragma unroll
    for (int mask = lanes / 2; mask > 0; mask /= 2) top = larger(top, ptx::shuffle_xor(top, mask));
    if (channel >= a.padded) continue;
    const Scale scale = scale_of<kKind>(top, global);
    uint32_t words[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float ratio = x[i] / scale.value, inside = ratio > limit ? limit : ratio < -limit ? -limit : ratio;
      const bool finite = scale.value == scale.value;
      if constexpr (bytes) {
        const uint32_t code = !finite ? 0 : kKind == kMxfp8 ? e4m3_code(inside) : e2m3_code(inside);
        words[i / 4] |= code << (8 * (i % 4));
        x[i] = (kKind == kMxfp8 ? e4m3_value(code) : e2m3_value(code)) * scale.value;
      } else {
        const uint32_t code = finite ? e2m1_code(inside) : 0;
        words[0] |= code << (4 * i);
        x[i] = e2m1_value(code) * scale.value;
      }
    }
    if (a.values != nullptr) {
#pragma unroll
      for (float& value : x) value = value > kMost<Type> ? kMost<Type> : value < -kMost<Type> ? -kMost<Type> : value;
      char* to = static_cast<char*>(a.values) + row * a.k * RowNumbers<Type>::kBytes;
      store_channels<Type>(to, channel, a.k, a.aligned_values != 0, x);
    } else {
      if constexpr (bytes) {
        ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(a.codes + row * a.padded + channel),
                          ptx::Vec<uint32_t, 2>{{words[0], words[1]}});
      } else {
        ptx::store_global(reinterpret_cast<uint32_t*>(a.codes + row * (a.padded / 2) + channel / 2), words[0]);
      }
      if (channel % group == 0) {
        ptx::store_global(a.scales + row * (a.padded / group) + channel / group,
                          static_cast<uint8_t>(channel < a.k ? scale.code : 0));
      }
    }
  }
}

template <class Type>
BlockRowsKernel* choose(int kind) {
  return kind == kMxfp4   ? quantize_fp4_rows<Type, kMxfp4>
         : kind == kNvfp4 ? quantize_fp4_rows<Type, kNvfp4>
         : kind == kMxfp8 ? quantize_fp4_rows<Type, kMxfp8>
                          : quantize_fp4_rows<Type, kMxfp6>;
}

}  // namespace

BlockRowsKernel* block_rows_kernel(int kind, int dtype) {
  return dtype == 0 ? choose<Float32>(kind) : dtype == 1 ? choose<BFloat16>(kind) : choose<Float16>(kind);
}

}  // namespace tersor
