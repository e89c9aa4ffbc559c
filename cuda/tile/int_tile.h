// How the storage layout of cpp/cpu/int_layout.h is read as fragments of mma.m16n8k16: every index here is a
// constant expression or a few shifts of the lane number, and is checked against int_layout.h at compile time.
//
//   A lane is (g, c) = (lane / 4, lane % 4). Weights are operand A (16 rows), tokens are operand B (8 columns).
//   In a block of 32 k a lane owns rows 4*quad .. 4*quad + 3 of one 16-row tile and k = 8*c .. 8*c + 7. In every
//   plane these codes are 16 contiguous bytes, one dword for each of the four rows (32 bytes for 8-bit planes).
//   Pair p of a dword is k = 8*c + 2*p (low half) and k + 1 (high half, 16 bits further): shift and mask give both.
//
//   The k axis of an mma is only a sum, so it may be permuted as long as both operands agree: step s of a block
//   takes the pairs 2s and 2s + 1 as the fragment's k = 2c, 2c+1 and 2c+8, 2c+9. For tokens those are dwords
//   2s and 2s + 1 of the 16 bytes x[token, 32*block + 8*c ..]: x is read as it lies, without ldmatrix.
#pragma once

#include <cstdint>

#include "cpu/int_layout.h"
#include "ptx/ptx.h"
#include "tile/swizzle.h"

namespace tersor {

// Chunk (64 bytes) of a plane of `width` bits that holds the codes of lane column c; 8-bit planes: the first of two.
__host__ __device__ constexpr int lane_chunk(int width, int c) { return c * width / 4; }
// Right shift that brings the lane's codes to the bottom of each half of its dwords.
__host__ __device__ constexpr int lane_shift(int width, int c) { return width * (2 * c % (8 / width)); }
// Bit of pair p in a half that lane_shift was applied to; 8-bit planes: in dword p % 2 of the row's two.
__host__ __device__ constexpr int pair_shift(int width, int p) {
  return 8 * (p / 2) + (width < 8 ? width * (p % 2) : 0);
}

constexpr bool agrees_with_storage(int width) {
  for (int k = 0; k < kBlockK; ++k) {
    const int c = k / 8, p = k % 8 / 2;
    const int chunk = lane_chunk(width, c) + (width == 8 ? p % 2 : 0);
    const int shift = lane_shift(width, c) + pair_shift(width, p) + 16 * (k % 2);
    if (chunk != chunk_of(k, width) || shift != shift_of(k, width)) return false;
  }
  return true;
}
static_assert(agrees_with_storage(8) && agrees_with_storage(4) && agrees_with_storage(2) && agrees_with_storage(1),
              "a lane's shifts and masks find the codes where int_layout.h puts them");

// Where piece `piece` of a block's first plane lies in shared memory. A quarter warp (two g, four c) reads pieces
// 4*c + quad (4-bit plane) or 8*c + quad and 8*c + 4 + quad (8-bit plane); the exclusive or spreads those with
// equal quad over the eight 16-byte columns of the banks. The 2- and 1-bit planes are read by broadcast.
__host__ __device__ constexpr int swizzled_piece(int bits, int piece) {
  return bits == 8 ? piece ^ (piece >> 3 & 3) << 1 : bits >= 4 && piece < 16 ? piece ^ (piece >> 3 & 1) << 1 : piece;
}

// Piece of a block that lane column c, row quad `quad` reads of plane `index`; `second`: the 8-bit plane's other half.
__host__ __device__ constexpr int lane_piece(int bits, int width, int low, int c, int quad, bool second = false) {
  return swizzled_piece(bits, 4 * low + 4 * (lane_chunk(width, c) + second) + quad);
}

// (A quarter warp reads of one storage tile: lanes of g / 4 = 0 and 1 are in different phases.)
constexpr bool codes_conflict_free(int bits, int width, int low, bool second) {
  return conflict_free(16, [=](int g, int c) { return 4 * lane_piece(bits, width, low, c, g % 4, second); });
}
static_assert(codes_conflict_free(4, 4, 0, false) && codes_conflict_free(7, 4, 0, false) &&
                  codes_conflict_free(7, 2, 4, false) && codes_conflict_free(7, 1, 6, false) &&
                  codes_conflict_free(8, 8, 0, false) && codes_conflict_free(8, 8, 0, true),
              "every plane is read from shared memory without bank conflicts");

// The codes that a lane owns of one block: [plane][row] dwords; the 8-bit plane takes two entries.
template <int kBits>
struct IntFragment {
  static constexpr int kPlanes = kBits == 8 ? 2 : plane_bits(kBits, 1) == 0 ? 1 : plane_bits(kBits, 2) == 0 ? 2 : 3;
  // Width of each plane, and the lowest bit of the code that it holds.
  static constexpr int kWidth0 = plane_bits(kBits, 0);
  static constexpr int kWidth1 = kPlanes > 1 && kBits < 8 ? plane_bits(kBits, 1) : 1, kLow1 = kWidth0;
  static constexpr int kWidth2 = kPlanes > 2 ? plane_bits(kBits, 2) : 1, kLow2 = kLow1 + kWidth1;

  ptx::Vec<uint32_t, 4> rows[kPlanes];

  // load_piece(byte offset in the block) gives 16 bytes. kSwizzled: the block lies in shared memory.
  template <bool kSwizzled, class Load>
  TERSOR_DEVICE void load(const Load& load_piece, int c, int quad) {
    constexpr int bits = kSwizzled ? kBits : 0;  // 0: pieces lie in storage order
    rows[0] = load_piece(kPieceBytes * lane_piece(bits, kWidth0, 0, c, quad));
    if constexpr (kBits == 8) {
      rows[1] = load_piece(kPieceBytes * lane_piece(bits, kWidth0, 0, c, quad, true));
    } else {
      if constexpr (kPlanes > 1) rows[1] = load_piece(kPieceBytes * lane_piece(bits, kWidth1, kLow1, c, quad));
      if constexpr (kPlanes > 2) rows[2] = load_piece(kPieceBytes * lane_piece(bits, kWidth2, kLow2, c, quad));
    }
  }
};

}  // namespace tersor
