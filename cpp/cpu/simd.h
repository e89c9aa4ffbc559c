// Sixteen lanes, one per row of a tile, with the same operations for every instruction set. Each header
// puts its types and functions in the namespace of the instruction set being compiled.
//
//   f32, i32            16 lanes of float and of 32-bit patterns
//   load_i32 store_i32 load store zero splat splat_i32
//   srl<n> sll<n> and_(v, constant) or_   on i32
//   to_f32 (signed)  fma(a, b, c) = a*b + c  mul add sub
//   load_as(pointer, dtype)      16 values of a dtype
//   load_u8(pointer)             16 bytes as floats
//   store_as(pointer, dtype, v, count)   rounded to nearest even; only the first `count` lanes
//   as_f32(i32)                  the same bits
//   lookup_f32<bits>(table, i)   entry i of a table of 16 floats that repeats after 2^bits (2, 3, 4)
//   reduce_add(v)                sum of the lanes, always in the same order
//   kFusedRows, kPanelRows, kPanelTiles, kChains   register blocking that fits this set
//   Native, native_*             one hardware register, for the peak loops
//   TERSOR_SIMD_BF16             defined when pairs of bfloat16 can be multiplied: dot_bf16(acc, a, b)
#pragma once

#include TERSOR_SIMD_HEADER
