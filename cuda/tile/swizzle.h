// Where 16-byte pieces of a stage's rows lie in shared memory, so that the loads of a warp's fragments meet no bank
// conflict, and the proof of it.
//
//   A lane is (g, c) = (lane / 4, lane % 4). It reads k = 8c .. 8c + 7 of each block of 32 k: of token g of a tile of
//   eight, and of the warp's rows 4g .. 4g + 3 of weights that are stored row by row.
#pragma once

#include "ptx/ptx.h"

namespace tersor {

constexpr int kPieceBytes = 16;  // one cp.async

// Rows of 256 bytes (16-bit tokens), 16 bytes a lane: the exclusive or separates the two rows of a quarter warp.
__host__ __device__ constexpr int swizzled_token_piece(int token, int piece) { return piece ^ (token & 1) << 2; }
// Rows of 128 bytes, 8 bytes a lane: it spreads the four rows of a half warp. `index`: the token, or a row of weights
// / 4.
__host__ __device__ constexpr int swizzled_byte_piece(int index, int piece) { return piece ^ (index & 3) << 1; }
// Rows of 64 bytes, 4 bytes a lane: tokens, and rows of weights (the piece counted from the first row). A warp reads
// one piece of eight rows; so does ldmatrix.
__host__ __device__ constexpr int swizzled_nibble_piece(int token, int piece) { return piece ^ (token >> 1 & 3); }
__host__ __device__ constexpr int swizzled_nibble_row(int row, int piece) { return (4 * row + piece) ^ (row >> 2 & 7); }

// Whether a warp's loads, `bytes` bytes of lane (g, c) from the 4-byte word word_of_lane(g, c) on, are free of bank
// conflicts: 128 bytes go at a time, those of 8, 16 or 32 lanes, and no bank is asked for two words.
template <class WordOfLane>
constexpr bool conflict_free(int bytes, const WordOfLane& word_of_lane) {
  const int lanes = 128 / bytes;
  for (int first = 0; first < 32; first += lanes) {
    int asked[32] = {};  // of each bank: one more than the word
    for (int lane = first; lane < first + lanes; ++lane) {
      for (int i = 0; i < bytes / 4; ++i) {
        const int word = word_of_lane(lane / 4, lane % 4) + i;
        if (asked[word % 32] != 0 && asked[word % 32] != word + 1) return false;
        asked[word % 32] = word + 1;
      }
    }
  }
  return true;
}

// For each of the four blocks of a stage; rows: how far those of neighbouring g are apart.
constexpr bool token_pieces_conflict_free() {
  for (int block = 0; block < 4; ++block) {
    const auto word = [=](int g, int c) { return 64 * g + 4 * swizzled_token_piece(g, 4 * block + c); };
    if (!conflict_free(16, word)) return false;
  }
  return true;
}
constexpr bool byte_pieces_conflict_free(int rows) {
  for (int block = 0; block < 4; ++block) {
    const auto word = [=](int g, int c) {
      return 32 * rows * g + 4 * swizzled_byte_piece(g, 2 * block + c / 2) + 2 * (c % 2);
    };
    if (!conflict_free(8, word)) return false;
  }
  return true;
}
constexpr bool nibble_pieces_conflict_free() {
  for (int block = 0; block < 4; ++block) {
    const auto of_token = [=](int g, int c) { return 16 * g + 4 * swizzled_nibble_piece(g, block) + c; };
    if (!conflict_free(4, of_token)) return false;
    for (int row = 0; row < 4; ++row) {
      const auto of_row = [=](int g, int c) { return 4 * swizzled_nibble_row(4 * g + row, block) + c; };
      if (!conflict_free(4, of_row)) return false;
    }
  }
  return true;
}
static_assert(token_pieces_conflict_free(), "tokens of 16 bits are read from shared memory without bank conflicts");
static_assert(byte_pieces_conflict_free(1) && byte_pieces_conflict_free(4),
              "tokens and rows of bytes are read from shared memory without bank conflicts");
static_assert(nibble_pieces_conflict_free(), "tokens and rows of nibbles are read without bank conflicts");

}  // namespace tersor
