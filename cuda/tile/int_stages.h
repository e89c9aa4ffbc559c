// Integer weights in the stored layout (tile/int_tile.h), their scales and zero points: how a stage of them is fetched,
// and a lane's codes are loaded. A warp multiplies the two storage tiles that it fetches; lane (g, c) has four rows,
// 4 (g % 4) and on, of tile g / 4.
#pragma once

#include "tile/int_tile.h"
#include "tile/stream_k.h"

namespace tersor {

static_assert(kStreamBlocks * kBlockK == kStreamK, "a stage is whole blocks");

// The scale group of a block of 32 k, and the block's place in it. Kept up by additions, not divisions.
struct GroupPlace {
  int group, in_group;

  TERSOR_DEVICE void advance_stage(int group_blocks) {
    in_group += kStreamBlocks;
    for (; in_group >= group_blocks; ++group) in_group -= group_blocks;
  }
};
TERSOR_DEVICE GroupPlace group_of(int block, int group_blocks) {
  const int group = block / group_blocks;
  return {group, block - group * group_blocks};
}

template <int kBits>
struct IntStages {
  static constexpr int kBlockBytes = 64 * kBits, kBlockPieces = kBlockBytes / kPieceBytes;
  static constexpr int kTilePieces = kStreamBlocks * kBlockPieces;  // one tile, one stage
  static constexpr int kTileBytes = kTilePieces * kPieceBytes;

  // The lane's first piece of a stage.
  template <class Arguments>
  static TERSOR_DEVICE const uint8_t* source(const Arguments& a, int row_block, int stage) {
    const int64_t tile = row_block * 8 + 2 * (threadIdx.x / 32);
    return a.qweight + tile * a.blocks * kBlockBytes + stage * kTileBytes + threadIdx.x % 32 * kPieceBytes;
  }

  // Whole pieces, 512 contiguous bytes at a time; zeros where tiles and blocks end. A copy of 0 bytes reads nothing,
  // wherever its source points. kUnrolled: not with many tokens, where the addresses of all pieces would not fit.
  template <bool kUnrolled, class Arguments>
  static TERSOR_DEVICE void fetch(const Arguments& a, ptx::shared_t to, const uint8_t* from, int row_block, int stage) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles_left = a.tiles - (row_block * 8 + 2 * warp), blocks_left = a.blocks - stage * kStreamBlocks;
    const int64_t next_tile = int64_t(a.blocks) * kBlockBytes - kTileBytes;
    const ptx::shared_t targets = to + 2 * warp * kTileBytes;
#pragma unroll(kUnrolled ? kBits : 1)
    for (int i = 0; i < kBits; ++i) {
      const int index = lane + 32 * i;  // of a piece in both tiles: shared memory has them in this order
      const int tile = index / kTilePieces, block = index % kTilePieces / kBlockPieces;
      const int piece = 32 % kBlockPieces == 0 ? lane % kBlockPieces : index % kBlockPieces;
      const bool inside = tile < tiles_left && block < blocks_left;
      const uint8_t* source = from + 32 * i * kPieceBytes + (tile == 0 ? 0 : next_tile);
      const ptx::shared_t target = targets + (swizzled_piece(kBits, piece) - piece + lane) * kPieceBytes +
                                   32 * i * kPieceBytes;
      ptx::cp_async_16_once(target, source, inside ? kPieceBytes : 0);
    }
  }

  // The lane's codes of a block of the stage.
  static TERSOR_DEVICE IntFragment<kBits> load(ptx::shared_t stage, int block) {
    const int g = threadIdx.x % 32 / 4, warp_tile = 2 * (threadIdx.x / 32) + g / 4;
    const ptx::shared_t at = stage + (warp_tile * kStreamBlocks + block) * kBlockBytes;
    IntFragment<kBits> codes;
    const auto load_piece = [&](int offset) { return ptx::load_shared<ptx::Vec<uint32_t, 4>>(at + offset); };
    codes.template load<true>(load_piece, threadIdx.x % 4, g % 4);
    return codes;
  }
};

// Scales, and zero points where there are, of the groups from `first` on: slot s of those in `groups` holds 16 of each
// of the row block's eight tiles where wanted(s), a.group_bytes in all.
template <class Arguments, class Wanted>
TERSOR_DEVICE void fetch_groups_of_rows(const Arguments& a, ptx::shared_t groups, int row_block, int first,
                                        const Wanted& wanted) {
  static_assert(4 * 8 * 4 <= kStreamThreads, "four slots of fp32 scales are one piece for a thread");
  // One piece of scales at most for a thread, and one of zero points, from the other end of the block.
  const int shift = a.scale_dtype == 0 ? 2 : 1, pieces = 1 << shift;  // of 16 scales
  const int thread = threadIdx.x, index = kStreamThreads - 1 - thread;
  if (thread < a.group_slots * 8 * pieces) {
    const int piece = thread & (pieces - 1), tile = thread >> shift & 7, slot = thread >> (shift + 3);
    const int64_t group = int64_t(row_block * 8 + tile) * a.groups + first + slot;
    if (wanted(slot)) {
      ptx::cp_async_16(groups + slot * a.group_bytes + (tile * pieces + piece) * kPieceBytes,
                       static_cast<const char*>(a.scales) + (group * pieces + piece) * kPieceBytes,
                       row_block * 8 + tile < a.tiles ? kPieceBytes : 0);
    }
  }
  if (a.zero_points != nullptr && index < a.group_slots * 8) {
    const int tile = index % 8, slot = index / 8;
    const int64_t group = int64_t(row_block * 8 + tile) * a.groups + first + slot;
    if (wanted(slot)) {
      ptx::cp_async_16(groups + slot * a.group_bytes + kStreamRows * (a.scale_dtype == 0 ? 4 : 2) + tile * kPieceBytes,
                       a.zero_points + group * kPieceBytes, row_block * 8 + tile < a.tiles ? kPieceBytes : 0);
    }
  }
}

}  // namespace tersor
