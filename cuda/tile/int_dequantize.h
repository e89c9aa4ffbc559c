// Integer codes to 16-bit integers code - zero_point, exactly: no scale enters, nothing is rounded.
//
//   A code is merged by lop3 into the low mantissa bits of a magic number whose unit in the last place is 1:
//     f16   0x6400 = 1024:  (code | 0x6400) - (1024 + zero)                      two instructions for two codes
//     bf16  0x4300 = 128:   (code | 0x4300) - (128 + zero)   codes below 128, 128 + zero <= 256
//     bf16, 8 bits: by fp32, 0x4b000000 = 2^23 takes the byte, the difference is rounded to bf16: <= 8 bits, exact
//   f16 takes a code also at bit `width` (1024 + code * 2^width, then one fma by 2^-width): a dword of a single
//   4-bit or 2-bit plane needs one shift for four pairs instead of three.
#pragma once

#include "tile/int_tile.h"
#include "tile/number.h"

namespace tersor {

constexpr uint32_t kMergeMasked = (0xf0 & 0xcc) | 0xaa;  // lop3: (a & b) | c

// Shifts right by a positive, left by a negative constant.
template <int kShift>
TERSOR_DEVICE uint32_t shift_right(uint32_t value) {
  return kShift >= 0 ? value >> (kShift >= 0 ? kShift : 0) : value << (kShift >= 0 ? 0 : -kShift);
}

template <class Type, int kBits>
class IntDequantizer {
 public:
  using Fragment = IntFragment<kBits>;

  // The zero points (0 .. 2^kBits) of the lane's four rows, one in each byte.
  TERSOR_DEVICE void set_zero_points(uint32_t four) {
    for (int row = 0; row < 4; ++row) {
      const uint32_t zero = four >> (8 * row) & 0xff;
      if constexpr (kThroughFp32) {
        magic_[row] = 0x4b000000 + zero;
      } else {
        magic_[row] = (kMagic + zero) * 0x10001;
      }
      // -(1024 / 2^width + zero) from 1024 + zero: all are integers below 2048
      if constexpr (kLifted) lifted_[row] = ptx::sub_f16x2(kLiftedSum, magic_[row]);
    }
  }

  // Codes minus zero point of row `row`: pair p is k = 2p, 2p + 1 of the lane's eight. `c`: the lane's column.
  TERSOR_DEVICE void pairs(uint32_t (&out)[4], const Fragment& codes, int row, int c) const {
    if constexpr (kThroughFp32) {
      for (int p = 0; p < 4; ++p) out[p] = through_fp32(codes.rows[p % 2][row], p, magic_[row]);
    } else if constexpr (kLifted) {
      constexpr uint32_t mask = ((1u << kBits) - 1) * 0x10001;
      const uint32_t early = codes.rows[0][row] >> lane_shift(kBits, c), late = early >> 8;
      for (int p = 0; p < 4; p += 2) {
        const uint32_t word = p == 0 ? early : late;
        out[p] = ptx::sub_f16x2(ptx::lop3<kMergeMasked>(word, mask, kMagic * 0x10001), magic_[row]);
        out[p + 1] = ptx::fma_f16x2(ptx::lop3<kMergeMasked>(word, mask << kBits, kMagic * 0x10001), kUnlift,
                                    lifted_[row]);
      }
    } else {
      uint32_t words[Fragment::kPlanes];
      for (int plane = 0; plane < Fragment::kPlanes; ++plane) words[plane] = codes.rows[plane][row];
      if constexpr (kBits < 8) shift_for_lane(words, c);
      out[0] = merged<0>(words, row);
      out[1] = merged<1>(words, row);
      out[2] = merged<2>(words, row);
      out[3] = merged<3>(words, row);
    }
  }

 private:
  static constexpr bool kThroughFp32 = Type::kIsBFloat16 && kBits == 8;
  static constexpr bool kLifted = !Type::kIsBFloat16 && (kBits == 4 || kBits == 2);
  static constexpr uint32_t kMagic = Type::kIsBFloat16 ? 0x4300 : 0x6400;
  // f16: 1024 - 1024 / 2^width, and 2^-width
  static constexpr uint32_t kLiftedSum = (kBits == 4 ? 0x6380u : 0x6200u) * 0x10001;
  static constexpr uint32_t kUnlift = (kBits == 4 ? 0x2c00u : 0x3400u) * 0x10001;

  static TERSOR_DEVICE uint32_t through_fp32(uint32_t word, int p, uint32_t magic) {
    const uint32_t low = ptx::prmt(word, 0x4b000000, p < 2 ? 0x7440 : 0x7441);
    const uint32_t high = ptx::prmt(word, 0x4b000000, p < 2 ? 0x7442 : 0x7443);
    const float base = ptx::bits_to_float(magic);
    return BFloat16::pack(ptx::bits_to_float(low) - base, ptx::bits_to_float(high) - base);
  }

  static TERSOR_DEVICE void shift_for_lane(uint32_t (&words)[Fragment::kPlanes], int c) {
    if constexpr (Fragment::kWidth0 < 4) words[0] >>= lane_shift(Fragment::kWidth0, c);
    if constexpr (Fragment::kPlanes > 1) words[1] >>= lane_shift(Fragment::kWidth1, c);
    if constexpr (Fragment::kPlanes > 2) words[2] >>= lane_shift(Fragment::kWidth2, c);
  }

  // The kWidth bits of pair kPair in a plane's word, or-ed into `base` as bits kLow and up of the codes.
  template <int kWidth, int kLow, int kPair>
  static TERSOR_DEVICE uint32_t merge(uint32_t word, uint32_t base) {
    constexpr int shift = pair_shift(kWidth, kPair) - kLow;
    constexpr uint32_t mask = (((1u << kWidth) - 1) << kLow) * 0x10001;
    return ptx::lop3<kMergeMasked>(shift_right<shift>(word), mask, base);
  }

  template <int kPair>
  TERSOR_DEVICE uint32_t merged(const uint32_t (&words)[Fragment::kPlanes], int row) const {
    uint32_t value = merge<Fragment::kWidth0, 0, kPair>(words[kBits == 8 ? kPair % 2 : 0], kMagic * 0x10001);
    if constexpr (kBits < 8) {
      if constexpr (Fragment::kPlanes > 1) value = merge<Fragment::kWidth1, Fragment::kLow1, kPair>(words[1], value);
      if constexpr (Fragment::kPlanes > 2) value = merge<Fragment::kWidth2, Fragment::kLow2, kPair>(words[2], value);
    }
    return Type::kIsBFloat16 ? ptx::sub_bf16x2(value, magic_[row]) : ptx::sub_f16x2(value, magic_[row]);
  }

  uint32_t magic_[4];
  uint32_t lifted_[kLifted ? 4 : 1];
};

}  // namespace tersor
