// simd_int8.h for AVX-512 VNNI: vpdpbusd adds four products to a 32-bit sum, exactly, whatever the bits.
#pragma once

namespace tersor::TERSOR_ISA {

TERSOR_INLINE i32 magnitude(f32 x) {
  return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff))};
}
TERSOR_INLINE i32 max_i32(i32 x, i32 y) { return {_mm512_max_epi32(x.v, y.v)}; }
TERSOR_INLINE i32 add_i32(i32 x, i32 y) { return {_mm512_add_epi32(x.v, y.v)}; }
TERSOR_INLINE i32 mul_i32(i32 x, i32 y) { return {_mm512_mullo_epi32(x.v, y.v)}; }
TERSOR_INLINE i32 load_u8_i32(const void* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
TERSOR_INLINE uint32_t reduce_max(i32 x) {
  const __m256i s = _mm256_max_epi32(_mm512_castsi512_si256(x.v), _mm512_extracti64x4_epi64(x.v, 1));
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1))));
}
TERSOR_INLINE f32 div(f32 x, f32 y) { return {_mm512_div_ps(x.v, y.v)}; }
TERSOR_INLINE f32 limit(f32 x, float low, float high) {
  return {_mm512_max_ps(_mm512_min_ps(x.v, _mm512_set1_ps(high)), _mm512_set1_ps(low))};
}
TERSOR_INLINE i32 round_within(f32 x, float low, float high) { return {_mm512_cvtps_epi32(limit(x, low, high).v)}; }
TERSOR_INLINE i32 float_bits(f32 x) { return {_mm512_castps_si512(x.v)}; }

constexpr int dot_kind(int) { return 8; }

template <int kind>
struct Int8Dot {
  static constexpr int words = 8, parts = 1;
  using Weights = i32;
  using Activation = i32;

  static int pack(i32 low, i32 high, int centre, uint32_t* block) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    __m128i* bytes = reinterpret_cast<__m128i*>(block);
    _mm_storeu_si128(bytes, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(low.v), order));
    _mm_storeu_si128(bytes + 1, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(high.v), order));
    const __m512i both = _mm512_add_epi32(low.v, high.v);
    const __m256i s = _mm256_add_epi32(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1));
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    const int total = _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
    block[words] = static_cast<uint32_t>(-centre * total);
    return total;
  }
  TERSOR_INLINE Weights weights(i32 bytes) { return bytes; }
  TERSOR_INLINE Activation activation(const uint32_t* block, int t) { return splat_i32(block[t]); }
  TERSOR_INLINE i32 start(uint32_t correction) { return splat_i32(correction); }
  TERSOR_A8_INLINE i32 step(i32 acc, Weights w, Activation x) { return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)}; }
  TERSOR_INLINE i32 widen(i32 acc) { return acc; }
  static constexpr bool scales_runs = false;
  TERSOR_INLINE i32 pairs(i32 scales) { return scales; }
  TERSOR_INLINE i32 widen(i32 acc, i32) { return acc; }
};

// 32 registers: 8 rows x 2 tiles of sums, 2 of weights, 1 activation; the float sums are in memory then.
constexpr int kA8DecodeRows = 4, kA8PanelRows = 8, kA8PanelTiles = 2;
constexpr int kLimbRows = 0, kLimbBits = 0;
constexpr int a8_decode_strips(int) { return 2; }

}  // namespace tersor::TERSOR_ISA
