// Warp-wide products of e2m1 under scales of blocks, on sm_120a alone. Fragments are those of matrix.h with eight
// elements in a register (K = 64). Scales belong to blocks of consecutive k: the lowest byte of a word to the first.
// Lanes 4g and 4g + 1 hold the words of rows g and g + 8 of A, lane 4g the word of column g of B; the instruction asks
// no other lane (its selectors of thread and byte are 0).
#pragma once

#include "ptx/matrix.h"

#if defined(TERSOR_EMULATION)
#include "emulation/matrix_float.h"
#endif

namespace tersor {
namespace ptx {

// MXFP4: two blocks of 32, bytes 0 and 1 of a word; a scale is 2^(byte - 127).
TERSOR_PTX void mma_m16n8k64_mxf4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scale_a,
                                  uint32_t scale_b) {
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::FloatMma::m16n8k64_mxf4, d, a, b, scale_a, scale_b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, %10, {0, 0}, %11, {0, 0};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b));
#endif
}

// NVFP4: four blocks of 16; a scale is the e4m3 number of a byte, without sign.
TERSOR_PTX void mma_m16n8k64_nvf4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scale_a,
                                  uint32_t scale_b) {
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::FloatMma::m16n8k64_nvf4, d, a, b, scale_a, scale_b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3}, %10, {0, 0}, %11, {0, 0};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b));
#endif
}

}  // namespace ptx
}  // namespace tersor
