// Tokens of a stage on their way to the tensor cores: rows of 16 bits, and rows of bytes or nibbles. Threads of a block
// fetch neighbouring pieces of a row; rows past the last become zeros.
#pragma once

#include "tile/stream_k.h"
#include "tile/swizzle.h"

namespace tersor {

// ---- 16 bits: 256 bytes of a stage, as x has them -------------------------------------------------------------------

constexpr int kTokenRowBytes = 2 * kStreamK, kTokenRowPieces = kTokenRowBytes / kPieceBytes;
static_assert(kStreamThreads / kTokenRowPieces % 2 == 0, "the pieces of tokens that a thread fetches have one swizzle");

// source: the thread's first piece, threadIdx.x % kTokenRowPieces of row threadIdx.x / kTokenRowPieces; left: bytes
// from the stage's start to the end of a row of x. What lies behind becomes zeros, so that it does not matter what
// codes of weights past k say.
template <int kTokens>
TERSOR_DEVICE void fetch_tokens_16(ptx::shared_t tokens, const char* source, int64_t ldx, int token0, int m, int left) {
  constexpr int at_once = kStreamThreads / kTokenRowPieces;
  const int token = threadIdx.x / kTokenRowPieces, piece = threadIdx.x % kTokenRowPieces;
  left -= piece * kPieceBytes;
  const int bytes = left <= 0 ? 0 : left < kPieceBytes ? left : kPieceBytes;
  const ptx::shared_t target = tokens + token * kTokenRowBytes + swizzled_token_piece(token, piece) * kPieceBytes;
#pragma unroll
  for (int i = 0; i < kTokens / at_once; ++i) {
    const bool inside = token0 + token + at_once * i < m;
    ptx::cp_async_16(target + at_once * i * kTokenRowBytes, source, inside ? bytes : 0);
    source += 2 * at_once * ldx;
  }
}

// The fragments of a product (16 rows of weights) from pairs k, k + 1 of fragment rows g and g + 8: step s takes pairs
// 2s and 2s + 1, which are dwords 2s and 2s + 1 of the 16 bytes of a token.
TERSOR_DEVICE void set_fragments(uint32_t (&weights)[2][4], const uint32_t (&upper)[4], const uint32_t (&lower)[4]) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    weights[s][0] = upper[2 * s];
    weights[s][1] = lower[2 * s];
    weights[s][2] = upper[2 * s + 1];
    weights[s][3] = lower[2 * s + 1];
  }
}

// sum += weights[product][step] * tokens of block `block`.
template <class Type, int kTokenTiles>
TERSOR_DEVICE void multiply_tokens_16(float (&sum)[2][kTokenTiles][4], const uint32_t (&weights)[2][2][4],
                                      ptx::shared_t tokens, int block) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
    const int token = 8 * t + g;
    const auto x = ptx::load_shared<ptx::Vec<uint32_t, 4>>(tokens + token * kTokenRowBytes +
                                                           swizzled_token_piece(token, 4 * block + c) * kPieceBytes);
    const uint32_t steps[2][2] = {{x[0], x[1]}, {x[2], x[3]}};
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int j = 0; j < 2; ++j) Type::mma(sum[j][t], weights[j][s], steps[s]);
  }
}

// ---- 8 and 4 bits: 128 or 64 bytes of a stage, padded with zeros to whole stages ------------------------------------

// source: the first token's bytes of the stage; place(token, piece): where a piece lies within its row.
template <int kTokens, int kRowBytes, int kUnroll, class Place>
TERSOR_DEVICE void fetch_token_bytes(ptx::shared_t tokens, const uint8_t* source, int64_t row_bytes, int token0, int m,
                                     const Place& place) {
  constexpr int pieces = kRowBytes / kPieceBytes, at_once = kStreamThreads / pieces;
  const int first = threadIdx.x / pieces, piece = threadIdx.x % pieces;
  source += first * row_bytes + piece * kPieceBytes;
#pragma unroll(kUnroll)
  for (int i = 0; i < (kTokens + at_once - 1) / at_once; ++i) {
    const int token = first + at_once * i;
    if (kTokens % at_once != 0 && token >= kTokens) break;
    ptx::cp_async_16(tokens + token * kRowBytes + place(token, piece) * kPieceBytes, source,
                     token0 + token < m ? kPieceBytes : 0);
    source += at_once * row_bytes;
  }
}

// The lane's eight bytes of a token in block `block`.
TERSOR_DEVICE ptx::Vec<uint32_t, 2> load_token_bytes(ptx::shared_t tokens, int token, int block) {
  const int c = threadIdx.x % 4;
  return ptx::load_shared<ptx::Vec<uint32_t, 2>>(
      tokens + token * kStreamK + swizzled_byte_piece(token, 2 * block + c / 2) * kPieceBytes + 8 * (c % 2));
}

}  // namespace tersor
