// What sm80_two_level_linear.cu and the launcher (dispatch/lowbit_linear.cu) agree on, beside sm80_lowbit_linear.h.
#pragma once

#include "kernels/sm80_lowbit_linear.h"
#include "kernels/sm80_lowbit_linear_blocks.h"

namespace tersor {

constexpr int kTwoLevelMostBits = 6;

// Group scales of the weights; LowbitLinearArguments has neither scales nor zero points nor sums then, and one group.
struct TwoLevelScales {
  const uint8_t* scales;       // [tiles, groups + 4, 16]: group scales, then 16 channel scales in fp32
  const uint8_t* zero_points;  // [tiles, groups, 16] or null
  int groups, group_blocks;
};

// Shared memory of a stage: weights, tokens, group scales and zero points of its slots, activation scales if `grouped`.
constexpr int two_level_stage_bytes(int bits, int token_tiles, bool grouped, int group_slots, int act_slots,
                                    bool zero_points) {
  return lowbit_weight_bytes(bits) + lowbit_token_bytes(token_tiles, kLowbitBytes) +
         group_slots * lowbit_group_bytes(1, zero_points) + (grouped ? act_slots * 8 * token_tiles * 4 : 0);
}
// As many stages as the kernels of one level have: they fit as well.
constexpr bool two_level_stages_fit(bool grouped, int most_token_tiles) {
  for (int bits = 2; bits <= kTwoLevelMostBits; ++bits) {
    for (int tiles = 1; tiles <= most_token_tiles; tiles *= 2) {
      const int stages = lowbit_stages(bits, tiles, kLowbitBytes, grouped);
      const int limit = tiles == 16 ? 80 * 1024 : kStreamSharedLimit;
      if (stages * two_level_stage_bytes(bits, tiles, grouped, 4, 4, true) + 16 > limit) return false;
    }
  }
  return true;
}
static_assert(two_level_stages_fit(true, 8) && two_level_stages_fit(false, 16), "stages fit their shared memory");

// Blocks that should share a multiprocessor. Eight registers hold group scales: one block less than the kernels of one
// level have, for few tokens.
constexpr int two_level_blocks(int token_tiles) { return token_tiles <= 2 ? 3 : 2; }

using TwoLevelKernel = void(LowbitLinearArguments, TwoLevelScales);
// `grouped`: scales of activations change along k.
using TwoLevelChooser = TwoLevelKernel*(bool grouped, int token_tiles);
extern TwoLevelChooser* two_level_choosers[kTwoLevelMostBits + 1];  // by bits of weights

}  // namespace tersor
