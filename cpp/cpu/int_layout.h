// The one storage layout of integer weights on the CPU, read by every kernel and instruction set.
//
//   tile   16 output rows x all of k. n is padded to 16 rows, k to a multiple of 32; padding codes are
//          the zero point and the kernels take x as 0 there, so padding adds nothing.
//   block  16 rows x 32 k = 64*bits bytes. qweight is uint8 [ceil(n/16), ceil(k/32), 64*bits]: a
//          tile is one sequential stream, which is what makes m = 1 run at the speed of memory.
//   plane  codes of b bits are cut into fields of 8, 4, 2 or 1 bits, the widest holding the low bits:
//          8=8  7=4+2+1  6=4+2  5=4+1  4=4  3=2+1  2=2. A block stores its planes one after another.
//   vector t = 0..7 of a block: 16 dwords, one per row; byte i of a dword belongs to
//          k = 8*(t/2) + 2*(t%2) + {0, 4, 1, 5}[i].
//          A plane of p bits keeps 8/p vectors in each 64-byte chunk: vector t is in chunk t/(8/p), at
//          bit p*(t%(8/p)) of every byte.
//
//   So a dword of the 4-bit plane holds 8 consecutive k of one row:
//     bits   0-3  4-7  8-11 12-15 16-19 20-23 24-27 28-31
//     k      0    2    4    6     1     3     5     7
//   Shifting by 4*j puts k = 2j in the low and k = 2j+1 in the high 16-bit word: an index pair for a
//   table lookup into bf16 pairs. Masked with 0x0f the bytes are four codes for an int8 dot product.
//
//   scales [ceil(n/16), groups, 16] (fp32, bf16 or fp16), zero_points uint8 of the same shape or absent
//   (then 2^(bits-1)); groups = ceil(k/group_size); w = (code - zero_point) * scale.
#pragma once

#include <cstdint>

namespace tersor {

constexpr int kTileRows = 16;
constexpr int kBlockK = 32;

static constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Plane `index` of a b-bit code: its width in bits, 0 past the last.
static constexpr int plane_bits(int bits, int index) {
  for (int width = 8; width >= 1; width /= 2) {
    if (bits >= width) {
      if (index == 0) return width;
      --index;
      bits -= width;
    }
  }
  return 0;
}
// The lowest bit of the code that plane `index` holds; equally its byte offset in a block, over 64.
static constexpr int plane_offset(int bits, int index) {
  return index == 0 ? 0 : plane_offset(bits, index - 1) + plane_bits(bits, index - 1);
}
// Where k (0..31) of a block sits: the vector, and the byte of the dword.
static constexpr int vector_of(int k) { return 2 * (k / 8) + ((k % 8) >> 1 & 1); }
static constexpr int byte_of(int k) { return (k & 1) * 2 + (k % 8) / 4; }
// In a plane of p bits: the 64-byte chunk, and the lowest bit in the dword.
static constexpr int chunk_of(int k, int p) { return vector_of(k) / (8 / p); }
static constexpr int shift_of(int k, int p) { return 8 * byte_of(k) + p * (vector_of(k) % (8 / p)); }

static_assert(shift_of(2, 4) == 4 && shift_of(1, 4) == 16 && shift_of(7, 4) == 28, "nibble j of word p is k = 2j+p");
static_assert(plane_bits(7, 0) == 4 && plane_bits(7, 2) == 1 && plane_bits(7, 3) == 0, "7 = 4+2+1");

// Sizes of one weight, from its shape. group_size 0 or >= k means one group per row.
struct IntShape {
  int64_t n, k, tiles, blocks, groups, group_blocks;
  int bits;
  int64_t tile_bytes() const { return blocks * 64 * bits; }
};
static inline IntShape int_shape(int64_t n, int64_t k, int bits, int64_t group_size) {
  IntShape s{n, k, div_up(n, kTileRows), div_up(k, kBlockK), 1, 0, bits};
  const bool whole = group_size <= 0 || group_size >= k;
  s.group_blocks = whole ? s.blocks : group_size / kBlockK;
  s.groups = whole ? 1 : div_up(k, group_size);
  return s;
}

// TERSOR_OK, or the error of the first argument that is out of range.
int check_int_arguments(int64_t n, int64_t k, int bits, int64_t group_size, int threads);

}  // namespace tersor
