// The 16-bit number types as kernels use them: pairs in one register (low half first), sums in fp32.
#pragma once

#include <cstdint>

#include "ptx/ptx.h"

namespace tersor {

struct Float16 {
  static constexpr bool kIsBFloat16 = false;
  static TERSOR_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_f16(d, a, b);
  }
  static TERSOR_DEVICE uint32_t pack(float low, float high) { return ptx::pack_f16x2(low, high); }
  static TERSOR_DEVICE float low(uint32_t pair) { return ptx::unpack_f16x2(pair)[0]; }
  static TERSOR_DEVICE float high(uint32_t pair) { return ptx::unpack_f16x2(pair)[1]; }
};

struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
  static TERSOR_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_m16n8k16_bf16(d, a, b);
  }
  static TERSOR_DEVICE uint32_t pack(float low, float high) { return ptx::pack_bf16x2(low, high); }
  static TERSOR_DEVICE float low(uint32_t pair) { return ptx::unpack_bf16x2(pair)[0]; }
  static TERSOR_DEVICE float high(uint32_t pair) { return ptx::unpack_bf16x2(pair)[1]; }
};

// Four consecutive numbers at `address` (aligned to their size) as fp32; dtype as in enum tersor_dtype.
// Load: load(T*, address) -> T, for any trivially copyable T; Address: bytes.
template <class Load>
TERSOR_DEVICE void load_four(float (&out)[4], int dtype, const Load& load) {
  if (dtype == 0) {
    const auto values = load(ptx::Vec<float, 4>{});
    for (int i = 0; i < 4; ++i) out[i] = values[i];
  } else {
    const auto pairs = load(ptx::Vec<uint32_t, 2>{});
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = dtype == 1 ? BFloat16::low(pairs[i]) : Float16::low(pairs[i]);
      out[2 * i + 1] = dtype == 1 ? BFloat16::high(pairs[i]) : Float16::high(pairs[i]);
    }
  }
}

}  // namespace tersor
