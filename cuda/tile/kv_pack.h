// Groups of numbers to codes, as python/tersor/kv/formats.py has it: ranges over lanes, scales and minima, and words.
//
//   x = minimum + scale * code: the minimum is the largest float16 not above the least number, the scale the least
//   float16 that reaches the greatest, both found in double precision; a code is the nearest, halves up. What is not
//   finite makes its group's scale NaN.
#pragma once

#include <cmath>

#include "ptx/ptx.h"
#include "tile/kv_layout.h"
#include "tile/number.h"

namespace tersor {

constexpr uint32_t kNaN = 0x7e00;  // float16

TERSOR_DEVICE float f16(uint32_t bits) { return Float16::low(bits); }
// The neighbour of a finite float16 towards +-infinity.
TERSOR_DEVICE uint32_t f16_above(uint32_t bits) {
  return (bits & 0x7fff) == 0 ? 1 : bits & 0x8000 ? bits - 1 : bits + 1;
}
TERSOR_DEVICE uint32_t f16_below(uint32_t bits) {
  return (bits & 0x7fff) == 0 ? 0x8001 : bits & 0x8000 ? bits + 1 : bits - 1;
}

// What a group of numbers shares.
struct Range {
  float least, greatest;
  bool finite;
};

TERSOR_DEVICE Range empty_range() { return {3e38f, -3e38f, true}; }

// What is not finite counts as 0.
TERSOR_DEVICE void extend(Range& range, float x) {
  const bool finite = (ptx::float_to_bits(x) & 0x7f800000) != 0x7f800000;
  const float counted = finite ? x : 0.0f;
  range.finite = range.finite && finite;
  range.least = counted < range.least ? counted : range.least;
  range.greatest = counted > range.greatest ? counted : range.greatest;
}

// Over the lanes of one t, or, from 1 to 2, of one g.
TERSOR_DEVICE Range shared_range(Range range, int first = 4, int last = 16) {
  for (int mask = first; mask <= last; mask *= 2) {
    const float least = ptx::shuffle_xor(range.least, mask), greatest = ptx::shuffle_xor(range.greatest, mask);
    const uint32_t finite = ptx::shuffle_xor(uint32_t(range.finite), mask);
    range.least = least < range.least ? least : range.least;
    range.greatest = greatest > range.greatest ? greatest : range.greatest;
    range.finite = range.finite && finite != 0;
  }
  return range;
}

struct Parameters {
  uint32_t scale_bits, minimum_bits;  // float16, to be stored
  float scale, minimum, inverse;

  // The quotient by the inverse is off by less than one, and what is left over says which way.
  TERSOR_DEVICE uint32_t code(float x, float levels) const {
    const float steps = x - minimum;
    float nearest = floorf(steps * inverse + 0.5f);
    const float over = fmaf(-nearest, scale, steps);
    if (over + over >= scale) nearest += 1;
    if (over + over < -scale) nearest -= 1;
    return !(nearest > 0) || scale == 0 ? 0 : static_cast<uint32_t>(nearest > levels ? levels : nearest);
  }
};

TERSOR_DEVICE Parameters fit(const Range& range, float levels) {
  constexpr float most = 65504;
  const auto limited = [&](float x) { return x < -most ? -most : x > most ? most : x; };
  const float least = limited(range.least), greatest = limited(range.greatest);
  uint32_t minimum = Float16::pack(least, 0) & 0xffff;
  if (f16(minimum) > least) minimum = f16_below(minimum);
  double step = (double(greatest) - double(f16(minimum))) / double(levels);
  step = step < 0 ? 0 : step > most ? most : step;
  // Its float is rounded before it becomes a float16, which may be one place too high or too low.
  uint32_t scale = Float16::pack(static_cast<float>(step), 0) & 0xffff;
  if (double(f16(scale)) < step) scale = f16_above(scale);
  if (scale != 0 && double(f16(scale - 1)) >= step) --scale;
  return {range.finite ? scale : kNaN, range.finite ? minimum : 0, f16(scale), f16(minimum), 1.0f / f16(scale)};
}

// Codes of a lane's 16 pairs into its words; codes(pair) gives the two, 16 bits apart.
template <int kBits, class Codes>
TERSOR_DEVICE void pack_words(uint32_t (&words)[kBits], const Codes& codes) {
#pragma unroll
  for (int i = 0; i < kBits; ++i) words[i] = 0;
#pragma unroll
  for (int pair = 0; pair < 16; ++pair) {
    constexpr int width = kBits == 3 ? 2 : kBits;
    const uint32_t two = codes(pair);
    words[kv_pair_word(width, pair)] |= (two & ((1u << width) - 1) * 0x10001) << kv_pair_shift(width, pair);
    if (kBits == 3) words[2] |= (two >> 2 & 0x00010001) << pair;
  }
  // 8 bits are stored as signed numbers, code - 128.
  if (kBits == 8) {
#pragma unroll
    for (int i = 0; i < kBits; ++i) words[i] ^= 0x80808080;
  }
}

template <int kBits>
TERSOR_DEVICE void store_words(char* record, int lane, const uint32_t (&words)[kBits]) {
  if constexpr (kBits >= 4) {
#pragma unroll
    for (int i = 0; i < kBits; i += 4) {
      ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 4>*>(record + kv_word_offset(kBits, lane, i)),
                        ptx::Vec<uint32_t, 4>{{words[i], words[i + 1], words[i + 2], words[i + 3]}});
    }
  } else {
    ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(record + kv_word_offset(kBits, lane, 0)),
                      ptx::Vec<uint32_t, 2>{{words[0], words[1]}});
    if constexpr (kBits == 3) {
      ptx::store_global(reinterpret_cast<uint32_t*>(record + kv_word_offset(3, lane, 2)), words[2]);
    }
  }
}

// ---- codings of formats ------------------------------------------------------------------------------------------

// The nearest E4M3, ties to even, of a number up to 448; a NaN becomes 0.
TERSOR_DEVICE uint32_t e4m3_of(float x) {
  const uint32_t bits = ptx::float_to_bits(x), sign = bits >> 24 & 0x80;
  float magnitude = ptx::bits_to_float(bits & 0x7fffffff);
  if (!(magnitude <= 448.0f)) magnitude = magnitude > 448.0f ? 448.0f : 0.0f;
  if (magnitude < 0.015625f) return sign | static_cast<uint32_t>(rintf(magnitude * 512.0f));
  const uint32_t m = ptx::float_to_bits(magnitude);
  return sign | (((m + 0x7ffff + (m >> 20 & 1)) >> 20) - (120 << 3));
}
TERSOR_DEVICE float e4m3_value(uint32_t code) {
  return ptx::bits_to_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
}

// How numbers of one part of a page become codes. `positions`: levels in units of the scale, double [16] in shared
// memory (store_positions).
struct KvCoder {
  int bits, coding;
  ptx::shared_t positions;

  TERSOR_DEVICE float top() const { return static_cast<float>((1 << bits) - 1); }
  TERSOR_DEVICE Parameters fit_range(const Range& range) const {
    if (coding != kKvE4M3) return fit(range, top());
    const float largest = -range.least > range.greatest ? -range.least : range.greatest;
    return fit({0, largest, range.finite}, 448);
  }
  // The i-th of threads 0 to 15 stores one.
  TERSOR_DEVICE void store_positions(const uint32_t (&levels)[4], int i) const {
    uint32_t word = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) word |= (0u - uint32_t(i / 4 == k)) & levels[k];
    const int level = static_cast<int8_t>(word >> (8 * (i % 4)));
    ptx::store_shared(positions + 8 * i, (double(level) + 127) * (double(top()) / 254));
  }
  TERSOR_DEVICE double position(int code) const { return ptx::load_shared<double>(positions + 8 * code); }

  // In float, and in double close to the border between two levels; at a border the higher one.
  TERSOR_DEVICE uint32_t level(float x, const Parameters& p) const {
    if (p.scale == 0) return 0;
    const float units = (x - p.minimum) * p.inverse;
    uint32_t code = 0;
#pragma unroll 1
    for (int i = 0; i + 1 < 1 << bits; ++i) {
      const double border = (position(i + 1) + position(i)) / 2;
      bool above = units >= static_cast<float>(border);
      if (fabsf(units - static_cast<float>(border)) < 1e-4f) {
        above = double(x) - double(p.minimum) >= border * double(p.scale);
      }
      code += above;
    }
    return code;
  }
  // As it is stored, 8-bit integers too: with their top bit exchanged.
  TERSOR_DEVICE uint32_t code(float x, const Parameters& p) const {
    if (coding == kKvLevels) return level(x, p);
    if (coding == kKvE4M3) return p.scale == 0 ? 0 : e4m3_of(x / p.scale);
    return p.code(x, top()) ^ (bits == 8 ? 0x80 : 0);
  }
  // The number that a stored code stands for.
  TERSOR_DEVICE double value(uint32_t code, const Parameters& p) const {
    const double units = coding == kKvE4M3     ? double(e4m3_value(code))
                         : coding == kKvLevels ? position(static_cast<int>(code))
                                               : double(code ^ (bits == 8 ? 0x80 : 0));
    return units * double(p.scale) + double(p.minimum);
  }
};

// From float16 as they were stored.
TERSOR_DEVICE Parameters stored_parameters(uint32_t scale, uint32_t minimum) {
  return {scale, minimum, f16(scale), f16(minimum), 1.0f / f16(scale)};
}

}  // namespace tersor
