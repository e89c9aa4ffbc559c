// Microkernels of int_linear_a8 for scales in two levels and one activation scale a token.
//
//   result = x_scale[m] * channel[n] * sum over groups g of group_scale[n, g] *
//            sum over k in g of (code - zero_point[n, g]) * q[m, k]
//
// Everything right of channel[n] is one integer of 32 bits, exact for k up to kTwoLevelColumns, in whatever order;
// until the last block of k it lies in the result, then it is scaled in fp32. AVX2 has the group's scale for nothing:
// the multiplication that widens pairs of 16-bit sums takes it instead of ones. Elsewhere a segment is multiplied once.
#pragma once

#include "cpu/int_linear_a8_micro.h"

namespace tersor::TERSOR_ISA {
namespace {

// sum[r][n] = sum over the block of (code - 2^(bits-1)) * q, times the scales in `pairs` where Dot::scales_runs.
template <class Dot, int stored, int rows, int tiles, int part = 0>
TERSOR_INLINE void scaled_block_sums(i32 (&sum)[rows][tiles], const uint8_t* weights, int64_t tile_bytes,
                                     const uint32_t* records, const i32 (&pairs)[tiles]) {
  if constexpr (part < Dot::parts) {
    constexpr int record = Dot::words + Dot::parts + 1, run = 8 / Dot::parts;
    i32 acc[rows][tiles];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < tiles; ++n) acc[r][n] = Dot::start(records[r * record + Dot::words + part]);
    }
    run_steps<Dot, stored, rows, tiles, part * run, (part + 1) * run>(acc, weights, tile_bytes, records);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < tiles; ++n) {
        const i32 wide = Dot::widen(acc[r][n], pairs[n]);
        sum[r][n] = part == 0 ? wide : add_i32(sum[r][n], wide);
      }
    }
    scaled_block_sums<Dot, stored, rows, tiles, part + 1>(sum, weights, tile_bytes, records, pairs);
  }
}

template <int kind, int stored, int rows, int tiles, bool stream>
void micro_two_level(const MicroArgs& u) {
  using Dot = Int8Dot<kind>;
  constexpr int record = Dot::words + Dot::parts + 1;
  constexpr bool in_registers = rows * tiles <= kSumsInRegisters;
  const int64_t groups = u.shape.groups, scale_bytes = scale_tile_bytes(kTwoLevelScales, groups);
  const uint8_t* weights = u.weights;
  const uint32_t* records = u.records;
  const float* sums = u.sums + u.segment * rows;
  alignas(64) uint32_t memory[in_registers ? 1 : rows * tiles * 16];
  for (int64_t block = u.begin; block < u.end; sums += rows) {
    const int64_t group = block / u.shape.group_blocks, end = segment_end(u.shape, block);
    i32 pairs[tiles], part[rows][tiles];
#pragma GCC unroll 4
    for (int n = 0; n < tiles; ++n) {
      pairs[n] = Dot::pairs(load_u8_i32(u.scales + n * scale_bytes + group * kTileRows));
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        if (in_registers) {
          part[r][n] = splat_i32(0);
        } else {
          store_i32(memory + 16 * (r * tiles + n), splat_i32(0));
        }
      }
    }
    for (; block < end; ++block) {
      if (stream) {
#pragma GCC unroll 4
        for (int n = 0; n < tiles; ++n) {
#pragma GCC unroll 8
          for (int i = 0; i < stored; ++i) __builtin_prefetch(weights + n * u.tile_bytes + kA8Prefetch + 64 * i);
        }
      }
      i32 sum[rows][tiles];
      scaled_block_sums<Dot, stored, rows, tiles>(sum, weights, u.tile_bytes, records, pairs);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < tiles; ++n) {
          if (in_registers) {
            part[r][n] = add_i32(part[r][n], sum[r][n]);
          } else {
            uint32_t* at = memory + 16 * (r * tiles + n);
            store_i32(at, add_i32(load_i32(at), sum[r][n]));
          }
        }
      }
      weights += 64 * stored;
      records += rows * record;
    }
#pragma GCC unroll 4
    for (int n = 0; n < tiles; ++n) {
      const i32 scale = load_u8_i32(u.scales + n * scale_bytes + group * kTileRows);
      const uint32_t middle = 1u << (u.shape.bits - 1);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        i32 value = in_registers ? part[r][n] : load_i32(memory + 16 * (r * tiles + n));
        if (!Dot::scales_runs) value = mul_i32(value, scale);
        if (u.zero_points) {  // (middle - zero point) * group scale * sum of q
          const uint32_t total = static_cast<uint32_t>(static_cast<int32_t>(sums[r]));
          const i32 zeros = load_u8_i32(u.zero_points + (n * groups + group) * kTileRows);
          const i32 shift = add_i32(splat_i32(middle * total), mul_i32(zeros, splat_i32(0u - total)));
          value = add_i32(value, mul_i32(shift, scale));
        }
        float* to = u.result + 16 * (r * tiles + n);
        store_i32(to, add_i32(load_i32(to), value));
      }
    }
  }
  if (u.end < u.shape.blocks) return;
#pragma GCC unroll 4
  for (int n = 0; n < tiles; ++n) {
    const f32 channel = channel_scales(u.scales + n * scale_bytes, groups);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      float* to = u.result + 16 * (r * tiles + n);
      // Any block's record has the row's scale: the last one's.
      const f32 scale = splat(bits_to_float(records[(r - rows) * record + record - 1]));
      store(to, mul(mul(to_f32(load_i32(to)), scale), channel));
    }
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
