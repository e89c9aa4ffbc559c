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

// Raw values: 16 of them at every `stride` bytes.
template <int dtype, int rows>
TERSOR_INLINE void kv_dot_raw(const char* x, int64_t stride, int64_t depth, const float* coefficients, int64_t ld,
                              f32* out) {
  using Sums = KvSums<rows>;
  Sums s;
  Sums::none(s);
  int64_t i = 0;
  for (; i + 4 <= depth; i += 4) {
    kv_unroll<4>([&](auto c) TERSOR_LAMBDA {
      Sums::template take<c>(s, load_as(x + (i + c) * stride, dtype), coefficients + i + c, ld);
    });
  }
  for (; i < depth; ++i) Sums::template take<0>(s, load_as(x + i * stride, dtype), coefficients + i, ld);
  Sums::store_to(s, out);
}

// Codes of 8, 4, 3 or 2 bits; the depth is a multiple of 16.
template <int bits, int rows>
TERSOR_INLINE void kv_dot_codes(const uint32_t* words, int64_t depth, const float* coefficients, int64_t ld, f32* out) {
  using Sums = KvSums<rows>;
  Sums s;
  Sums::none(s);
  if constexpr (bits == 3) {
    const uint32_t* thirds = words + depth;  // depth/16 words of 16 lanes
    for (int64_t i = 0; i < depth; i += 32, thirds += 16) {
      const i32 high = load_i32(thirds);
      const i32 first = load_i32(words + i);
      kv_unroll<16>([&](auto c) TERSOR_LAMBDA {
        const i32 low = and_(srl<2 * c>(first), 3);
        const i32 third = c > 2 ? and_(srl<(c > 2 ? c - 2 : 0)>(high), 4) : and_(sll<(c > 2 ? 0 : 2 - c)>(high), 4);
        Sums::template take<c>(s, to_f32(or_(low, third)), coefficients + i + c, ld);
      });
      if (i + 16 >= depth) break;
      const i32 second = load_i32(words + i + 16);
      kv_unroll<16>([&](auto c) TERSOR_LAMBDA {
        const i32 low = and_(srl<2 * c>(second), 3);
        Sums::template take<c>(s, to_f32(or_(low, and_(srl<14 + c>(high), 4))), coefficients + i + 16 + c, ld);
      });
    }
  } else {
    constexpr int per_word = 32 / bits;
    for (int64_t i = 0; i < depth; i += per_word, words += 16) {
      const i32 word = load_i32(words);
      kv_unroll<per_word>([&](auto c) TERSOR_LAMBDA {
        const i32 code = and_(srl<bits * c>(word), (1u << bits) - 1);
        Sums::template take<c>(s, to_f32(code), coefficients + i + c, ld);
      });
    }
  }
  Sums::store_to(s, out);
}

}  // namespace tersor::TERSOR_ISA
