// Blocks of sm80_lowbit_linear.cu and sm80_lowbit_linear_s4.cu that should share a multiprocessor: the launch bounds of
// each instance, and what the launcher counts on.
#pragma once

#include "kernels/sm80_lowbit_linear.h"

namespace tersor {

// Without groups the loop over a stage is one block of instructions, which spills a little with 128 registers.
constexpr int lowbit_blocks(int token_tiles, int width, bool grouped) {
  return token_tiles == 1 && !grouped ? 3 : lowbit_blocks_per_multiprocessor(token_tiles, width);
}

// The most token tiles of an instance: 128 tokens leave no registers for totals, nor for the sums of zero points.
constexpr int lowbit_most_token_tiles(bool grouped, bool any_zero_points) {
  return grouped || any_zero_points ? 8 : 16;
}

}  // namespace tersor
