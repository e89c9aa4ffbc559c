// y[m, n] = x[m, k] w[n, k]^T + bias + residual, x and w integers with scales: activations of 4, 6 or 8 bits stored in
// bytes, weights of 2 to 8 bits. Products are integers on the tensor cores (mma.m16n8k32 s8).
//
// LAYOUT. The stored layout of the weights (cpp/cpu/int_layout.h) is the fragment layout, and tokens are stored in the
// same order (tile/act_codes.h): weights are operand A of mma.m16n8k32, tokens are its n.
//
//     lane = (g, c)      rows of a warp (two storage tiles)          tokens
//     g / 4  tile        quad g % 4: rows 0 1 | 2 3 of four          codes[token g, 32 block + 8c .. + 7]: 8 bytes
//     c      k 8c..8c+7  product j = 0: rows 0, 1   j = 1: rows 2, 3 registers 0 (k 0 4 1 5), 1 (k 2 6 3 7)
//     result of product j: rows 2j, 2j + 1 for tokens 2c, 2c + 1: four consecutive features, one store a token
//
// Codes become signed bytes in registers, the sign in the highest bit (tile/lowbit_codes.h): three instructions for
// eight 4-bit codes. A block of 4 warps computes 128 rows x 8 * kTokenTiles tokens in stages of 128 k. int32 sums are
// kept while neither side's scale changes. kGrouped: where a group of either ends, the sum is multiplied by both scales
// in fp32 and added to a total. Otherwise scales are applied once, to the int32 sum of all of k. STREAM-K: all (row
// block, stage) units, cut into equal ranges, one for each block that is resident; partial sums of a row block are
// fp32, or int32 where scales are applied last: then y does not depend on the cut at all. Sums are taken in a fixed
// order: results are the same to the bit in every launch.
//
// ZERO POINTS of weights enter the sums as (middle - zero point) * sum of codes, which the producer of the codes has
// stored for each 32 channels; those of activations (8 bits, not symmetric) as zero point * sum of weights, which one
// more mma by ones adds up.
//
// SHARED MEMORY, bytes: stages x (2048 bits + 1024 kTokenTiles + scales) + 16, scales: where grouped, slots x 128 x
// (scale + zero point) + slots x 32 kTokenTiles, and 64 kTokenTiles with zero points; stages: lowbit_stages(). With
// 4-bit weights, groups of 128 and 16-bit scales: kTokenTiles 1 (4 stages) 38032, 2 42256, 4 50704, 8 67600; with
// scales for whole rows alone 36880, 40976, 49168, 65552, and 16 (3 stages) 73744. The main loop reads and writes it
// without bank conflicts (tile/swizzle.h and int_tile.h prove it, the tests count it).
// REGISTERS: 65536 / (128 x blocks that share a multiprocessor), no spills; what the gate asserts:
// gate: defines TERSOR_BITS=2,3,4,5,6,7,8
// gate: registers 128 where <\d, 1, true>
// gate: registers 168 where <\d, [12],
// gate: registers 255
// gate: wants IMMA.16832.S8.S8 LDGSTS.E.BYPASS LDS.128 LDS.64
// gate: lacks HMMA
//
// FLOORS for 4 bits and up to 8 tokens, a stage (8192 bytes of codes): a lane issues 48 instructions to unpack 128
// codes (W4A16: 176), 8 mma (16), 8 loads from shared memory, about 40 for the scales of a group of 128, and those of
// the pipeline; 390 cycles are what an H200's memory leaves for it (20.8 bytes a cycle and multiprocessor). With 128
// tokens a stage has 128 mma a warp, which sm_80 runs at 8 cycles each: 1024 cycles, beside about 480 instructions for
// the rest. Groups of 32 on either side cost three instructions for each result and 32 k: as many cycles as the
// products. Predictions from counted instructions: nothing here was measured on hardware.
//
// LIMITS. k to 65536 (32768 with zero points on both sides), so that int32 sums cannot wrap; zero points of weights at
// most 2^bits; m to 2^30, n to 2^25. Weights are read again for each 128 tokens (64 where grouped or with
// zero points). mma.sync keeps
// Hopper from its peak for many tokens.
#include "kernels/instances.h"
#include "kernels/sm80_lowbit_linear.h"
#include "kernels/sm80_lowbit_linear_blocks.h"

#include "tile/lowbit_linear.h"

namespace tersor {
namespace {

template <int kBits, int kTokenTiles, bool kGrouped>
__global__ void __launch_bounds__(kStreamThreads, lowbit_blocks(kTokenTiles, kLowbitBytes, kGrouped))
    lowbit_linear(const LowbitLinearArguments arguments) {
  if constexpr (kTokenTiles == 16) {  // never with zero points: the compiler is told, and has their registers
    LowbitLinearArguments a = arguments;
    a.zero_points = nullptr;
    a.act_zero_points = nullptr;
    LowbitLinear<kBits, kTokenTiles, kGrouped, kLowbitBytes>(a).run();
  } else {
    LowbitLinear<kBits, kTokenTiles, kGrouped, kLowbitBytes>(arguments).run();
  }
}

LowbitLinearKernel* choose_kernel(bool grouped, int token_tiles) {
  if (token_tiles == 16) return grouped ? nullptr : lowbit_linear<TERSOR_BITS, 16, false>;
  return instance_for<LowbitLinearKernel>(token_tiles, [&](auto tiles) -> LowbitLinearKernel* {
    constexpr int count = decltype(tiles)::value;
    return grouped ? lowbit_linear<TERSOR_BITS, count, true> : lowbit_linear<TERSOR_BITS, count, false>;
  });
}
const bool entered = (lowbit_linear_choosers[TERSOR_BITS] = choose_kernel, true);

}  // namespace
}  // namespace tersor
