// Integer codes to signed bytes, in registers: four k of one row each, as mma.m16n8k32 takes them.
//
//   A byte becomes (code - 2^(bits-1)) * 2^(8-bits): the code's planes are shifted to the top of the byte, where
//   flipping the highest bit makes an unsigned code a signed one. Nothing has to be sign-extended or subtracted: 4 bits
//   take three instructions for eight codes (a shift and two lop3), and the power of two goes into the scale, exactly.
//   Zero points other than the middle are added to the sums (tile/lowbit_linear.h).
//
//   A lane's eight codes of a row become two registers: k 8c + 0 4 1 5 and 8c + 2 6 3 7 (cuda/tile/act_codes.h).
#pragma once

#include "tile/act_codes.h"
#include "tile/int_tile.h"

namespace tersor {

constexpr uint32_t kFlipMasked = (0xf0 & 0xcc) ^ 0xaa;  // lop3: (a & b) ^ c

// By how much integers in registers are larger than codes less the middle.
__host__ __device__ constexpr int lowbit_factor(int bits) { return 1 << (8 - bits); }

template <int kBits>
struct LowbitUnpacker {
  using Fragment = IntFragment<kBits>;

  // Codes `kSecond`: 0 the lane's first four (in the order of bytes), 1 the others, of row `row`; c: the lane's column.
  template <int kSecond>
  static TERSOR_DEVICE uint32_t bytes(const Fragment& codes, int row, int c) {
    if constexpr (kBits == 8) {
      return codes.rows[kSecond][row] ^ 0x80808080u;
    } else {
      uint32_t value = plane<Fragment::kWidth0, 0, kSecond>(codes.rows[0][row], c, 0x80808080u);
      if constexpr (Fragment::kPlanes > 1) {
        value = plane<Fragment::kWidth1, Fragment::kLow1, kSecond>(codes.rows[1][row], c, value);
      }
      if constexpr (Fragment::kPlanes > 2) {
        value = plane<Fragment::kWidth2, Fragment::kLow2, kSecond>(codes.rows[2][row], c, value);
      }
      return value;
    }
  }

 private:
  // The bits of one plane at their place in the byte, by exclusive or into `base`.
  template <int kWidth, int kLow, int kSecond>
  static TERSOR_DEVICE uint32_t plane(uint32_t word, int c, uint32_t base) {
    constexpr int up = kLow + 8 - kBits, shift = kWidth * kSecond - up;
    constexpr uint32_t mask = (((1u << kWidth) - 1) << up) * 0x01010101u;
    if constexpr (kWidth < 4) word >>= lane_shift(kWidth, c);
    if constexpr (shift > 0) word >>= shift;
    if constexpr (shift < 0) word <<= -shift;
    return ptx::lop3<kFlipMasked>(word, mask, base);
  }
};

}  // namespace tersor
