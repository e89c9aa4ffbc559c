// Which instance of the W4A16 kernel serves which number of tokens, and how a launch fills a GPU: data, to be
// replaced by measured values. None of these figures was measured on hardware yet.
#pragma once

#include "kernels/sm80_int_linear.h"

namespace tersor {

// Token tiles of 8 that a block multiplies at once; more tokens than the last row's are further blocks of the grid,
// which read the weights again (from L2 where they run at the same time).
struct IntLinearTile {
  int max_tokens, token_tiles;
};
constexpr IntLinearTile kIntLinearTiles[] = {{8, 1}, {16, 2}, {32, 4}, {64, 8}};

constexpr int int_linear_token_tiles(long long m) {
  for (const IntLinearTile& tile : kIntLinearTiles) {
    if (m <= tile.max_tokens) return tile.token_tiles;
  }
  return kIntLinearTiles[3].token_tiles;
}
// For experts: by the rows of the average one that has any.
constexpr int int_linear_grouped_token_tiles(long long rows, long long experts) {
  const long long active = rows < experts ? rows : experts;
  return rows <= 8 * active ? 1 : 4;
}
static_assert(int_linear_token_tiles(1) == 1 && int_linear_token_tiles(17) == 4 && int_linear_token_tiles(200) == 8,
              "the table's rows ascend");

}  // namespace tersor
