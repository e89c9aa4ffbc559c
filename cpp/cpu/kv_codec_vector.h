// The two loops of the codec that compilers do not make vectors of: rANS decoding, and turning [channel][token] into
// [token][channel].
#pragma once

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/float16.h"
#include "cpu/kv_codec.h"

namespace tersor::TERSOR_ISA {
namespace {

#if defined(__AVX2__)
#define TERSOR_CODEC_VECTOR 1

// Which of the next words each lane takes, for every set of lanes that ask.
struct Shares {
  uint8_t lane[256][8] = {};
  constexpr Shares() {
    for (int set = 0; set < 256; ++set) {
      uint8_t next = 0;
      for (int i = 0; i < 8; ++i) {
        lane[set][i] = next;
        next = static_cast<uint8_t>(next + (set >> i & 1));
      }
    }
  }
};
constexpr Shares shares;  // no constructor runs at loading, where nobody has asked what the machine can do

// Symbols of eight lanes; reads up to 16 bytes at `words`.
static inline __attribute__((always_inline)) __m256i advance(const uint32_t* slots, __m256i* state,
                                                             const uint8_t** words) {
  const __m256i mask = _mm256_set1_epi32(kCodecSlots - 1);
  const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(slots), _mm256_and_si256(*state, mask), 4);
  const __m256i frequency = _mm256_and_si256(_mm256_srli_epi32(entry, kCodecBits), mask);
  const __m256i x = _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(*state, kCodecBits)),
                                     _mm256_and_si256(entry, mask));
  const __m256i asks = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
  const int set = _mm256_movemask_ps(_mm256_castsi256_ps(asks));
  const __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(*words)));
  const __m256i share = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(shares.lane[set])));
  const __m256i taken = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_permutevar8x32_epi32(next, share));
  *state = _mm256_blendv_epi8(x, taken, asks);
  *words += 2 * __builtin_popcount(static_cast<unsigned>(set));
  return _mm256_srai_epi32(entry, 24);
}

static inline void decode_eight(const uint32_t* slots, uint32_t* states, const uint8_t** words, int32_t* out) {
  __m256i state = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(states));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), advance(slots, &state, words));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(states), state);
}

// Blocks of 32 symbols while their words are certain to be there; how many.
int64_t decode_blocks(const uint32_t* slots, uint32_t* states, const uint8_t** words, const uint8_t* end, int32_t* out,
                      int64_t blocks) {
  __m256i state[4];
  for (int i = 0; i < 4; ++i) state[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(states) + i);
  const uint8_t* at = *words;
  int64_t done = 0;
  for (; done < blocks && end - at >= 64; ++done, out += 32) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + i, advance(slots, &state[i], &at));
    }
  }
  for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(states) + i, state[i]);
  *words = at;
  return done;
}

static inline __attribute__((always_inline)) void store_eight(void* out, int64_t dtype, int64_t at, __m256 x) {
  if (dtype == TERSOR_FLOAT32) {
    _mm256_storeu_ps(static_cast<float*>(out) + at, x);
    return;
  }
  __m128i narrow;
  if (dtype == TERSOR_FLOAT16) {
    narrow = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  } else {  // finite numbers only
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i high =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    narrow = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + at), narrow);
}

// An 8 x 8 block: rows of `in` become columns.
static inline __attribute__((always_inline)) void turn_block(const float* in, int64_t pitch, const tersor_kv_stream& s,
                                                             int64_t at, int64_t count) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(in + i * pitch);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 8; ++i) {
    const __m256 whole = i < 4 ? _mm256_permute2f128_ps(r[i], r[i + 4], 0x20)
                               : _mm256_permute2f128_ps(r[i - 4], r[i], 0x31);
    if (i < count) store_eight(s.values, s.dtype, at + i * s.stride, whole);
  }
}
#endif

// values [dim][pitch] to the stream's [tokens][dim], rounded to its dtype.
void turn_over(const float* in, int64_t pitch, const tersor_kv_stream& s) {
  int64_t done = 0;
#if defined(TERSOR_CODEC_VECTOR)
  done = s.dim / 8 * 8;
  for (int64_t t = 0; t < s.tokens; t += 8) {
    for (int64_t c = 0; c < done; c += 8) {
      turn_block(in + c * pitch + t, pitch, s, t * s.stride + c, s.tokens - t);
    }
  }
#endif
  for (int64_t c = done; c < s.dim; ++c) {
    for (int64_t t = 0; t < s.tokens; ++t) {
      store_from_float(s.values, static_cast<int>(s.dtype), t * s.stride + c, in[c * pitch + t]);
    }
  }
}

}  // namespace
}  // namespace tersor::TERSOR_ISA
