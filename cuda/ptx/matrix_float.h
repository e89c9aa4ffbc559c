// Warp-wide products of 8-bit floats, on machines from sm_89 on. Not part of ptx.h: few kernels want them. Fragments
// are those of matrix.h with four elements in a register.
#pragma once

#include "ptx/matrix.h"

#if defined(TERSOR_EMULATION)
#include "emulation/matrix_float.h"
#endif

namespace tersor {
namespace ptx {

// Products of two e4m3 are exact; the machine's own sums within one instruction may keep fewer bits than float32.
TERSOR_PTX void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::FloatMma::m16n8k32_e4m3, d, a, b, 0, 0);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace ptx
}  // namespace tersor
