// Host versions of the warp-wide products of 8-, 6- and 4-bit floats.
#include "emulation/matrix_float.h"

#include <cmath>
#include <cstring>

#include "emulation/internal.h"

namespace tersor {
namespace emulation {
namespace {

// A number of `exponent_bits` and `mantissa_bits` below a sign; subnormals, no infinities.
float small_float(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const uint32_t whole = exponent == 0 ? mantissa : mantissa + (1u << mantissa_bits);
  const float value = std::ldexp(static_cast<float>(whole), (exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
  return bits >> (exponent_bits + mantissa_bits) & 1 ? -value : value;
}

float e4m3(uint32_t bits) { return (bits & 127) == 127 ? NAN : small_float(bits, 4, 3); }
float e2m1(uint32_t bits) { return small_float(bits, 2, 1); }
// In the byte that a product of mixed elements has for each: six bits at the bottom, four in the middle. NaN where the
// padding is not zero, which no kernel should leave to the machine.
float e2m3_in_byte(uint32_t bits) { return bits & 0xc0 ? NAN : small_float(bits, 2, 3); }
float e2m1_in_byte(uint32_t bits) { return bits & 0xc3 ? NAN : e2m1(bits >> 2); }
float e8m0(uint32_t bits) { return bits == 255 ? NAN : std::ldexp(1.0f, static_cast<int>(bits) - 127); }

void finish(Warp& warp) {
  const FloatMma kind = static_cast<FloatMma>(warp.detail - mma_kinds * 2);
  const int mixed = static_cast<int>(kind) - static_cast<int>(FloatMma::m16n8k32_mx_e4m3_e4m3);  // < 0: one of others
  const bool scaled = kind != FloatMma::m16n8k32_e4m3, narrow = scaled && mixed < 0;
  const int bits = narrow ? 4 : 8, in_register = 32 / bits, k = 8 * in_register;
  const int block = kind == FloatMma::m16n8k64_nvf4 ? 16 : 32;
  count_float_mma(static_cast<int>(kind));
  // Element i of lane's register r of an operand whose registers start at `first`: 0 is A's, 4 B's.
  const auto element = [&](int lane, int first, int r, int i) {
    const uint32_t code = warp.in[lane][first + r] >> (bits * i) & ((1u << bits) - 1);
    const int type = mixed < 0 ? 0 : first == 0 ? mixed % 3 : mixed / 3;  // e4m3, e2m3, e2m1
    return narrow ? e2m1(code) : type == 0 ? e4m3(code) : type == 1 ? e2m3_in_byte(code) : e2m1_in_byte(code);
  };
  const auto scale = [&](int lane, int word, int column) {
    if (!scaled) return 1.0f;
    const uint32_t code = warp.in[lane][word] >> (8 * (column / block)) & 255;
    return block == 32 ? e8m0(code) : e4m3(code & 127);
  };
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      uint32_t& target = warp.out[m % 8 * 4 + n / 2][m / 8 * 2 + n % 2];
      float sum;
      std::memcpy(&sum, &target, 4);
      for (int column = 0; column < k; ++column) {
        const int half = column / (k / 2), c = column % (k / 2) / in_register, i = column % in_register;
        const float a = element(m % 8 * 4 + c, 0, 2 * half + m / 8, i), b = element(n * 4 + c, 4, half, i);
        const double factors = static_cast<double>(scale(m % 8 * 4 + m / 8, 6, column)) * scale(n * 4, 7, column);
        sum += static_cast<float>(static_cast<double>(a) * b * factors);
      }
      if (sum != sum) {
        target = 0x7fffffff;
      } else {
        std::memcpy(&target, &sum, 4);
      }
    }
}

}  // namespace

void mma(FloatMma kind, float* d, const uint32_t* a, const uint32_t* b, uint32_t scale_a, uint32_t scale_b) {
  Warp& warp = *current->warp;
  const int lane = current->lane;
  std::memcpy(&warp.in[lane][0], a, 16);
  std::memcpy(&warp.in[lane][4], b, 8);
  warp.in[lane][6] = scale_a;
  warp.in[lane][7] = scale_b;
  std::memcpy(warp.out[lane], d, 16);
  // Details below are taken by the kinds of runtime.h, two for each.
  collective(Collective::mma, static_cast<uint32_t>(kind) + mma_kinds * 2, finish);
  std::memcpy(d, warp.out[lane], 16);
}

}  // namespace emulation
}  // namespace tersor
