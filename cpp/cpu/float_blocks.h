// e2m1 and e4m3 in blocks of 64 codes, as one or few tokens read them: decoded where they lie in 32 bytes, which leaves
// them in an order of its own (activations are brought into it once), with the scale taken to their sums.
//
// The sixteen numbers of e2m1 are exact in bfloat16: two byte shuffles give both bytes of each, and a bfloat16 is the
// upper half of a float. e4m3 becomes a half-precision number 2^8 times smaller, as in float_linear.cpp.
#pragma once

#include <cstring>

#include "cpu/float_linear.h"
#include "cpu/simd.h"

#if defined(__AVX2__)
namespace tersor::TERSOR_ISA {

constexpr int64_t kBlockCodes = 64;

// What the vectors below hold, in their order: the number `lane` of vector v of e2m1 is
// 32 (lane / 4) + 16 (v / 4) + 4 (lane % 4) + 2 (v % 2) + v / 2 % 2 of the block, a transposition of sixteen.
TERSOR_INLINE void interleave_e2m1(float* x) {
  float natural[kBlockCodes];
  std::memcpy(natural, x, sizeof natural);
  for (int part = 0; part < 4; ++part) {
    const float* const from = natural + 16 * part;
    float* const to = x + 32 * (part % 2) + 4 * (part / 2);
    __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + 4), c = _mm_loadu_ps(from + 8), d = _mm_loadu_ps(from + 12);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, a);
    _mm_storeu_ps(to + 16, b);
    _mm_storeu_ps(to + 8, c);
    _mm_storeu_ps(to + 24, d);
  }
}

// Of e4m3 it is 32 (v / 4) + 16 (v % 2) + 2 lane + v / 2 % 2: even and odd numbers of sixteen apart.
TERSOR_INLINE void interleave_e4m3(float* x) {
  float natural[kBlockCodes];
  std::memcpy(natural, x, sizeof natural);
  for (int part = 0; part < 4; ++part) {
    const __m256 a = _mm256_loadu_ps(natural + 16 * part), b = _mm256_loadu_ps(natural + 16 * part + 8);
    const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    float* const to = x + 32 * (part / 2) + 8 * (part % 2);
    _mm256_storeu_ps(to, _mm256_shuffle_ps(low, high, 0x88));
    _mm256_storeu_ps(to + 16, _mm256_shuffle_ps(low, high, 0xdd));
  }
}

// Floats of a block of e2m1: the vectors 0 to 3 hold the first halves of both 32 codes, 4 to 7 the second.
TERSOR_INLINE void decode_block_e2m1(const uint8_t* codes, __m256 (&out)[8]) {
  const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(  // 0 0.5 1 1.5 2 3 4 6
      0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -0x80, -0x41, -0x41, -0x41, -0x40, -0x40, -0x40, -0x40));
  const __m256i lower = _mm256_broadcastsi128_si256(_mm_setr_epi8(
      0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40, 0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40));
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), mask = _mm256_set1_epi8(15);
  const __m256i high_word = _mm256_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {
    const __m256i index = _mm256_and_si256(odd ? _mm256_srli_epi16(x, 4) : x, mask);
    const __m256i low = _mm256_shuffle_epi8(lower, index), high = _mm256_shuffle_epi8(upper, index);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i words = half ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
      out[4 * half + 2 * odd] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
      out[4 * half + 2 * odd + 1] = _mm256_castsi256_ps(_mm256_and_si256(words, high_word));
    }
  }
}

// Floats of a block of e4m3, 2^8 times smaller: the vectors 0 to 3 hold the first 32 codes, 4 to 7 the others.
TERSOR_INLINE void decode_block_e4m3(const uint8_t* codes, __m256 (&out)[8]) {
  const __m256i fields = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));  // a sign, a gap, seven bits
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * half));
    const __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 1), fields);
    const __m256i odd = _mm256_and_si256(_mm256_srai_epi16(x, 1), fields);
    out[4 * half] = _mm256_cvtph_ps(_mm256_castsi256_si128(even));
    out[4 * half + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(even, 1));
    out[4 * half + 2] = _mm256_cvtph_ps(_mm256_castsi256_si128(odd));
    out[4 * half + 3] = _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1));
  }
}

// The scales of a block's units, for both halves of its vectors.
template <int unit>
TERSOR_INLINE void scales_of_e2m1(const float* scales, __m256 (&out)[2]) {
  const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(scales));
  if constexpr (unit == 32) {
    out[0] = out[1] = _mm256_permutevar_ps(all, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  } else {
    out[0] = _mm256_permutevar_ps(all, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
    out[1] = _mm256_permutevar_ps(all, _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3));
  }
}

}  // namespace tersor::TERSOR_ISA
#endif
