// Warp-wide products of e4m3, e2m3 and e2m1 in any mixture under power-of-two scales of 32 k, on sm_120a alone.
// Fragments are those of matrix.h with four elements in a register, a byte each: six bits at the bottom of theirs, four
// bits in the middle (0b00xxxx00), zeros beside them. Lanes 4g and 4g + 1 hold the words of scales of rows g and g + 8
// of A, lane 4g that of column g of B; `block` is the byte of both words that counts, 2^(byte - 127).
#pragma once

#include "ptx/matrix.h"

#if defined(TERSOR_EMULATION)
#include "emulation/matrix_float.h"
#endif

namespace tersor {
namespace ptx {

enum MxElement { kMxE4m3 = 0, kMxE2m3 = 1, kMxE2m1 = 2 };

#define TERSOR_MX_PRODUCT(of_a, of_b)                                                                               \
  asm volatile(                                                                                                     \
      "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32." of_a "." of_b ".f32.ue8m0 " \
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, %10, {%12, 0}, %11, {%12, 0};"                         \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b), "n"(block))

// of_b: e4m3 or e2m3.
template <int of_a, int of_b, int block>
TERSOR_PTX void mma_m16n8k32_mx(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scale_a,
                                uint32_t scale_b) {
  static_assert(block >= 0 && block < 4 && (of_b == kMxE4m3 || of_b == kMxE2m3), "see above");
#if defined(TERSOR_EMULATION)
  constexpr int first = static_cast<int>(emulation::FloatMma::m16n8k32_mx_e4m3_e4m3);
  emulation::mma(static_cast<emulation::FloatMma>(first + 3 * of_b + of_a), d, a, b, scale_a >> (8 * block),
                 scale_b >> (8 * block));
#else
  if constexpr (of_a == kMxE4m3 && of_b == kMxE4m3) TERSOR_MX_PRODUCT("e4m3", "e4m3");
  if constexpr (of_a == kMxE2m3 && of_b == kMxE4m3) TERSOR_MX_PRODUCT("e2m3", "e4m3");
  if constexpr (of_a == kMxE2m1 && of_b == kMxE4m3) TERSOR_MX_PRODUCT("e2m1", "e4m3");
  if constexpr (of_a == kMxE4m3 && of_b == kMxE2m3) TERSOR_MX_PRODUCT("e4m3", "e2m3");
  if constexpr (of_a == kMxE2m3 && of_b == kMxE2m3) TERSOR_MX_PRODUCT("e2m3", "e2m3");
  if constexpr (of_a == kMxE2m1 && of_b == kMxE2m3) TERSOR_MX_PRODUCT("e2m1", "e2m3");
#endif
}
#undef TERSOR_MX_PRODUCT

}  // namespace ptx
}  // namespace tersor
