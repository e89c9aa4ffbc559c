// simd_int8.h for AVX2: vpmaddubsw to 16 bits up to 7 bits, where a pair of products cannot saturate
// (2 * 127 * 127 = 32258); vpmaddwd for 8 bits.
#pragma once

namespace tersor::TERSOR_ISA {

TERSOR_INLINE i32 magnitude(f32 x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), mask), _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
}
TERSOR_INLINE i32 max_i32(i32 x, i32 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
TERSOR_INLINE uint32_t reduce_max(i32 x) {
  const __m256i s = _mm256_max_epi32(x.a, x.b);
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xb1))));
}
TERSOR_INLINE f32 div(f32 x, f32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
TERSOR_INLINE f32 limit(f32 x, float low, float high) {
  const __m256 bottom = _mm256_set1_ps(low), top = _mm256_set1_ps(high);
  return {_mm256_max_ps(_mm256_min_ps(x.a, top), bottom), _mm256_max_ps(_mm256_min_ps(x.b, top), bottom)};
}
TERSOR_INLINE i32 round_within(f32 x, float low, float high) {
  const f32 within = limit(x, low, high);
  return {_mm256_cvtps_epi32(within.a), _mm256_cvtps_epi32(within.b)};
}
TERSOR_INLINE i32 float_bits(f32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
TERSOR_INLINE i32 add_i32(i32 x, i32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }

TERSOR_INLINE i32 mul_i32(i32 x, i32 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
TERSOR_INLINE i32 load_u8_i32(const void* p) {
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}

// 32 codes as bytes, in the order of the layout: {0, 4, 1, 5, 2, 6, 3, 7} of each eight k.
TERSOR_INLINE __m256i bytes_in_order(i32 low, i32 high) {
  // After packing, one half holds k % 8 = 0..3, the other 4..7: interleaving them is the order wanted.
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(low.a, low.b), _mm256_packs_epi32(high.a, high.b));
  const __m128i first = _mm256_castsi256_si128(packed), second = _mm256_extracti128_si256(packed, 1);
  return _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
}

constexpr int dot_kind(int bits) { return bits < 5 ? 5 : bits; }

// The compiler must not reorder a chain of sums: it would compute all products first and spill them.
TERSOR_INLINE i32 in_order(i32 x) {
  asm("" : "+x"(x.a), "+x"(x.b));
  return x;
}

template <int kind>
struct Int8Dot {
  static constexpr int run = run_length_16(kind);
  static constexpr int words = 8, parts = 8 / run;
  using Weights = i32;
  using Activation = i32;

  static int pack(i32 low, i32 high, int centre, uint32_t* block) {
    const __m256i x = bytes_in_order(low, high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block), x);
    // Per dword two sums of two activations: the lanes in which their products will be added up.
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);
    alignas(32) int16_t sums[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), pairs);
    int total = 0;
    for (int part = 0; part < parts; ++part) {
      int even = 0, odd = 0;
      for (int t = part * run; t < (part + 1) * run; ++t) {
        even += sums[2 * t];
        odd += sums[2 * t + 1];
      }
      block[words + part] = pack_pair(-centre * even, -centre * odd);
      total += even + odd;
    }
    return total;
  }
  TERSOR_INLINE Weights weights(i32 bytes) { return bytes; }
  TERSOR_INLINE Activation activation(const uint32_t* block, int t) { return splat_i32(block[t]); }
  TERSOR_INLINE i32 start(uint32_t correction) { return in_order(splat_i32(correction)); }
  TERSOR_INLINE i32 step(i32 acc, Weights w, Activation x) {
    return in_order({_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(w.a, x.a)),
                     _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(w.b, x.b))});
  }
  TERSOR_INLINE i32 widen(i32 acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(acc.a, ones), _mm256_madd_epi16(acc.b, ones)};
  }
  // Scales up to 127 in both halves of their dwords: the multiplication by ones becomes one by them.
  static constexpr bool scales_runs = true;
  TERSOR_INLINE i32 pairs(i32 scales) { return or_(scales, sll<16>(scales)); }
  TERSOR_INLINE i32 widen(i32 acc, i32 pairs) {
    return {_mm256_madd_epi16(acc.a, pairs.a), _mm256_madd_epi16(acc.b, pairs.b)};
  }
};

// Bytes 0, 2 and 1, 3 of each dword as pairs of 16-bit numbers: exact in 32 bits without a second sum.
template <>
struct Int8Dot<8> {
  static constexpr int words = 16, parts = 1;
  using Weights = struct {
    i32 even, odd;
  };
  using Activation = struct {
    __m256i even, odd;
  };

  static int pack(i32 low, i32 high, int centre, uint32_t* block) {
    const __m256i x = bytes_in_order(low, high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(block + 8), _mm256_srai_epi16(x, 8));
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), x), ones);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    const int total = _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
    block[words] = static_cast<uint32_t>(-centre * total);
    return total;
  }
  TERSOR_INLINE Weights weights(i32 bytes) { return {and_(bytes, 0x00ff00ff), high_bytes(bytes)}; }
  TERSOR_INLINE Activation activation(const uint32_t* block, int t) {
    return {_mm256_set1_epi32(static_cast<int>(block[t])), _mm256_set1_epi32(static_cast<int>(block[8 + t]))};
  }
  TERSOR_INLINE i32 start(uint32_t correction) { return in_order(splat_i32(correction)); }
  TERSOR_INLINE i32 step(i32 acc, Weights w, Activation x) {
    acc = in_order({_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.even.a, x.even)),
                    _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.even.b, x.even))});
    return in_order({_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.odd.a, x.odd)),
                     _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.odd.b, x.odd))});
  }
  TERSOR_INLINE i32 widen(i32 acc) { return acc; }

 private:
  TERSOR_INLINE i32 high_bytes(i32 x) { return {_mm256_srli_epi16(x.a, 8), _mm256_srli_epi16(x.b, 8)}; }
};

// 16 registers: 4 rows x 2 of sums, 2 of weights, 1 activation, 1 product, some float sums.
constexpr int kA8DecodeRows = 4, kA8PanelRows = 4, kA8PanelTiles = 1;
constexpr int kLimbRows = 4, kLimbBits = 7;
constexpr int a8_decode_strips(int bits) { return bits == 2 || bits == 4 ? 4 : 0; }

}  // namespace tersor::TERSOR_ISA
