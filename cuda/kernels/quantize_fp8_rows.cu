// Activations rounded to e4m3: codes and scales of tile/fp8_codes.h from x [m, k] in bf16, fp16 or fp32, or the rounded
// numbers (codes times scales) in x's type, for products that take 16 bits.
//
// A block of 128 threads takes a token; a thread takes eight channels at a time, 16 or 32 contiguous bytes, and stores
// their codes as 8. With a scale for each 128 channels 16 lanes share one and x is read once; with one for a token the
// block finds the largest magnitude first, and reads the row again (from L1 or L2). Magnitudes are compared as bits:
// NaN is above infinity, and infinity above all numbers, so the largest says whether the row is finite.
// scale = max(largest / 448, 2^-126), code = e4m3(x / scale), each rounded once: what ops_round.float_round says.
//
// gate: registers 64
// gate: lacks HMMA
//
// FLOORS. k = 4096 in bf16 brings 8 KB and takes 4 KB and 4 bytes: 12 KB for a token, 2.6 us for 1024 tokens of an
// H200's memory. Nothing here was measured on hardware.
// LIMITS. Rows of x that do not start at multiples of 16 bytes are read number by number, as are the last k % 8.
#include "kernels/quantize_fp8_rows.h"

#include "tile/fp8_codes.h"
#include "tile/row_numbers.h"

namespace tersor {
namespace {

// NaN where the group is not finite.
TERSOR_DEVICE float scale_of(uint32_t group_top, uint32_t top) {
  if (group_top >= kInfinity) return ptx::bits_to_float(0x7fc00000);
  const float scale = ptx::bits_to_float(top) / 448.0f, least = 0x1p-126f;
  return scale < least ? least : scale;
}

// The codes of eight channels, or, where the rounded numbers are wanted, codes times scale.
template <class Type>
TERSOR_DEVICE void store_codes(const Fp8Rows& a, int64_t row, int channel, float (&x)[8], float scale) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float ratio = x[i] / scale, inside = ratio > 448.0f ? 448.0f : ratio < -448.0f ? -448.0f : ratio;
    const uint32_t code = scale == scale ? e4m3_code(inside) : 0;
    const int at = a.interleaved ? 2 * (i % 4) + i / 4 : i;
    words[0] |= at < 4 ? code << (8 * (at % 4)) : 0;
    words[1] |= at < 4 ? 0 : code << (8 * (at % 4));
    x[i] = e4m3_value(code) * scale;
  }
  if (a.values != nullptr) {
    char* to = static_cast<char*>(a.values) + row * a.k * RowNumbers<Type>::kBytes;
    store_channels<Type>(to, channel, a.k, a.aligned_values != 0, x);
    return;
  }
  ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(a.codes + row * a.padded + channel),
                    ptx::Vec<uint32_t, 2>{{words[0], words[1]}});
}

template <class Type>
__global__ void __launch_bounds__(kFp8RowThreads) quantize_fp8_rows(const Fp8Rows a) {
  constexpr int step = 8 * kFp8RowThreads;
  const int thread = threadIdx.x, lane = thread % 32;
  const int64_t row = blockIdx.x;
  const char* source = static_cast<const char*>(a.x) + row * a.ldx * RowNumbers<Type>::kBytes;
  const int rounds = (a.padded + step - 1) / step;
  float x[8];
  if (a.groups > 1) {
    for (int i = 0; i < rounds; ++i) {
      const int channel = i * step + 8 * thread;
      load_channels<Type>(source, channel, a.k, a.aligned != 0, x);
      uint32_t top = largest_of(x);
      for (int mask = 8; mask > 0; mask /= 2) top = larger(top, ptx::shuffle_xor(top, mask));
      if (channel >= a.padded) continue;
      const float scale = scale_of(top, top);
      store_codes<Type>(a, row, channel, x, scale);
      if (lane % 16 == 0 && a.scales != nullptr) {
        ptx::store_global(a.scales + row * a.groups + channel / kFp8Group, scale);
      }
    }
    return;
  }
  uint32_t top = 0;
  for (int i = 0; i < rounds; ++i) {
    load_channels<Type>(source, i * step + 8 * thread, a.k, a.aligned != 0, x);
    top = larger(top, largest_of(x));
  }
  for (int mask = 16; mask > 0; mask /= 2) top = larger(top, ptx::shuffle_xor(top, mask));
  const ptx::shared_t shared = ptx::dynamic_shared();
  if (lane == 0) ptx::store_shared(shared + 4 * (thread / 32), top);
  ptx::barrier();
  for (int warp = 0; warp < kFp8RowThreads / 32; ++warp) {
    top = larger(top, ptx::load_shared<uint32_t>(shared + 4 * warp));
  }
  const float scale = scale_of(top, a.top ? ptx::float_to_bits(ptx::load_global_constant(a.top)) : top);
  if (thread == 0 && a.scales != nullptr) ptx::store_global(a.scales + row, scale);
  for (int i = 0; i < rounds; ++i) {
    const int channel = i * step + 8 * thread;
    if (channel >= a.padded) break;
    load_channels<Type>(source, channel, a.k, a.aligned != 0, x);
    store_codes<Type>(a, row, channel, x, scale);
  }
}

}  // namespace

Fp8RowsKernel* fp8_rows_kernel(int dtype) {
  return dtype == 0   ? quantize_fp8_rows<Float32>
         : dtype == 1 ? quantize_fp8_rows<BFloat16>
                      : quantize_fp8_rows<Float16>;
}

}  // namespace tersor
