// The AVX-512 intrinsics that simd_avx512.h and the kernels use, through SIMDe: for tests on machines
// without AVX-512, never shipped. What SIMDe 0.7.4 lacks is written here from the instructions'
// published definitions, lane by lane; a newer SIMDe's own version is replaced as well.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstdint>
#include <cstring>

namespace tersor::TERSOR_ISA {

template <class To, class From>
static inline To emulated_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same bits, other type");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class T, int n>
struct EmulatedLanes {
  T lane[n];
};

// vcvtdq2ps zmm
static inline __m512 emulated_cvtepi32_ps(__m512i a) {
  const auto in = emulated_bits<EmulatedLanes<__m256i, 2>>(a);
  return emulated_bits<__m512>(
      EmulatedLanes<__m256, 2>{{_mm256_cvtepi32_ps(in.lane[0]), _mm256_cvtepi32_ps(in.lane[1])}});
}
// vpmovzxwd zmm, ymm
static inline __m512i emulated_cvtepu16_epi32(__m256i a) {
  const auto in = emulated_bits<EmulatedLanes<uint16_t, 16>>(a);
  EmulatedLanes<uint32_t, 16> out;
  for (int i = 0; i < 16; ++i) out.lane[i] = in.lane[i];
  return emulated_bits<__m512i>(out);
}
// vpmovzxbd zmm, xmm
static inline __m512i emulated_cvtepu8_epi32(__m128i a) {
  const auto in = emulated_bits<EmulatedLanes<uint8_t, 16>>(a);
  EmulatedLanes<uint32_t, 16> out;
  for (int i = 0; i < 16; ++i) out.lane[i] = in.lane[i];
  return emulated_bits<__m512i>(out);
}
// vpmovdw ymm, zmm: the low halves
static inline __m256i emulated_cvtepi32_epi16(__m512i a) {
  const auto in = emulated_bits<EmulatedLanes<uint32_t, 16>>(a);
  EmulatedLanes<uint16_t, 16> out;
  for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<uint16_t>(in.lane[i]);
  return emulated_bits<__m256i>(out);
}
// vcvtph2ps zmm, ymm
static inline __m512 emulated_cvtph_ps(__m256i a) {
  const auto in = emulated_bits<EmulatedLanes<__m128i, 2>>(a);
  return emulated_bits<__m512>(EmulatedLanes<__m256, 2>{{_mm256_cvtph_ps(in.lane[0]), _mm256_cvtph_ps(in.lane[1])}});
}
// vcvtps2ph ymm, zmm, rounding to nearest even
static inline __m256i emulated_cvtps_ph(__m512 a) {
  const auto in = emulated_bits<EmulatedLanes<__m256, 2>>(a);
  return emulated_bits<__m256i>(EmulatedLanes<__m128i, 2>{{_mm256_cvtps_ph(in.lane[0], _MM_FROUND_TO_NEAREST_INT),
                                                           _mm256_cvtps_ph(in.lane[1], _MM_FROUND_TO_NEAREST_INT)}});
}
// vcvtps2dq zmm: to nearest even; out of range and NaN give 0x80000000
static inline __m512i emulated_cvtps_epi32(__m512 a) {
  const auto in = emulated_bits<EmulatedLanes<__m256, 2>>(a);
  return emulated_bits<__m512i>(
      EmulatedLanes<__m256i, 2>{{_mm256_cvtps_epi32(in.lane[0]), _mm256_cvtps_epi32(in.lane[1])}});
}
// vpmovdb xmm, zmm: the low bytes
static inline __m128i emulated_cvtepi32_epi8(__m512i a) {
  const auto in = emulated_bits<EmulatedLanes<uint32_t, 16>>(a);
  EmulatedLanes<uint8_t, 16> out;
  for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<uint8_t>(in.lane[i]);
  return emulated_bits<__m128i>(out);
}
// vextractf32x8
static inline __m256 emulated_extractf32x8_ps(__m512 a, int half) {
  return emulated_bits<EmulatedLanes<__m256, 2>>(a).lane[half];
}

}  // namespace tersor::TERSOR_ISA

#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#define _mm512_cvtepi32_ps(a) emulated_cvtepi32_ps(a)
#define _mm512_cvtepu16_epi32(a) emulated_cvtepu16_epi32(a)
#define _mm512_cvtepu8_epi32(a) emulated_cvtepu8_epi32(a)
#define _mm512_cvtepi32_epi16(a) emulated_cvtepi32_epi16(a)
#define _mm512_cvtps_epi32(a) emulated_cvtps_epi32(a)
#define _mm512_cvtepi32_epi8(a) emulated_cvtepi32_epi8(a)
#define _mm512_cvtph_ps(a) emulated_cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) emulated_cvtps_ph(a)
#define _mm512_extractf32x8_ps(a, half) emulated_extractf32x8_ps(a, half)
