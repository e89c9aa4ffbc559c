// Which instance of the low-bit kernels serves which number of tokens: data, to be replaced by measured values. None of
// these figures was measured on hardware yet.
#pragma once

#include "kernels/sm80_lowbit_linear_blocks.h"

namespace tersor {

// Token tiles of 8 that a block multiplies at once; more tokens than the last row's are further blocks of the grid.
struct LowbitTile {
  int max_tokens, token_tiles;
};
constexpr LowbitTile kLowbitTiles[] = {{8, 1}, {16, 2}, {32, 4}, {64, 8}, {128, 16}};

constexpr int kLowbitMaxStageCost = 2;  // of mixed widths: bytes cost twice what nibbles do

constexpr int lowbit_token_tiles(long long m, int most) {
  for (const LowbitTile& tile : kLowbitTiles) {
    if (m <= tile.max_tokens || tile.token_tiles == most) return tile.token_tiles;
  }
  return most;
}
static_assert(lowbit_token_tiles(1, 8) == 1 && lowbit_token_tiles(17, 16) == 4 && lowbit_token_tiles(200, 8) == 8 &&
                  lowbit_token_tiles(200, 16) == 16,
              "the table's rows ascend");

}  // namespace tersor
