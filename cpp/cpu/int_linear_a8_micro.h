// Microkernels of int_linear_a8: rows x tiles of the result over one chunk of k.
#pragma once

#include "cpu/int_scales_vector.h"
#include "cpu/quantize_activations.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kA8Prefetch = 8192;  // bytes ahead in the weight stream

// Bits [to, to + p) of every byte, from bits [from, from + p).
template <int p, int from, int to>
TERSOR_INLINE i32 field(i32 bytes) {
  constexpr uint32_t mask = ((1u << p) - 1) * 0x01010101u << to;
  if constexpr (p == 8) {
    return bytes;
  } else if constexpr (from >= to) {
    return and_(srl<from - to>(bytes), mask);
  } else {
    return and_(sll<to - from>(bytes), mask);
  }
}

// Vector t of a block as 16 dwords of four codes.
template <int bits, int t, int plane = 0>
TERSOR_A8_INLINE i32 codes(const uint8_t* block) {
  constexpr int p = plane_bits(bits, plane), offset = plane_offset(bits, plane);
  const i32 bytes = load_i32(block + 64 * (offset + t / (8 / p)));
  const i32 part = field<p, p * (t % (8 / p)), offset>(bytes);
  if constexpr (plane_bits(bits, plane + 1) == 0) {
    return part;
  } else {
    return or_(part, codes<bits, t, plane + 1>(block));
  }
}

// The codes of `blocks` blocks as bytes: the layout of 8 bits, whatever the width was.
template <int bits, int t = 0>
TERSOR_INLINE void unpack_block(const uint8_t* block, uint8_t* bytes) {
  store_i32(bytes + 64 * t, codes<bits, t>(block));
  if constexpr (t < 7) unpack_block<bits, t + 1>(block, bytes);
}
template <int bits>
void unpack(const uint8_t* weights, int64_t blocks, uint8_t* bytes) {
  for (int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 8
    for (int i = 0; i < bits; ++i) __builtin_prefetch(weights + kChunkBlocks * 64 * bits + 64 * i);
    unpack_block<bits>(weights, bytes);
    weights += 64 * bits;
    bytes += 512;
  }
}

struct MicroArgs {
  IntShape shape;
  int64_t begin, end;          // blocks, inside one chunk or from the start of a chunk on
  int64_t segment;             // the one that begins at `begin`
  const uint8_t* weights;      // of the first tile, block `begin`
  int64_t tile_bytes;          // from one tile's weights to the next one's
  const uint32_t* records;     // of the strip, block `begin`
  const float* sums;           // of the strip, segment 0
  const char* scales;          // of the first tile
  const uint8_t* zero_points;  // of the first tile, group 0; null: symmetric
  int scale_dtype;
  float* result;               // [rows][tiles][16], added to
};
using Micro = void (*)(const MicroArgs&);

// Sums of floats that stay in registers; above, they are in memory and the integer sums have the registers.
constexpr int kSumsInRegisters = kA8PanelRows * kA8PanelTiles / 2;

// The integer sums of one run of vectors [t, end), for all rows and tiles.
template <class Dot, int stored, int rows, int tiles, int t, int end>
TERSOR_INLINE void run_steps(i32 (&acc)[rows][tiles], const uint8_t* weights, int64_t tile_bytes,
                             const uint32_t* records) {
  if constexpr (t < end) {
    constexpr int record = Dot::words + Dot::parts + 1;
    typename Dot::Weights w[tiles];
#pragma GCC unroll 4
    for (int n = 0; n < tiles; ++n) w[n] = Dot::weights(codes<stored, t>(weights + n * tile_bytes));
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename Dot::Activation x = Dot::activation(records + r * record, t);
#pragma GCC unroll 4
      for (int n = 0; n < tiles; ++n) acc[r][n] = Dot::step(acc[r][n], w[n], x);
    }
    run_steps<Dot, stored, rows, tiles, t + 1, end>(acc, weights, tile_bytes, records);
  }
}

// sum[r][n] = sum over the block of (code - 2^(bits-1)) * q, exactly.
template <class Dot, int stored, int rows, int tiles, int part = 0>
TERSOR_INLINE void block_sums(i32 (&sum)[rows][tiles], const uint8_t* weights, int64_t tile_bytes,
                              const uint32_t* records) {
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
        const i32 wide = Dot::widen(acc[r][n]);
        sum[r][n] = part == 0 ? wide : add_i32(sum[r][n], wide);
      }
    }
    block_sums<Dot, stored, rows, tiles, part + 1>(sum, weights, tile_bytes, records);
  }
}

// kind: how codes are multiplied (simd_int8.h); stored: the bits of the codes in memory (8 once unpacked);
// stream: they come from memory and are prefetched.
template <int kind, int stored, int rows, int tiles, bool stream>
void micro(const MicroArgs& u) {
  using Dot = Int8Dot<kind>;
  constexpr int record = Dot::words + Dot::parts + 1;
  constexpr bool in_registers = rows * tiles <= kSumsInRegisters;
  const int64_t groups = u.shape.groups, scale_bytes = scale_tile_bytes(u.scale_dtype, groups);
  const uint8_t* weights = u.weights;
  const uint32_t* records = u.records;
  const float* sums = u.sums + u.segment * rows;
  alignas(64) float memory[in_registers ? 1 : rows * tiles * 16];
  for (int64_t block = u.begin; block < u.end; sums += rows) {
    const int64_t group = block / u.shape.group_blocks, end = segment_end(u.shape, block);
    f32 part[rows][tiles];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < tiles; ++n) {
        if (in_registers) {
          part[r][n] = zero();
        } else {
          store(memory + 16 * (r * tiles + n), zero());
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
      block_sums<Dot, stored, rows, tiles>(sum, weights, u.tile_bytes, records);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const f32 scale = splat(bits_to_float(records[r * record + record - 1]));
#pragma GCC unroll 4
        for (int n = 0; n < tiles; ++n) {
          if (in_registers) {
            part[r][n] = fma(to_f32(sum[r][n]), scale, part[r][n]);
          } else {
            float* at = memory + 16 * (r * tiles + n);
            store(at, fma(to_f32(sum[r][n]), scale, load(at)));
          }
        }
      }
      weights += 64 * stored;
      records += rows * record;
    }
#pragma GCC unroll 4
    for (int n = 0; n < tiles; ++n) {
      const int64_t at = (n * groups + group) * kTileRows;
      const f32 scale = group_scales(u.scales + n * scale_bytes, u.scale_dtype, groups, group);
      f32 centre = zero();
      if (u.zero_points) centre = sub(splat(static_cast<float>(1 << (u.shape.bits - 1))), load_u8(u.zero_points + at));
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        f32 value = in_registers ? part[r][n] : load(memory + 16 * (r * tiles + n));
        if (u.zero_points) value = fma(centre, splat(sums[r]), value);
        float* to = u.result + 16 * (r * tiles + n);
        store(to, fma(scale, value, load(to)));
      }
    }
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
