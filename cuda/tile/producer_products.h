// Small matrices times a row in shared memory (tile/producer_rows.h), on tensor cores, in place.
//
//   left:   Y[m][n] = sum over l of A[m][l] X[l][n]    A = left^T,  the lines of X are l, the columns n
//   right:  Y[n][m] = sum over l of A[m][l] X[n][l]    A = right^T, the lines of X are n, the columns l
//
//   So the small matrix is the A operand of mma.m16n8k16 both times, from global memory in the order of its fragments
//   (16 bytes a lane, from L1: all blocks read the same), and the row is the B operand, by ldmatrix, transposed for
//   left. A warp takes a strip, 8 or 16 of the n: it holds all of the strip in registers before it writes.
//
//   Numbers in bf16 keep 8 bits, so each is the sum of two: three products (high high, high low, low high), fp32
//   sums, leave 2^-16 of the largest term; matrices of -1 and 1 need but their high part, and two.
//
//   fragments  uint32 [m tiles][l tiles][parts][32 lanes][4], tiles of 16, the matrix padded with zeros.
#pragma once

#include <cstdint>

#include "kernels/quantize_rows.h"
#include "ptx/ptx.h"
#include "tile/producer_rows.h"

namespace tersor {

// kTiles: tiles of l that there is room for; kWidth: eights of n in a strip.
template <bool kLeft, int kTiles, int kWidth>
TERSOR_DEVICE void multiply_strip(const RowBuffer& buffer, const uint32_t* matrix, int parts, int tiles, int line,
                                  int chunk) {
  const int lane = threadIdx.x % 32;
  uint32_t x[kTiles][kWidth][4];  // high parts of l and l + 8, low ones
  const int half = lane / 8 % 2, part = lane / 16;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile >= tiles) continue;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      if constexpr (kLeft) {
        ptx::ldmatrix_x4_transposed(
            x[tile][w], buffer.line(line + 16 * tile + 8 * half + lane % 8) + 32 * (chunk + w) + 16 * part);
      } else {
        ptx::ldmatrix_x4(x[tile][w], buffer.line(line + 8 * w + lane % 8) + 32 * (2 * tile + half) + 16 * part);
      }
    }
  }
  ptx::sync_warp();  // all of the strip is read
  const auto* fragment = reinterpret_cast<const ptx::Vec<uint32_t, 4>*>(matrix) + lane;
#pragma unroll 1
  for (int m = 0; m < tiles; ++m) {
    float y[kWidth][4] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= tiles) continue;
      const auto high = ptx::load_global_constant(fragment);
      const uint32_t a[4] = {high[0], high[1], high[2], high[3]};
      if (parts == 2) {
        const auto low = ptx::load_global_constant(fragment + 32);
        const uint32_t errors[4] = {low[0], low[1], low[2], low[3]};
#pragma unroll
        for (int w = 0; w < kWidth; ++w) BFloat16::mma(y[w], errors, {x[tile][w][0], x[tile][w][1]});
      }
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        BFloat16::mma(y[w], a, {x[tile][w][2], x[tile][w][3]});
        BFloat16::mma(y[w], a, {x[tile][w][0], x[tile][w][1]});
      }
      fragment += 32 * parts;
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int row = 16 * m + 8 * lower + g;
        const float first = y[w][2 * lower], second = y[w][2 * lower + 1];
        if constexpr (kLeft) {
          uint32_t high, low;
          RowBuffer::split(first, second, high, low);
          const ptx::shared_t to = buffer.line(line + row) + 32 * (chunk + w) + 4 * t;
          ptx::store_shared(to, high);
          ptx::store_shared(to + 16, low);
        } else {
          const int from = line + 8 * w + 2 * t;
          ptx::store_shared(buffer.line(from) + 4 * row, first);
          ptx::store_shared(buffer.line(from + 1) + 4 * row, second);
        }
      }
    }
  }
}

// The whole row. All threads come; the row is ready after the next barrier.
template <bool kLeft, int kTiles>
TERSOR_DEVICE void multiply_row(const QuantizeRowsArguments& a, const RowBuffer& buffer) {
  constexpr int width = kTiles > 8 ? 1 : 2;  // as many registers of x
  const int tiles = ((kLeft ? a.rows : a.columns) + 15) / 16, row_lines = (a.rows + 15) / 16 * 16;
  const int across = (kLeft ? (a.columns + 15) / 16 * 16 : a.lines) / (8 * width);  // strips, for left of each matrix
  const int strips = kLeft ? across * (a.lines / row_lines) : across;
  const uint32_t* const matrix = kLeft ? a.left : a.right;
  const int parts = kLeft ? a.left_parts : 2;
  for (int i = threadIdx.x / 32; i < strips; i += kQuantizeThreads / 32) {
    const int line = kLeft ? i / across * row_lines : 8 * width * i, chunk = kLeft ? width * (i % across) : 0;
    multiply_strip<kLeft, kTiles, width>(buffer, matrix, parts, tiles, line, chunk);
  }
}

}  // namespace tersor
