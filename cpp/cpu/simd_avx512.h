// simd.h for AVX-512 F, BW, VL, DQ, VNNI and BF16: one 512-bit register. With TERSOR_EMULATED the
// same text is compiled against SIMDe, so that the tests can run it anywhere.
#pragma once

#if defined(TERSOR_EMULATED)
#include "cpu/simd_emulated.h"
#else
#include <immintrin.h>
#endif

#include "common/float16.h"

namespace tersor::TERSOR_ISA {

#if defined(TERSOR_EMULATED)
// Calls instead of inlining: each intrinsic is a page of portable code.
#define TERSOR_INLINE static __attribute__((noinline, unused))
#else
#define TERSOR_INLINE static inline __attribute__((always_inline))
#endif
#define TERSOR_SIMD_BF16 1

struct f32 {
  __m512 v;
};
struct i32 {
  __m512i v;
};

TERSOR_INLINE i32 load_i32(const void* p) { return {_mm512_loadu_si512(p)}; }
TERSOR_INLINE void store_i32(void* p, i32 x) { _mm512_storeu_si512(p, x.v); }
TERSOR_INLINE i32 splat_i32(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
template <int n>
TERSOR_INLINE i32 srl(i32 x) {
  return {_mm512_srli_epi32(x.v, n)};
}
template <int n>
TERSOR_INLINE i32 sll(i32 x) {
  return {_mm512_slli_epi32(x.v, n)};
}
TERSOR_INLINE i32 and_(i32 x, uint32_t c) { return {_mm512_and_si512(x.v, _mm512_set1_epi32(static_cast<int>(c)))}; }
TERSOR_INLINE i32 or_(i32 x, i32 y) { return {_mm512_or_si512(x.v, y.v)}; }
TERSOR_INLINE f32 to_f32(i32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
TERSOR_INLINE f32 as_f32(i32 x) { return {_mm512_castsi512_ps(x.v)}; }
template <int bits>
TERSOR_INLINE f32 lookup_f32(const f32& table, i32 index) {
  return {_mm512_permutexvar_ps(index.v, table.v)};
}
TERSOR_INLINE f32 splat(float x) { return {_mm512_set1_ps(x)}; }
TERSOR_INLINE f32 zero() { return {_mm512_setzero_ps()}; }
TERSOR_INLINE f32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
TERSOR_INLINE void store(float* p, f32 x) { _mm512_storeu_ps(p, x.v); }
TERSOR_INLINE f32 fma(f32 x, f32 y, f32 z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
TERSOR_INLINE f32 mul(f32 x, f32 y) { return {_mm512_mul_ps(x.v, y.v)}; }
TERSOR_INLINE f32 add(f32 x, f32 y) { return {_mm512_add_ps(x.v, y.v)}; }
TERSOR_INLINE f32 sub(f32 x, f32 y) { return {_mm512_sub_ps(x.v, y.v)}; }

TERSOR_INLINE f32 load_as(const void* p, int dtype) {
  if (dtype == TERSOR_FLOAT32) return load(static_cast<const float*>(p));
  const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  if (dtype == TERSOR_FLOAT16) return {_mm512_cvtph_ps(h)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
TERSOR_INLINE f32 load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
static inline void store_as(void* p, int dtype, f32 x, int count) {
  if (dtype == TERSOR_FLOAT32) {
    if (count == 16) return store(static_cast<float*>(p), x);
    float values[16];
    store(values, x);
    std::memcpy(p, values, size_t(4) * count);
    return;
  }
  __m256i h;
  if (dtype == TERSOR_FLOAT16) {
    h = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT);
  } else {
    // Not vcvtneps2bf16: that one takes subnormals for zero.
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));  // a NaN must not round to Inf
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
  }
  if (count == 16) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), h);
  } else {
    uint16_t values[16];
    std::memcpy(values, &h, 32);
    std::memcpy(p, values, size_t(2) * count);
  }
}
TERSOR_INLINE float reduce_add(f32 x) {
  const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}

// --- pairs of bfloat16 ---------------------------------------------------------------------------
// acc[lane] += a.low * b.low + a.high * b.high
TERSOR_INLINE f32 dot_bf16(f32 acc, i32 a, i32 b) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}
// (a where mask has ones, else b): one vpternlogd
TERSOR_INLINE i32 select_bits(uint32_t mask, i32 a, i32 b) {
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(mask)), a.v, b.v, 0xca)};
}
// Each 16-bit index (its low 5 or 6 bits; the rest is ignored) -> a 16-bit table entry
TERSOR_INLINE i32 lookup32(const i32* table, i32 index) { return {_mm512_permutexvar_epi16(index.v, table[0].v)}; }
TERSOR_INLINE i32 lookup64(const i32* table, i32 index) {
  return {_mm512_permutex2var_epi16(table[0].v, index.v, table[1].v)};
}
TERSOR_INLINE i32 as_i32(f32 x) { return {_mm512_castps_si512(x.v)}; }

// 32 registers. Panel: 12 rows x 2 tiles of sums, 2 weights, 1 activation. Fused: 8 rows, 2 chains each.
#if defined(TERSOR_EMULATED)
constexpr int kFusedRows = 2, kFusedRowsBf16 = 8, kPanelRows = 4, kPanelTiles = 2, kChains = 4;  // quick to compile
#else
constexpr int kFusedRows = 8, kFusedRowsBf16 = 16, kPanelRows = 12, kPanelTiles = 2, kChains = 16;
#endif

using Native = __m512;
#if defined(TERSOR_EMULATED)
#define TERSOR_NATIVE_CONSTRAINT "+m"
#else
#define TERSOR_NATIVE_CONSTRAINT "+v"
#endif
TERSOR_INLINE Native native_splat(float x) { return _mm512_set1_ps(x); }
TERSOR_INLINE Native native_fma(Native x, Native y, Native z) { return _mm512_fmadd_ps(x, y, z); }

static inline double native_int8_loop(long rounds) {
  __m512i acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = _mm512_set1_epi32(i);
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
  for (long round = 0; round < rounds * 100; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
  }
  for (int i = 0; i < 12; ++i) {
    __m512i sum = acc[i];
    asm volatile("" : TERSOR_NATIVE_CONSTRAINT(sum));  // it is needed
  }
  return 2.0 * 12 * 64 * 100 * rounds;
}
static inline double native_bf16_loop(long rounds) {
  f32 acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = splat(1.0f + i);
  const i32 a = splat_i32(0x3f803f80), b = splat_i32(0x3c003c00);
  for (long round = 0; round < rounds * 100; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = dot_bf16(acc[i], a, b);
  }
  for (int i = 0; i < 12; ++i) {
    f32 sum = acc[i];
    asm volatile("" : TERSOR_NATIVE_CONSTRAINT(sum.v));  // it is needed
  }
  return 2.0 * 12 * 32 * 100 * rounds;
}

}  // namespace tersor::TERSOR_ISA
