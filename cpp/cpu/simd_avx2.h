// simd.h for AVX2, FMA and F16C: two 256-bit registers.
#pragma once

#include <immintrin.h>

#include "common/float16.h"

namespace tersor::TERSOR_ISA {

struct f32 {
  __m256 a, b;
};
struct i32 {
  __m256i a, b;
};

#define TERSOR_INLINE static inline __attribute__((always_inline))

TERSOR_INLINE i32 load_i32(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
TERSOR_INLINE void store_i32(void* p, i32 x) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a);
  _mm256_storeu_si256(q + 1, x.b);
}
TERSOR_INLINE i32 splat_i32(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
template <int n>
TERSOR_INLINE i32 srl(i32 x) {
  return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)};
}
template <int n>
TERSOR_INLINE i32 sll(i32 x) {
  return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
}
TERSOR_INLINE i32 and_(i32 x, uint32_t c) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(c));
  return {_mm256_and_si256(x.a, v), _mm256_and_si256(x.b, v)};
}
TERSOR_INLINE i32 or_(i32 x, i32 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
TERSOR_INLINE f32 to_f32(i32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
TERSOR_INLINE f32 as_f32(i32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
TERSOR_INLINE f32 splat(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
TERSOR_INLINE f32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TERSOR_INLINE f32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TERSOR_INLINE void store(float* p, f32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
TERSOR_INLINE f32 fma(f32 x, f32 y, f32 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
TERSOR_INLINE f32 mul(f32 x, f32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
TERSOR_INLINE f32 add(f32 x, f32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
TERSOR_INLINE f32 sub(f32 x, f32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
template <int bits>
TERSOR_INLINE __m256 lookup_f32(const f32& table, __m256i index) {
  if constexpr (bits == 2) return _mm256_permutevar_ps(table.a, index);
  const __m256 low = _mm256_permutevar8x32_ps(table.a, index);
  if constexpr (bits == 3) return low;
  const __m256 high = _mm256_permutevar8x32_ps(table.b, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
template <int bits>
TERSOR_INLINE f32 lookup_f32(const f32& table, i32 index) {
  return {lookup_f32<bits>(table, index.a), lookup_f32<bits>(table, index.b)};
}

TERSOR_INLINE f32 load_as(const void* p, int dtype) {
  if (dtype == TERSOR_FLOAT32) return load(static_cast<const float*>(p));
  const __m128i* q = static_cast<const __m128i*>(p);
  const __m128i low = _mm_loadu_si128(q), high = _mm_loadu_si128(q + 1);
  if (dtype == TERSOR_FLOAT16) return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16))};
}
TERSOR_INLINE f32 load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

TERSOR_INLINE __m128i to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // a NaN must not round to Inf
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
static inline void store_as(void* p, int dtype, f32 x, int count) {
  if (dtype == TERSOR_FLOAT32 && count == 16) {
    store(static_cast<float*>(p), x);
    return;
  }
  if (dtype == TERSOR_FLOAT32) {
    float values[16];
    store(values, x);
    std::memcpy(p, values, size_t(4) * count);
    return;
  }
  const __m128i low = dtype == TERSOR_BFLOAT16 ? to_bf16(x.a) : _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = dtype == TERSOR_BFLOAT16 ? to_bf16(x.b) : _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT);
  __m128i values[2] = {low, high};
  if (count == 16) {
    std::memcpy(p, values, 32);
  } else {
    std::memcpy(p, values, size_t(2) * count);
  }
}
TERSOR_INLINE float reduce_add(f32 x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

// 16 registers. Panel: 6 rows x 2 hold the sums of a tile, 2 its weights, 1 the activation. Fused needs
// one more for a mask: with 6 rows, or 4 chains of one row, a sum would live on the stack, and the
// trip through memory then bounds the loop (measured: half the speed).
constexpr int kFusedRows = 5, kPanelRows = 6, kPanelTiles = 1, kChains = 2;

using Native = __m256;
#define TERSOR_NATIVE_CONSTRAINT "+x"
TERSOR_INLINE Native native_splat(float x) { return _mm256_set1_ps(x); }
TERSOR_INLINE Native native_fma(Native x, Native y, Native z) { return _mm256_fmadd_ps(x, y, z); }

// u8 x s8 pairs to 16 bits, added in 16 bits: the most that AVX2 does for codes small enough to be summed so. Widening
// every product to 32 bits at once would halve it.
static inline double native_int8_loop(long rounds) {
  __m256i acc[8];
  for (int i = 0; i < 8; ++i) acc[i] = _mm256_set1_epi16(i);
  __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(-2);
  for (long round = 0; round < rounds * 100; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      asm volatile("" : "+x"(a));  // an operand that may have changed: each product is computed anew
      acc[i] = _mm256_add_epi16(acc[i], _mm256_maddubs_epi16(a, b));
    }
  }
  for (int i = 0; i < 8; ++i) asm volatile("" : : "x"(acc[i]));
  return 2.0 * 8 * 32 * 100 * rounds;
}
static inline double native_bf16_loop(long) { return 0; }

}  // namespace tersor::TERSOR_ISA
