// Activations as e4m3 in memory: written by quantize_fp8_rows.cu, read by sm89_fp8_linear.cu.
//
//   codes   [m][K] bytes, K = 128 ceil(k / 128), zeros behind k; rows 16-byte aligned. For weights of e4m3 channels are
//           in order; for 4-bit integers each eight are 0 4 1 5 2 6 3 7, the order in which a lane finds the codes of a
//           dword of weights (act_codes.h has the same order).
//   scales  float32 [m][groups]: one for a token, or one for each 128 channels. A group that holds NaN or Inf has scale
//           NaN and codes 0.
#pragma once

#include <cstdint>

#include "ptx/ptx.h"

namespace tersor {

// The e4m3 code nearest to value, ties to even; |value| <= 448.
TERSOR_DEVICE uint32_t e4m3_code(float value) {
  const uint32_t bits = ptx::float_to_bits(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
  if (magnitude < 0x3c800000) {  // below 2^-6 numbers are multiples of 2^-9, the last place of 2^14
    return sign | (ptx::float_to_bits(ptx::bits_to_float(magnitude) + 16384.0f) & 15);
  }
  // Carries from the mantissa run into the exponent, as they should; 120 is the difference of the biases.
  return sign | (((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3));
}

// The number that a code of e4m3 stands for: its bits are those of an f16 2^8 times smaller.
TERSOR_DEVICE float e4m3_value(uint32_t code) {
  return ptx::unpack_f16x2((code & 0x80) << 8 | (code & 0x7f) << 7)[0] * 256.0f;
}

// The e2m1 code nearest to value, ties to even; |value| <= 6.
TERSOR_DEVICE uint32_t e2m1_code(float value) {
  const uint32_t bits = ptx::float_to_bits(value), sign = bits >> 28 & 8, magnitude = bits & 0x7fffffff;
  if (magnitude < 0x3f800000) {  // below 1 numbers are multiples of a half, the last place of 2^22
    return sign | (ptx::float_to_bits(ptx::bits_to_float(magnitude) + 4194304.0f) & 3);
  }
  return sign | (((magnitude + 0x1fffff + (magnitude >> 22 & 1)) >> 22) - (126 << 1));
}
// The number that a code of e2m1 stands for: its bits are those of an f16 2^14 times smaller.
TERSOR_DEVICE float e2m1_value(uint32_t code) {
  return ptx::unpack_f16x2((code & 8) << 12 | (code & 7) << 9)[0] * 16384.0f;
}

// Four 4-bit codes (one in the low half of each byte) less 8 as e4m3 numbers times 2^-9. The bits of an e4m3 number
// below 16 times its least are that multiple: 0 .. 8 need no table, and negative ones are 0x88 - (code & 7).
// `tops`: the same codes in the high halves of the bytes, whose first bit says which.
TERSOR_DEVICE uint32_t e4m3_of_int4(uint32_t codes, uint32_t tops) {
  const uint32_t low = codes & 0x07070707, positive = ptx::prmt(tops, 0, 0xba98);  // the bit in all of its byte
  constexpr uint32_t choose = (0xf0 & 0xcc) | (~0xf0 & 0xaa);                        // a ? b : c
  return ptx::lop3<choose & 255>(positive, low, 0x88888888 - low);
}

}  // namespace tersor
