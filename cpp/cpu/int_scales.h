// Where the scales of integer weights lie, for every scale_dtype.
//
//   0 to 2 (enum tersor_dtype)   [tiles, groups, 16] of that type
//   kTwoLevelScales              uint8 [tiles, groups + 4, 16]: for each group the integer scales of a tile's 16 rows,
//                                from 1 to 127, then in the last 64 bytes the rows' channel scales, fp32
//
// With two levels w = (code - zero_point) * group scale * channel scale, and (code - zero_point) * group scale stays
// within -127 .. 127 (formats/two_level.py sees to it): where activations have one scale a token, sums over all of k
// are sums of integers (QServe's progressive groups, arXiv 2405.04532).
#pragma once

#include <cstring>

#include "common/float16.h"
#include "cpu/int_layout.h"

namespace tersor {

constexpr int kTwoLevelScales = 3;
constexpr int64_t kChannelBytes = 4 * kTileRows;  // of a tile
constexpr int kTwoLevelBits = 6;                  // codes have at most so many
// The longest row whose int32 sum holds: 127 * 127 * k stays below 2^31.
constexpr int64_t kTwoLevelColumns = 131072;

static inline int64_t scale_group_bytes(int scale_dtype) {
  return scale_dtype == kTwoLevelScales ? kTileRows : kTileRows * dtype_size(scale_dtype);
}
static inline int64_t scale_tile_bytes(int scale_dtype, int64_t groups) {
  return groups * scale_group_bytes(scale_dtype) + (scale_dtype == kTwoLevelScales ? kChannelBytes : 0);
}

// The scale of row `row` in group `group` of the tile at `tile`; of two levels, their product.
static inline float group_scale(const void* tile, int scale_dtype, int64_t groups, int64_t group, int row) {
  if (scale_dtype != kTwoLevelScales) return load_as_float(tile, scale_dtype, group * kTileRows + row);
  const uint8_t* scales = static_cast<const uint8_t*>(tile);
  float channel;
  std::memcpy(&channel, scales + groups * kTileRows + 4 * row, 4);
  return static_cast<float>(scales[group * kTileRows + row]) * channel;
}

}  // namespace tersor
