// The one inner loop of attention over a cache: out[r] = sum over the depth of coefficient[r][i] * 16 codes (or raw
// values). Keys: the depth is channels, lanes are tokens; values: the depth is tokens, lanes are channels. What is
// loaded and unpacked is shared by the rows, which are the query heads of one key head.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/kv_layout.h"
#include "cpu/simd.h"

namespace tersor::TERSOR_ISA {

#if defined(TERSOR_EMULATED)
#define TERSOR_LAMBDA
#else
#define TERSOR_LAMBDA __attribute__((always_inline))
#endif

// How 16 numbers are stored: dtypes of raw pages, then bits, then bits of levels, then float8.
enum Kind { kFloat32, kBfloat16, kFloat16, kCodes8, kCodes4, kCodes3, kCodes2, kLevels4, kLevels3, kLevels2, kE4m3 };
constexpr bool is_raw(int kind) { return kind <= kFloat16; }
constexpr int kind_bits(int kind) {
  return kind == kCodes8 || kind == kE4m3 ? 8 : kind == kCodes4 || kind == kLevels4 ? 4
       : kind == kCodes3 || kind == kLevels3 ? 3 : 2;
}
static inline Kind kind_of(const tersor_kv& kv, int64_t bits, int64_t coding) {
  if (bits == 16) return static_cast<Kind>(kv.dtype);
  if (coding == TERSOR_KV_E4M3) return kE4m3;
  const bool levels = coding == TERSOR_KV_LEVELS;
  return bits == 8 ? kCodes8 : bits == 4 ? (levels ? kLevels4 : kCodes4) : bits == 3 ? (levels ? kLevels3 : kCodes3)
                             : (levels ? kLevels2 : kCodes2);
}

// Levels in units of the scale above the minimum, repeated to 16.
static inline void level_positions(const int8_t* levels, int64_t bits, float* table) {
  const int count = 1 << bits;
  for (int i = 0; i < 16; ++i) table[i] = static_cast<float>(levels[i % count] + 127) * ((count - 1) / 254.0f);
}

// Two sums of one row hide the latency of fma where there are too few rows for that.
template <int rows>
constexpr int kv_chains = rows == 1 ? 4 : rows == 2 ? 2 : 1;

template <int... i, class Body>
TERSOR_INLINE void kv_unroll(std::integer_sequence<int, i...>, const Body& body) {
  (body(std::integral_constant<int, i>()), ...);
}
template <int n, class Body>
TERSOR_INLINE void kv_unroll(const Body& body) {
  kv_unroll(std::make_integer_sequence<int, n>(), body);
}

template <int rows>
struct KvSums {
  f32 sum[rows][kv_chains<rows>];
  TERSOR_INLINE void none(KvSums& s) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < kv_chains<rows>; ++c) s.sum[r][c] = zero();
    }
  }
  TERSOR_INLINE void store_to(const KvSums& s, f32* out) {
    for (int r = 0; r < rows; ++r) {
      f32 total = s.sum[r][0];
      for (int c = 1; c < kv_chains<rows>; ++c) total = add(total, s.sum[r][c]);
      out[r] = total;
    }
  }
  template <int chain>
  TERSOR_INLINE void take(KvSums& s, f32 x, const float* coefficients, int64_t ld) {
    for (int r = 0; r < rows; ++r) {
      f32& to = s.sum[r][chain % kv_chains<rows>];
      to = fma(splat(coefficients[r * ld]), x, to);
    }
  }
};

// What a code stands for, before scale and minimum.
template <int kind>
TERSOR_INLINE f32 code_value(i32 code, const f32& table) {
  if constexpr (kind == kE4m3) {
    const i32 high = sll<20>(code);  // the exponent and mantissa in place, the exponent too small by 120
    const i32 bits = or_(and_(high, 0x07f00000u), and_(sll<4>(high), 0x80000000u));
    return mul(as_f32(bits), splat(0x1p120f));
  } else if constexpr (kind >= kLevels4) {
    return lookup_f32<kind_bits(kind)>(table, code);
  } else {
    (void)table;
    return to_f32(code);
  }
}

// Calls body(c, i, 16 values) for each depth i; c is i modulo something, as a constant. The depth is a multiple of 16.
template <int kind, class Body>
TERSOR_INLINE void kv_each_code(const uint32_t* words, int64_t depth, const f32& table, const Body& body) {
  constexpr int bits = kind_bits(kind);
  if constexpr (bits == 3) {
    const uint32_t* thirds = words + depth;  // depth/16 words of 16 lanes
    for (int64_t i = 0; i < depth; i += 32, thirds += 16) {
      const i32 high = load_i32(thirds);
      const i32 first = load_i32(words + i);
      kv_unroll<16>([&](auto c) TERSOR_LAMBDA {
        const i32 low = and_(srl<2 * c>(first), 3);
        const i32 third = c > 2 ? and_(srl<(c > 2 ? c - 2 : 0)>(high), 4) : and_(sll<(c > 2 ? 0 : 2 - c)>(high), 4);
        body(c, i + c, code_value<kind>(or_(low, third), table));
      });
      if (i + 16 >= depth) break;
      const i32 second = load_i32(words + i + 16);
      kv_unroll<16>([&](auto c) TERSOR_LAMBDA {
        const i32 low = and_(srl<2 * c>(second), 3);
        body(c, i + 16 + c, code_value<kind>(or_(low, and_(srl<14 + c>(high), 4)), table));
      });
    }
  } else {
    constexpr int per_word = 32 / bits;
    for (int64_t i = 0; i < depth; i += per_word, words += 16) {
      const i32 word = load_i32(words);
      kv_unroll<per_word>([&](auto c) TERSOR_LAMBDA {
        body(c, i + c, code_value<kind>(and_(srl<bits * c>(word), (1u << bits) - 1), table));
      });
    }
  }
}

// Raw values: 16 of them at every `stride` bytes. Codes: words that follow one another.
template <int kind, int rows>
TERSOR_INLINE void kv_dot(const char* x, int64_t stride, int64_t depth, const float* coefficients, int64_t ld,
                          const f32& table, f32* out) {
  using Sums = KvSums<rows>;
  Sums s;
  Sums::none(s);
  if constexpr (is_raw(kind)) {
    int64_t i = 0;
    for (; i + 4 <= depth; i += 4) {
      kv_unroll<4>([&](auto c) TERSOR_LAMBDA {
        Sums::template take<c>(s, load_as(x + (i + c) * stride, kind), coefficients + i + c, ld);
      });
    }
    for (; i < depth; ++i) Sums::template take<0>(s, load_as(x + i * stride, kind), coefficients + i, ld);
  } else {
    kv_each_code<kind>(reinterpret_cast<const uint32_t*>(x), depth, table, [&](auto c, int64_t i, f32 code)
                       TERSOR_LAMBDA { Sums::template take<c>(s, code, coefficients + i, ld); });
  }
  Sums::store_to(s, out);
}

constexpr int kRows = 16;                                                // queries of one item
constexpr int kBlock = kPanelRows >= 12 ? 8 : kPanelRows >= 6 ? 4 : 2;  // rows whose sums fit the registers

// Calls take(row, 16 sums) for each row.
template <int kind, int block, class Take>
TERSOR_INLINE void dot_rows(const char* x, int64_t stride, int64_t depth, const float* coefficients, int64_t ld,
                            int rows, const f32& table, const Take& take) {
  int r = 0;
  f32 out[block];
  for (; r + block <= rows; r += block) {
    kv_dot<kind, block>(x, stride, depth, coefficients + r * ld, ld, table, out);
    for (int i = 0; i < block; ++i) take(r + i, out[i]);
  }
  if constexpr (block > 1) {
    if (r < rows) {
      dot_rows<kind, block / 2>(x, stride, depth, coefficients + r * ld, ld, rows - r, table,
                                [&](int i, f32 sum) TERSOR_LAMBDA { take(r + i, sum); });
    }
  }
}

#define TERSOR_KINDS(function) \
  {function<kFloat32>, function<kBfloat16>, function<kFloat16>, function<kCodes8>, function<kCodes4>, \
   function<kCodes3>, function<kCodes2>, function<kLevels4>, function<kLevels3>, function<kLevels2>, function<kE4m3>}

}  // namespace tersor::TERSOR_ISA
