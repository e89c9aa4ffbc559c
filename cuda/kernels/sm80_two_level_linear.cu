// y[m, n] = x[m, k] w[n, k]^T + bias + residual, x integers of 4, 6 or 8 bits with scales, w = (code - zero point) *
// group scale * channel scale with codes of 2 to 6 bits and integer group scales (QServe's progressive groups, arXiv
// 2405.04532). Products are integers on the tensor cores (mma.m16n8k32 s8) over all of k.
//
// LAYOUT, STREAM-K and the pipeline are those of sm80_lowbit_linear.cu, whose tile it derives from
// (tile/two_level_linear.h). Group scales and zero points become part of the weights in registers: with a byte for a
// code, four codes * scale + (128 - zero point * scale) * 0x01010101 is one 32-bit multiply-add, since every byte of
// the result lies in 1 .. 255 and nothing is carried; flipping the highest bits makes signed bytes of it. So no sum
// ends where a weight group does: int32 sums run over all of k with one activation scale a token, else over a group of
// activations (kGrouped), and channel scales come last. Zero points of weights need no sums of codes.
//
// SHARED MEMORY, bytes: stages x (2048 bits + 1024 kTokenTiles + slots x 128 x (1, 2 with zero points) + (kGrouped)
// slots x 32 kTokenTiles) + 16, stages as there. With 4-bit weights in groups of 128 and scales for whole tokens:
// kTokenTiles 1 (4 stages) 37392, 2 41488, 4 49680, 8 66064, 16 (3 stages) 74128; the main loop meets no bank conflict.
// REGISTERS: 65536 / (128 x blocks that share a multiprocessor), no spills; what the gate asserts:
// gate: defines TERSOR_BITS=2,3,4,5,6
// gate: registers 168 where <\d, [12],
// gate: registers 255
// gate: wants IMMA.16832.S8.S8 LDGSTS.E.BYPASS LDS.128 LDS.64
// gate: lacks HMMA
//
// FLOORS for 4 bits and up to 8 tokens, a stage (8192 bytes of codes): a lane issues 112 instructions to make 128
// weights (seven for eight: a shift, two masks, two multiply-adds, two flips), about 20 for a group's scales, 8 mma, 8
// loads from shared memory, and nothing for the ends of groups; with 128 tokens 128 mma a warp are beside about 400
// instructions, of which promoting groups of 128 in fp32 would have added 384. Predictions from counted instructions:
// nothing here was measured on hardware.
//
// LIMITS. k to 65536; |code - zero point| * scale at most 127 for every code that is stored, padding (the middle code)
// included: other weights give other integers, and touch no other memory. m to 2^30, n to 2^25.
#include "kernels/sm80_two_level_linear.h"

#include "kernels/instances.h"
#include "tile/two_level_linear.h"

namespace tersor {
namespace {

template <int kBits, int kTokenTiles, bool kGrouped>
__global__ void __launch_bounds__(kStreamThreads, two_level_blocks(kTokenTiles))
    two_level_linear(const LowbitLinearArguments arguments, const TwoLevelScales scales) {
  LowbitLinearArguments a = arguments;  // the compiler is told what is never there, and has the registers
  a.zero_points = nullptr;
  if constexpr (kTokenTiles == 16) a.act_zero_points = nullptr;
  TwoLevelLinear<kBits, kTokenTiles, kGrouped>(a, scales).run();
}

TwoLevelKernel* choose_kernel(bool grouped, int token_tiles) {
  if (token_tiles == 16) return grouped ? nullptr : two_level_linear<TERSOR_BITS, 16, false>;
  return instance_for<TwoLevelKernel>(token_tiles, [&](auto tiles) -> TwoLevelKernel* {
    constexpr int count = decltype(tiles)::value;
    return grouped ? two_level_linear<TERSOR_BITS, count, true> : two_level_linear<TERSOR_BITS, count, false>;
  });
}
const bool entered = (two_level_choosers[TERSOR_BITS] = choose_kernel, true);

}  // namespace
}  // namespace tersor
