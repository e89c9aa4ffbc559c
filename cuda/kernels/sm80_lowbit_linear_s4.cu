// y = x w^T + bias + residual as in sm80_lowbit_linear.cu, with weights of 4 bits and activations of 4 bits stored in
// nibbles, multiplied as they are (mma.m16n8k64 s4); and with blocks of 128 channels of either width (COMET, mixed).
//
// LAYOUT. A dword of the 4-bit plane holds 8 consecutive k of one row in the order in which tokens store theirs: it is
// a register of the fragment once the highest bit of each code is flipped, which makes it code - 8. A product takes two
// blocks of 32 k; tokens are read by ldmatrix, 16 bytes of a token and block, the lane's dword in its register.
// Groups of either side are multiples of 64 k or whole rows. The rest, zero points of weights included, is as there;
// codes of activations that are not symmetric need bytes.
//
// MIXED. A stage's tokens are bytes or nibbles; its products are s8 (weights unpacked to code * 16) or s4 (code).
// Scales of activations cover at most 128 channels, so a sum never meets both. A table has, for each stage, where its
// tokens begin in a row (in 64 bytes) and what the stages before it cost: ranges of stream-K get equal costs, not
// numbers.
//
// sm_80, 86 and 89 alone: later machines run an s4 product as more than a hundred instructions, so the launcher is not
// asked for nibbles there (python/tersor/act_codes.py); the gate sees that it compiles without spills all the same.
// SHARED MEMORY: stages x (8192 + 512 kTokenTiles (1024 mixed) + scales) + 16.
// gate: registers 168 where <[12][,>]
// gate: registers 255
// gate: wants IMMA LDSM LDGSTS.E.BYPASS LDS.128
// gate: lacks HMMA
//
// FLOORS: with 128 tokens a stage has 64 mma of s4 a warp, half of s8's time. Nothing here was measured on hardware.
// LIMITS: those of sm80_lowbit_linear.cu.
#include "kernels/instances.h"
#include "kernels/sm80_lowbit_linear.h"
#include "kernels/sm80_lowbit_linear_blocks.h"

#include "tile/lowbit_linear.h"

namespace tersor {
namespace {

template <int kTokenTiles, bool kGrouped>
__global__ void __launch_bounds__(kStreamThreads, lowbit_blocks(kTokenTiles, kLowbitNibbles, kGrouped))
    lowbit_linear_nibbles(const LowbitLinearArguments arguments) {
  if constexpr (kTokenTiles == 16) {  // never with zero points, as there
    LowbitLinearArguments a = arguments;
    a.zero_points = nullptr;
    a.act_zero_points = nullptr;
    LowbitLinear<4, kTokenTiles, kGrouped, kLowbitNibbles>(a).run();
  } else {
    LowbitLinear<4, kTokenTiles, kGrouped, kLowbitNibbles>(arguments).run();
  }
}

template <int kTokenTiles>
__global__ void __launch_bounds__(kStreamThreads, lowbit_blocks(kTokenTiles, kLowbitMixed, true))
    lowbit_linear_mixed(const LowbitLinearArguments arguments) {
  LowbitLinear<4, kTokenTiles, true, kLowbitMixed>(arguments).run();
}

LowbitLinearKernel* choose_nibbles(bool grouped, int token_tiles) {
  if (token_tiles == 16) return grouped ? nullptr : lowbit_linear_nibbles<16, false>;
  return instance_for<LowbitLinearKernel>(token_tiles, [&](auto tiles) -> LowbitLinearKernel* {
    constexpr int count = decltype(tiles)::value;
    return grouped ? lowbit_linear_nibbles<count, true> : lowbit_linear_nibbles<count, false>;
  });
}

LowbitLinearKernel* choose_mixed(bool grouped, int token_tiles) {
  if (!grouped) return nullptr;
  return instance_for<LowbitLinearKernel>(
      token_tiles, [](auto tiles) -> LowbitLinearKernel* { return lowbit_linear_mixed<decltype(tiles)::value>; });
}
const bool entered = (lowbit_linear_nibble_choosers[kLowbitNibbles] = choose_nibbles,
                      lowbit_linear_nibble_choosers[kLowbitMixed] = choose_mixed, true);

}  // namespace
}  // namespace tersor
