// Dot products of unsigned weight codes with signed int8 activations, for the instruction set of simd.h.
//
// Int8Dot<kind> multiplies vectors of 16 dwords, four codes of one output row in each dword, by the four
// activations of one dword, the same for every row. dot_kind(bits) is the widest code that is multiplied in
// the same way:
//   words, parts   an activation block of 32 values takes `words` dwords; its eight vectors are summed
//                  in `parts` runs of 8/parts vectors, each starting from a correction of its own
//   pack(low, high, centre, block)   32 quantized values -> `words` dwords, `parts` corrections; their sum
//   Weights weights(bytes)               16 dwords of codes, ready to be multiplied
//   Activation activation(block, t)      what belongs to vector t, in every lane
//   start(correction)                    a sum that begins
//   step(acc, w, x)                      acc + the four products
//   widen(acc)                           the sum of a run as a 32-bit integer per lane
//   widen(acc, pairs(scales))            with scales_runs the same times an integer of the lane, at no cost; else
//                                        the same
// The corrections take centre = 2^(bits-1) times the activations off, so that a run is exactly
// sum((code - centre) * x). Where lanes accumulate in 16 bits, additions wrap around; as each complete run
// stays below 2^15 in size (centre * 127 * terms <= 32512) the wrapped sum is the true one. That is twice the
// depth that sums of plain codes would allow.
//
// For the quantization:
//   magnitude(v)           the bits of |v|: ordered as integers, with NaN above infinity
//   max_i32, reduce_max    of such bits
//   add_i32, mul_i32       of integers, modulo 2^32; load_u8_i32(p): 16 bytes as such
//   div(a, b)              rounded correctly
//   limit(v, low, high)    of numbers; NaN gives any of the three
//   round_within(v, low, high)   limited, then to the nearest even integer
//   round_to_codes(v)      the same for -127..127
//   float_bits(v)          the bits of v
//
// Blocking: kA8DecodeRows rows x one tile for few rows, else strips of kA8PanelRows rows x kA8PanelTiles
// tiles; up to a8_decode_strips(bits) strips decode the codes each for themselves, more share unpacked bytes.
// Exact 16-bit activations go as limbs where a call has at most kLimbRows of them and kLimbBits bits or fewer.
#pragma once

#include "cpu/simd.h"

namespace tersor::TERSOR_ISA {

// How many vectors of a block one run of 16-bit sums may take.
constexpr int run_length_16(int bits) { return bits <= 5 ? 8 : bits == 6 ? 4 : bits == 7 ? 2 : 1; }
constexpr bool fits_16(int bits) { return (1 << (bits - 1)) * 127 * 2 * run_length_16(bits) < 32768; }
static_assert(fits_16(5) && fits_16(6) && fits_16(7) && fits_16(8), "a vector adds two products to each 16-bit lane");

// Two 16-bit numbers in one dword; each may wrap around.
static inline uint32_t pack_pair(int low, int high) {
  return (static_cast<uint32_t>(low) & 0xffff) | (static_cast<uint32_t>(high) << 16);
}

}  // namespace tersor::TERSOR_ISA

// Operations that the microkernels unroll: inlined, but for the emulation, whose code would grow too large.
#if defined(TERSOR_EMULATED)
#define TERSOR_A8_INLINE static __attribute__((noinline))
#else
#define TERSOR_A8_INLINE TERSOR_INLINE
#endif

// Each header of simd.h is known by a name that only it defines.
#if defined(TERSOR_SIMD_BF16)
#include "cpu/simd_int8_avx512.h"
#elif defined(TERSOR_LANES)
#include "cpu/simd_int8_generic.h"
#else
#include "cpu/simd_int8_avx2.h"
#endif

namespace tersor::TERSOR_ISA {

TERSOR_INLINE i32 round_to_codes(f32 x) { return round_within(x, -127.0f, 127.0f); }

}  // namespace tersor::TERSOR_ISA
