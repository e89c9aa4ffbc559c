// Warp-wide matrix instructions. Fragments are as in the PTX ISA; with g = lane / 4 and t = lane % 4:
//   D (16 x 8):   d[0], d[1] are row g, columns 2t, 2t + 1; d[2], d[3] the same of row g + 8.
//   A (16 x K):   with e elements in a register, a[0] is row g, columns et to et + e - 1; a[1] row g + 8;
//                 a[2], a[3] the same K / 2 columns on.
//   B (K x 8):    b[0] is column g, rows et to et + e - 1; b[j] the same 4ej rows on.
// Each adds A * B to d. Floating products are exact and summed in float32 (the order and the rounding of
// that sum are the machine's own: compare with a tolerance); integer sums wrap at 32 bits.
#pragma once

#include "ptx/memory.h"

namespace tersor {
namespace ptx {

TERSOR_PTX void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::Mma::m16n8k16_f16, d, a, b, 0, 0);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

TERSOR_PTX void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::Mma::m16n8k16_bf16, d, a, b, 0, 0);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

TERSOR_PTX void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::Mma::m16n8k32_s8, d, a, b, 0, 0);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Native on sm_80 to sm_89; later machines run it as many instructions.
TERSOR_PTX void mma_m16n8k64_s4(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::Mma::m16n8k64_s4, d, a, b, 0, 0);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += number of common one bits. Native up to sm_90a.
TERSOR_PTX void mma_m16n8k256_b1(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::Mma::m16n8k256_b1, d, a, b, 0, 0);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Sparse A: of every four consecutive columns two are stored, in order, and metadata holds their indices
// (two bits each, the lower first, strictly ascending within a four). A's registers are those of the dense
// shape with half the columns.
// selector 0: lanes 4i, 4i + 1 hold the metadata; 1: lanes 4i + 2, 4i + 3.
template <int selector>
TERSOR_PTX void mma_sp_m16n8k32_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(selector == 0 || selector == 1, "two of a quad's lanes hold the metadata");
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::Mma::sp_m16n8k32_f16, d, a, b, metadata, selector);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(selector));
#endif
}

template <int selector>
TERSOR_PTX void mma_sp_m16n8k32_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(selector == 0 || selector == 1, "two of a quad's lanes hold the metadata");
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::Mma::sp_m16n8k32_bf16, d, a, b, metadata, selector);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(selector));
#endif
}

// All lanes hold metadata: the selector is always 0.
TERSOR_PTX void mma_sp_m16n8k64_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
#if defined(TERSOR_EMULATION)
  emulation::mma(emulation::Mma::sp_m16n8k64_s8, d, a, b, metadata, 0);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
#endif
}

// ldmatrix: 8 x 8 matrices of 16-bit elements. Lane 8i + r gives the address of row r (16 bytes, aligned) of
// matrix i; the other lanes' addresses are ignored. Lane l receives in r[i] columns 2(l % 4) and + 1 of row
// l / 4 of matrix i; transposed: rows 2(l % 4) and + 1 of column l / 4.
TERSOR_PTX void ldmatrix_x1(uint32_t (&r)[1], shared_t row_address) {
#if defined(TERSOR_EMULATION)
  emulation::load_matrix(r, 1, row_address, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(row_address));
#endif
}

TERSOR_PTX void ldmatrix_x2(uint32_t (&r)[2], shared_t row_address) {
#if defined(TERSOR_EMULATION)
  emulation::load_matrix(r, 2, row_address, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row_address));
#endif
}

TERSOR_PTX void ldmatrix_x4(uint32_t (&r)[4], shared_t row_address) {
#if defined(TERSOR_EMULATION)
  emulation::load_matrix(r, 4, row_address, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address));
#endif
}

TERSOR_PTX void ldmatrix_x1_transposed(uint32_t (&r)[1], shared_t row_address) {
#if defined(TERSOR_EMULATION)
  emulation::load_matrix(r, 1, row_address, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(row_address));
#endif
}

TERSOR_PTX void ldmatrix_x2_transposed(uint32_t (&r)[2], shared_t row_address) {
#if defined(TERSOR_EMULATION)
  emulation::load_matrix(r, 2, row_address, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row_address));
#endif
}

TERSOR_PTX void ldmatrix_x4_transposed(uint32_t (&r)[4], shared_t row_address) {
#if defined(TERSOR_EMULATION)
  emulation::load_matrix(r, 4, row_address, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address));
#endif
}

}  // namespace ptx
}  // namespace tersor
