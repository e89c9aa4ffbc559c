// e2m3 in six bits: sign, two bits of exponent with a bias of 1, three of mantissa; the bits of an f16 2^14 times
// smaller. Rows of 128 codes, 96 bytes as checkpoints store them (dense, low bits first), lie in shared memory as they
// are: in a block of 32 k the lane (g, c) finds k = 8c .. 8c + 7, 48 bits, in two of the block's six words.
//
//     words of lane c     0: 0 1   1: 2 1   2: 3 4   3: 5 4   (the order in which they are loaded)
//     pad                 a piece of 16 bytes behind each four rows, so that the lanes' rows 4g + i begin four banks
//                         apart: each load touches every bank at most once
#pragma once

#include <cstdint>

#include "ptx/ptx.h"
#include "tile/swizzle.h"

namespace tersor {

constexpr int kSixRowBytes = 96, kSixRowPieces = 6;

// Where piece `piece` of a row lies, counted from the first row in pieces of 16 bytes.
__host__ __device__ constexpr int six_piece(int row, int piece) { return 25 * (row >> 2) + 6 * (row & 3) + piece; }
// The words of a block that lane column c loads, one after the other.
__host__ __device__ constexpr int six_first_word(int c) { return 3 * (c / 2) + (c % 2 ? 2 : 0); }
__host__ __device__ constexpr int six_second_word(int c) { return 3 * (c / 2) + 1; }
constexpr bool six_words_conflict_free() {
  for (int block = 0; block < 4; ++block) {
    for (int row = 0; row < 4; ++row) {
      const auto first = [=](int g, int c) { return 4 * six_piece(4 * g + row, 0) + 6 * block + six_first_word(c); };
      const auto second = [=](int g, int c) { return 4 * six_piece(4 * g + row, 0) + 6 * block + six_second_word(c); };
      if (!conflict_free(4, first) || !conflict_free(4, second)) return false;
    }
  }
  return true;
}
static_assert(six_words_conflict_free(), "a warp's loads of six-bit codes touch each bank once");

constexpr int six_bytes(int rows) { return 16 * six_piece(rows, 0); }  // rows: a multiple of four

constexpr int kSixChoose = (0xf0 & 0xcc) | (~0xf0 & 0xaa) & 255;  // a ? b : c

class SixBits {
 public:
  explicit TERSOR_DEVICE SixBits(int c)
      : first_(4 * six_first_word(c)), second_(4 * six_second_word(c)),
        low_(c % 2 ? 0x0076 : 0x0210), high_(c % 2 ? 0x0321 : 0x0543) {}

  // Codes 0 .. 3 and 4 .. 7 of the lane in the low 24 bits of two words, numbers of no meaning above them.
  TERSOR_DEVICE void load(uint32_t (&out)[2], ptx::shared_t rows, int row, int block) const {
    const ptx::shared_t at = rows + 16 * six_piece(row, 0) + 24 * block;
    const uint32_t first = ptx::load_shared<uint32_t>(at + first_), second = ptx::load_shared<uint32_t>(at + second_);
    out[0] = ptx::prmt(first, second, low_);
    out[1] = ptx::prmt(first, second, high_);
  }

  // A byte for each of four codes, five instructions: halves of two codes, then bytes of one.
  static TERSOR_DEVICE uint32_t bytes(uint32_t four) {
    const uint32_t halves = ptx::lop3<kSixChoose>(0x0000ffff, four, four << 4);
    return ptx::lop3<kSixChoose>(0x00ff00ff, halves, halves << 2) & 0x3f3f3f3f;
  }

 private:
  const int first_, second_;
  const uint32_t low_, high_;
};

// The e2m3 code nearest to value, ties to even; |value| <= 7.5.
TERSOR_DEVICE uint32_t e2m3_code(float value) {
  const uint32_t bits = ptx::float_to_bits(value), sign = bits >> 26 & 0x20, magnitude = bits & 0x7fffffff;
  if (magnitude < 0x3f800000) {  // below 1 numbers are multiples of an eighth, the last place of 2^20
    return sign | (ptx::float_to_bits(ptx::bits_to_float(magnitude) + 1048576.0f) & 15);
  }
  return sign | (((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (126 << 3));
}

// The number that a code of e2m3 stands for.
TERSOR_DEVICE float e2m3_value(uint32_t code) {
  return ptx::unpack_f16x2((code & 0x20) << 10 | (code & 0x1f) << 7)[0] * 16384.0f;
}

}  // namespace tersor
