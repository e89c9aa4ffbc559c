// Scales of the 16 rows of a tile as one vector (int_scales.h has the layout).
#pragma once

#include "cpu/int_scales.h"
#include "cpu/simd.h"

namespace tersor::TERSOR_ISA {

TERSOR_INLINE f32 channel_scales(const char* tile, int64_t groups) {
  return load_as(tile + groups * kTileRows, TERSOR_FLOAT32);
}
TERSOR_INLINE f32 group_scales(const char* tile, int scale_dtype, int64_t groups, int64_t group) {
  const char* at = tile + group * scale_group_bytes(scale_dtype);
  if (scale_dtype != kTwoLevelScales) return load_as(at, scale_dtype);
  return mul(load_u8(reinterpret_cast<const uint8_t*>(at)), channel_scales(tile, groups));
}

}  // namespace tersor::TERSOR_ISA
