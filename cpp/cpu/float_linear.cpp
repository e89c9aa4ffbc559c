// Weights of small floats (FP8, MXFP4, MXFP6, MXFP8, NVFP4) times activations as they are, compiled once per
// instruction set.
//
// Weights lie as checkpoints have them, row by row. Few tokens (kStreamed; e2m1, which decodes fastest, twice as many)
// are multiplied with what is decoded while it is in registers, lanes along k. For more, 16 rows are decoded to fp32,
// scales and all, and turned into a panel of lanes along n that stays in L1, and strips of kPanelRows tokens walk over
// it. A row of x gives the same result in every batch of few tokens, and in every batch of more, up to the last bits of
// the sums in the others.
//
// Decoding without a table: the seven low bits of e4m3 are those of a half-precision number that is 2^8 times smaller,
// and e2m1 has eight magnitudes whose half-precision numbers differ in the high byte only: one byte shuffle. The six
// bits of e2m3 are brought to the top of 16 by a byte shuffle and a multiplication, and are those of a half-precision
// number 2^14 times smaller.
#include <cmath>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/float_blocks.h"
#include "cpu/int_layout.h"
#include "cpu/simd_int8.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kChunk = 512;
constexpr int64_t kLine = kChunk + 8;  // between rows of a chunk: in step, all would lie in one bank of the cache
constexpr int kRows = 16;  // of a strip
constexpr int64_t kScales = kChunk / 16 + 16;  // of a row of a chunk, at most, and zeros
constexpr int64_t kPanel = 256;  // of k: a panel takes half of a first-level cache
constexpr int kStreamed = 4;  // tokens that are multiplied with what is decoded, times rows that are decoded together
constexpr int64_t kWorkPerThread = 1 << 17;  // products below which another thread costs more

constexpr float kE4m3Unit = 256;  // decode_e4m3 gives numbers so many times smaller
constexpr uint32_t kUnitOverflows = (127 + 120) << 23;  // the bits of 2^120: times the unit, no float32 any more
constexpr float kE2m3Unit = 16384;  // what halves of e2m3 lack
// Where scales come after the sums, tokens with numbers of 2^96 and more are multiplied at 2^-32 times their size, and
// tokens of numbers below 2^-64 at 2^32 times.
constexpr uint32_t kLarge = (127 + 96) << 23, kSmall = (127 - 64) << 23;
constexpr float kStep = int64_t(1) << 32;

#if defined(__AVX2__)
TERSOR_INLINE f32 halves(__m128i low, __m128i high) {
#if defined(TERSOR_EMULATED)
  alignas(64) float values[16];
  _mm256_storeu_ps(values, _mm256_cvtph_ps(low));
  _mm256_storeu_ps(values + 8, _mm256_cvtph_ps(high));
  return load(values);
#elif defined(TERSOR_SIMD_BF16)
  return {_mm512_cvtph_ps(_mm256_set_m128i(high, low))};
#else
  return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
#endif
}
// Sixteen values of e4m3, 2^8 times smaller: a byte's sign, then what follows it a bit further down.
TERSOR_INLINE f32 decode_e4m3(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), none = _mm_setzero_si128();
  const __m128i rest = _mm_set1_epi16(static_cast<int16_t>(0xbfff));  // but for the second copy of the sign
  const __m128i low = _mm_and_si128(_mm_srai_epi16(_mm_unpacklo_epi8(none, x), 1), rest);
  const __m128i high = _mm_and_si128(_mm_srai_epi16(_mm_unpackhi_epi8(none, x), 1), rest);
  return halves(low, high);
}
TERSOR_INLINE f32 decode_e2m1(const uint8_t* p) {
  const __m128i table = _mm_setr_epi8(0, 0x38, 0x3c, 0x3e, 0x40, 0x42, 0x44, 0x46,  // 0 0.5 1 1.5 2 3 4 6
                                      -128, -72, -68, -66, -64, -62, -60, -58);
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(x, mask), high = _mm_and_si128(_mm_srli_epi16(x, 4), mask);
  const __m128i bytes = _mm_shuffle_epi8(table, _mm_unpacklo_epi8(low, high)), none = _mm_setzero_si128();
  return halves(_mm_unpacklo_epi8(none, bytes), _mm_unpackhi_epi8(none, bytes));
}
// Of twelve bytes, the two that hold a code for each 16 bits, then the code at their top.
TERSOR_INLINE f32 decode_e2m3(const uint8_t* p) {
  int32_t last;
  std::memcpy(&last, p + 8, 4);
  const __m128i x = _mm_insert_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), last, 2);
  const __m128i pairs = _mm_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6), six = _mm_set1_epi8(6);
  const __m128i shifts = _mm_setr_epi16(1 << 10, 1 << 4, 1 << 6, 1 << 8, 1 << 10, 1 << 4, 1 << 6, 1 << 8);
  const __m128i fields = _mm_set1_epi16(static_cast<int16_t>(0x8f80));
  const __m128i low = _mm_mullo_epi16(_mm_shuffle_epi8(x, pairs), shifts);
  const __m128i high = _mm_mullo_epi16(_mm_shuffle_epi8(x, _mm_add_epi8(pairs, six)), shifts);
  return mul(halves(_mm_and_si128(_mm_srai_epi16(low, 3), fields), _mm_and_si128(_mm_srai_epi16(high, 3), fields)),
             splat(kE2m3Unit));
}
#else
TERSOR_INLINE f32 decode_e4m3(const uint8_t* p) {
  float values[16];
  for (int i = 0; i < 16; ++i) {
    const uint16_t half = static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7);
    values[i] = load_as_float(&half, TERSOR_FLOAT16, 0);
  }
  return load(values);
}
TERSOR_INLINE f32 decode_e2m1(const uint8_t* p) {
  static const float table[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = table[p[i / 2] >> (4 * (i % 2)) & 15];
  return load(values);
}
TERSOR_INLINE f32 decode_e2m3(const uint8_t* p) {
  float values[16];
  for (int i = 0; i < 16; ++i) {
    const int at = 6 * i / 8, shift = 6 * i % 8;
    const int code = (p[at] | (shift > 2 ? p[at + 1] << 8 : 0)) >> shift & 63;
    const uint16_t half = static_cast<uint16_t>((code & 0x20) << 10 | (code & 0x1f) << 7);
    values[i] = load_as_float(&half, TERSOR_FLOAT16, 0) * kE2m3Unit;
  }
  return load(values);
}
#endif

// The number of an exponent's code (OCP MX v1.0): of 0 the subnormal 2^-127, of 255 NaN.
inline float from_e8m0(uint8_t code) {
  const uint32_t edge = code == 0 || code == 255 ? 1u << 22 : 0;
  return bits_to_float(static_cast<uint32_t>(code) << 23 | edge);
}

struct Weights {
  const FloatLinearArgs& args;
  int64_t row_bytes, group, groups;  // a group's length is a multiple of 16
  int64_t in_blocks = 0;  // of k, what `stream` decodes as float_blocks.h does, with x in that order

  explicit Weights(const FloatLinearArgs& a)
      : args(a), row_bytes(div_up(a.k * element_bits(a.element), 8)),
        group(a.group < a.k ? a.group : div_up(a.k, 16) * 16), groups(div_up(a.k, group)) {
#if defined(__AVX2__)
    const bool blocks = a.element == kE2m1 || (a.element == kE4m3 && group_of_blocks() == 32);
    if (blocks && streams()) in_blocks = a.k / kBlockCodes * kBlockCodes;
#endif
  }

  bool streams() const { return args.m <= (args.element == kE2m1 ? 2 * kStreamed : kStreamed); }

  // The scales of groups [first, first + count) of a row, then zeros up to the next multiple of 16.
  void factors(int64_t row, int64_t first, int64_t count, float* out) const {
    store(out + count / 16 * 16, zero());
    const int64_t at = row / args.scale_rows * groups + first;
    const uint8_t* codes = static_cast<const uint8_t*>(args.scales) + at;  // of the kinds of a byte
    if (args.scale_kind < kScaleE8m0) {
      for (int64_t i = 0; i < count; ++i) out[i] = load_as_float(args.scales, args.scale_kind, at + i);
    } else if (args.scale_kind == kScaleE8m0) {
      for (int64_t i = 0; i < count; ++i) out[i] = from_e8m0(codes[i]);
    } else {
      for (int64_t i = 0; i < count; i += 16) {
        uint8_t padded[16] = {};
        if (i + 16 > count) std::memcpy(padded, codes + i, count - i);
        const f32 scale = mul(decode_e4m3(i + 16 > count ? padded : codes + i), splat(kE4m3Unit));
        store(out + i, div(scale, splat(args.global)));
      }
    }
  }

  // sums[t, r] += the products of tokens (x, kLine apart) and rows from `row` on over [begin, end), multiples of 16,
  // with what `decode` would give.
  template <int tokens, int rows>
  void stream(const float* x, int64_t row, int64_t begin, int64_t end, float* sums) const {
    const int64_t part = blocks_until(begin, end);
#if defined(__AVX2__)
    if (part > begin) {
      const auto stream_part = args.element == kE4m3      ? &Weights::stream_blocks<kE4m3, 32, tokens, rows>
                               : group_of_blocks() == 32 ? &Weights::stream_blocks<kE2m1, 32, tokens, rows>
                                                         : &Weights::stream_blocks<kE2m1, 16, tokens, rows>;
      (this->*stream_part)(x, row, begin, part, sums);
    }
#endif
    if (part == end) return;
    return args.element == kE2m1   ? stream_as<kE2m1, tokens, rows>(x + part - begin, row, part, end, sums)
           : args.element == kE2m3 ? stream_as<kE2m3, tokens, rows>(x + part - begin, row, part, end, sums)
                                   : stream_as<kE4m3, tokens, rows>(x + part - begin, row, part, end, sums);
  }

  // x of [begin, end) in the order of `stream`.
  void arrange(float* x, int64_t begin, int64_t end) const {
#if defined(__AVX2__)
    if (end > in_blocks) end = in_blocks;
    for (; begin < end; begin += kBlockCodes, x += kBlockCodes) {
      args.element == kE2m1 ? interleave_e2m1(x) : interleave_e4m3(x);
    }
#else
    (void)x, (void)begin, (void)end;
#endif
  }

  // Values [begin, end) of a row as floats, multiples of 16; beyond k zeros.
  void decode(int64_t row, int64_t begin, int64_t end, float* out) const {
    return args.element == kE2m1   ? decode_as<kE2m1>(row, begin, end, out)
           : args.element == kE2m3 ? decode_as<kE2m3>(row, begin, end, out)
                                   : decode_as<kE4m3>(row, begin, end, out);
  }

 private:
  // Where the codes from `at` on, a multiple of 16, begin in a row.
  template <FloatElement element>
  static constexpr int64_t byte_of(int64_t at) {
    return at / 8 * element_bits(element);
  }

  // Codes that surely share a scale, from the beginning of a block on.
  int group_of_blocks() const { return groups == 1 || group % 32 == 0 ? 32 : 16; }
  int64_t blocks_until(int64_t begin, int64_t end) const {
    return end < in_blocks ? end : begin < in_blocks ? in_blocks : begin;
  }

#if defined(__AVX2__)
  // The scales of [begin, end), one for each `unit` codes.
  template <int unit>
  void spread(int64_t row, int64_t begin, int64_t end, float* out) const {
    const int64_t first = begin / group, count = div_up(end, group) - first;
    if (group == unit) return factors(row, first, count, out);
    float scales[kScales];
    factors(row, first, count, scales);
    for (int64_t i = 0, at = begin; i < count; ++i) {
      const int64_t last = (first + i + 1) * group < end ? (first + i + 1) * group : end;
      for (; at < last; at += unit) *out++ = scales[i];
    }
  }

  // As stream_as, [begin, end) in whole blocks.
  template <FloatElement element, int unit, int tokens, int rows>
  void stream_blocks(const float* x, int64_t row, int64_t begin, int64_t end, float* sums) const {
    const uint8_t* codes = args.codes + row * row_bytes + byte_of<element>(begin);
    float scales[rows][kScales];
    __m256 acc[tokens][rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      spread<unit>(row + r, begin, end, scales[r]);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) acc[t][r] = _mm256_setzero_ps();
    }
    const float* scale = scales[0];
    for (const float* const x_end = x + (end - begin); x < x_end; x += kBlockCodes) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        // What is read next starts on other pages, which no hardware foresees.
        __builtin_prefetch(codes + (rows + r) * row_bytes);
        __m256 w[8], factor[2];
        if constexpr (element == kE4m3) {
          decode_block_e4m3(codes + r * row_bytes, w);
          factor[0] = _mm256_broadcast_ss(scale + r * kScales);
          factor[1] = _mm256_broadcast_ss(scale + r * kScales + 1);
        } else {
          decode_block_e2m1(codes + r * row_bytes, w);
          scales_of_e2m1<unit>(scale + r * kScales, factor);
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const float* const with = x + t * kLine + 32 * half;
            __m256 sum = _mm256_mul_ps(w[4 * half], _mm256_loadu_ps(with));
#pragma GCC unroll 3
            for (int v = 1; v < 4; ++v) sum = _mm256_fmadd_ps(w[4 * half + v], _mm256_loadu_ps(with + 8 * v), sum);
            // Before the factor, which may be too large to take the unit as well.
            if (element == kE4m3) sum = _mm256_mul_ps(sum, _mm256_set1_ps(kE4m3Unit));
            acc[t][r] = _mm256_fmadd_ps(sum, factor[half], acc[t][r]);
          }
        }
      }
      codes += byte_of<element>(kBlockCodes);
      scale += kBlockCodes / unit;
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        float* const to = sums + 16 * (t * kRows + r);
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), acc[t][r]));
      }
    }
  }
#endif

  template <FloatElement element, int tokens, int rows>
  void stream_as(const float* x, int64_t row, int64_t begin, int64_t end, float* sums) const {
    const uint8_t* const codes = args.codes + row * row_bytes;
    const uint8_t* const ahead = codes + rows * row_bytes;
    const int64_t first = begin / group, count = div_up(end, group) - first;
    int64_t whole = end < args.k / 16 * 16 ? end : args.k / 16 * 16;
    float scales[rows][kScales];
    i32 largest = splat_i32(0);
    f32 acc[tokens][rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      factors(row + r, first, count, scales[r]);
      for (int64_t i = 0; i < count && element == kE4m3; i += 16) {
        largest = max_i32(largest, magnitude(load(scales[r] + i)));
      }
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) acc[t][r] = load(sums + 16 * (t * kRows + r));
    }
    const auto multiply = [&](int r, int64_t at, f32 value) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) acc[t][r] = fma(load(x + t * kLine + (at - begin)), value, acc[t][r]);
    };
    if (element == kE4m3 && reduce_max(largest) >= kUnitOverflows) whole = begin;  // rare: as what has no whole 16
    int64_t at = begin;
    for (int64_t index = 0, last = first * group; at < whole; ++index) {
      last = last + group < whole ? last + group : whole;
      f32 factor[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) factor[r] = splat(scales[r][index] * (element == kE4m3 ? kE4m3Unit : 1.0f));
      for (; at < last; at += 16) {
        // A line for one of the rows in turn: what is read next starts on other pages, which no hardware foresees.
        __builtin_prefetch(ahead + (at / 16 % rows) * row_bytes + byte_of<element>(at));
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          const uint8_t* const from = codes + r * row_bytes + byte_of<element>(at);
          const f32 value = element == kE2m1   ? decode_e2m1(from)
                            : element == kE2m3 ? decode_e2m3(from)
                                               : decode_e4m3(from);  // its unit is in the factor
          multiply(r, at, mul(value, factor[r]));
        }
      }
    }
    for (; at < end; at += 16) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        float decoded[16];
        decode_as<element>(row + r, at, at + 16, decoded);
        multiply(r, at, load(decoded));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) store(sums + 16 * (t * kRows + r), acc[t][r]);
    }
  }

  template <FloatElement element>
  void decode_as(int64_t row, int64_t begin, int64_t end, float* out) const {
    const uint8_t* codes = args.codes + row * row_bytes;
    float scales[kScales];
    const int64_t first = begin / group;
    factors(row, first, div_up(end, group) - first, scales);
    const int64_t whole = end < args.k / 16 * 16 ? end : args.k / 16 * 16;
    int64_t at = begin, last = first * group;
    for (const float* scale = scales; at < whole; ++scale) {
      last = last + group < whole ? last + group : whole;
      const f32 factor = splat(*scale);
      for (; at < last; at += 16) {
        store(out + (at - begin), mul(values<element>(codes + byte_of<element>(at)), factor));
      }
    }
    if (at < end) {
      uint8_t padded[16] = {};
      const int64_t from = byte_of<element>(at), bits = (args.k - at) * element_bits(element);
      std::memcpy(padded, codes + from, row_bytes - from);
      if (bits % 8) padded[bits / 8] &= (1 << bits % 8) - 1;  // what a byte has beyond the last code
      store(out + (at - begin), mul(values<element>(padded), splat(scales[at / group - first])));
    }
  }

  template <FloatElement element>
  static inline f32 values(const uint8_t* p) {
    if constexpr (element == kE2m1) {
      return decode_e2m1(p);
    } else if constexpr (element == kE2m3) {
      return decode_e2m3(p);
    } else {
      return mul(decode_e4m3(p), splat(kE4m3Unit));
    }
  }
};

// panel [k][16 rows] of rows [16][kLine], count a multiple of 16.
#if defined(__AVX2__)
TERSOR_INLINE void transpose_8x8(const float* from, float* to) {
  __m256 row[8], pair[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * kLine);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pair[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
    pair[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    row[4 * i] = _mm256_shuffle_ps(pair[4 * i], pair[4 * i + 2], 0x44);
    row[4 * i + 1] = _mm256_shuffle_ps(pair[4 * i], pair[4 * i + 2], 0xee);
    row[4 * i + 2] = _mm256_shuffle_ps(pair[4 * i + 1], pair[4 * i + 3], 0x44);
    row[4 * i + 3] = _mm256_shuffle_ps(pair[4 * i + 1], pair[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + 16 * i, _mm256_permute2f128_ps(row[i], row[4 + i], 0x20));
    _mm256_storeu_ps(to + 16 * (4 + i), _mm256_permute2f128_ps(row[i], row[4 + i], 0x31));
  }
}
void transpose(const float* rows, int64_t count, float* panel) {
  for (int64_t i = 0; i < count; i += 8) {
    transpose_8x8(rows + i, panel + 16 * i);
    transpose_8x8(rows + 8 * kLine + i, panel + 16 * i + 8);
  }
}
#else
void transpose(const float* rows, int64_t count, float* panel) {
  for (int64_t i = 0; i < count; ++i) {
    for (int r = 0; r < kRows; ++r) panel[16 * i + r] = rows[r * kLine + i];
  }
}
#endif

// sums[t, 16 rows] += the products of `tokens` tokens with a panel.
template <int tokens>
void panel_products(const float* panel, const float* x, int64_t count, float* sums) {
  f32 acc[tokens];
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) acc[t] = zero();
  for (int64_t i = 0; i < count; ++i) {
    const f32 w = load(panel + 16 * i);
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) acc[t] = fma(w, splat(x[t * kLine + i]), acc[t]);
  }
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) store(sums + 16 * t, add(load(sums + 16 * t), acc[t]));
}
using PanelProducts = void (*)(const float*, const float*, int64_t, float*);
template <int tokens = kPanelRows>
PanelProducts panel_products_for(int64_t count) {
  if (count == tokens) return panel_products<tokens>;
  if constexpr (tokens > 1) return panel_products_for<tokens - 1>(count);
  return nullptr;
}

// All rows of a strip, kStreamed / tokens at a time, over the whole of k.
template <int tokens, int rows = kStreamed / tokens>
void stream_rows(const Weights& weights, const float* x, int64_t row, int count, int64_t padded, float* sums) {
  const int64_t chunk = weights.args.m * kLine;
  for (int r = 0, height; r < count; r += height) {
    height = r + rows <= count ? rows : 1;
    const auto stream = height == rows ? &Weights::stream<tokens, rows> : &Weights::stream<tokens, 1>;
    for (int64_t begin = 0; begin < padded; begin += kChunk) {
      const int64_t end = begin + kChunk < padded ? begin + kChunk : padded;
      (weights.*stream)(x + begin / kChunk * chunk, row + r, begin, end, sums + 16 * r);
    }
  }
}

}  // namespace

int float_linear(const FloatLinearArgs& args) {
  const Weights weights(args);
  const int64_t padded = div_up(args.k, 16) * 16, chunks = div_up(padded, kChunk), strips = div_up(args.n, kRows);
  const int64_t useful = 1 + args.n * args.k * args.m / kWorkPerThread;
  int64_t threads = useful < args.threads ? useful : args.threads;
  if (strips < threads) threads = strips;
  Scratch scratch;
  scratch.reserve<float>(chunks * args.m * kLine);
  scratch.reserve<uint32_t>(chunks * args.m);
  scratch.reserve<float>(args.m);
  const bool streams = weights.streams();
  const int64_t token_strips = div_up(args.m, kPanelRows), parts = streams ? div_up(args.m, kStreamed) : 0;
  const size_t buffer = kRows * kLine + 16 * kPanel + 16 * kRows * args.m;
  scratch.reserve<float>(threads * buffer);
  if (!scratch.allocate()) return fail(TERSOR_NO_MEMORY, "no memory for %lld tokens as floats", (long long)args.m);
  // As floats, all tokens' parts of a chunk next to each other: what is read again and again fills few places of the
  // second-level cache otherwise.
  float* const x = scratch.take<float>(chunks * args.m * kLine);
  uint32_t* const peaks = scratch.take<uint32_t>(chunks * args.m);
  float* const units = scratch.take<float>(args.m);  // of the sums
  float* const buffers = scratch.take<float>(threads * buffer);
  const int readers = args.m * args.k < 65536 ? 1 : static_cast<int>(threads);
  parallel_for(readers, [&](int index) {
    const Range range = split(args.m * chunks, readers, index);
    for (int64_t item = range.begin; item < range.end; ++item) {
      const char* from = static_cast<const char*>(args.x) + item % args.m * args.ldx * dtype_size(args.x_dtype);
      const int64_t begin = item / args.m * kChunk, end = begin + kChunk < padded ? begin + kChunk : padded;
      float* to = x + item * kLine;
      i32 largest = splat_i32(0);
      for (int64_t i = begin; i < end; i += 16, to += 16) {
        if (i + 16 <= args.k) {
          store(to, load_as(from + i * dtype_size(args.x_dtype), args.x_dtype));
        } else {
          for (int l = 0; l < 16; ++l) to[l] = i + l < args.k ? load_as_float(from, args.x_dtype, i + l) : 0;
        }
        largest = max_i32(largest, magnitude(load(to)));
      }
      peaks[item] = reduce_max(largest);
    }
  });
  for (int64_t token = 0; token < args.m; ++token) {
    uint32_t peak = 0;
    for (int64_t item = token; item < args.m * chunks; item += args.m) peak = peaks[item] > peak ? peaks[item] : peak;
    units[token] = weights.in_blocks == 0 ? 1 : peak >= kLarge ? kStep : peak < kSmall ? 1 / kStep : 1;
  }
  if (weights.in_blocks) {
    parallel_for(readers, [&](int index) {
      const Range range = split(args.m * chunks, readers, index);
      for (int64_t item = range.begin; item < range.end; ++item) {
        float* const to = x + item * kLine;
        const int64_t begin = item / args.m * kChunk, end = begin + kChunk < padded ? begin + kChunk : padded;
        if (units[item % args.m] != 1) {
          for (int64_t i = 0; i < end - begin; ++i) to[i] /= units[item % args.m];
        }
        weights.arrange(to, begin, end);
      }
    });
  }
  parallel_for(static_cast<int>(threads), [&](int index) {
    float* const decoded = buffers + index * buffer;
    float* const panel = decoded + kRows * kLine;
    float* const sums = panel + 16 * kPanel;
    std::memset(decoded, 0, sizeof(float) * kRows * kLine);  // the last strip may not have all its rows
    const Range range = split(strips, threads, index);
    for (int64_t strip = range.begin; strip < range.end; ++strip) {
      const int64_t row = strip * kRows;
      const int rows = args.n - row < kRows ? static_cast<int>(args.n - row) : kRows;
      std::memset(sums, 0, sizeof(float) * 16 * (streams ? kRows * args.m : args.m));
      for (int64_t part = 0; part < parts; ++part) {
        static constexpr decltype(&stream_rows<1>) stream[] = {stream_rows<1>, stream_rows<2>, stream_rows<3>,
                                                               stream_rows<4>};
        static_assert(kStreamed == 4);
        const Range some = split(args.m, parts, part);
        stream[some.end - some.begin - 1](weights, x + some.begin * kLine, row, rows, padded,
                                          sums + 16 * kRows * some.begin);
      }
      for (int64_t begin = 0; begin < padded && !streams; begin += kPanel) {
        const int64_t count = begin + kPanel < padded ? kPanel : padded - begin, chunk = begin / kChunk;
        for (int r = 0; r < rows; ++r) weights.decode(row + r, begin, begin + count, decoded + r * kLine);
        transpose(decoded, count, panel);
        for (int64_t part = 0; part < token_strips; ++part) {
          const Range some = split(args.m, token_strips, part);
          panel_products_for(some.end - some.begin)(
              panel, x + (chunk * args.m + some.begin) * kLine + begin % kChunk, count, sums + 16 * some.begin);
        }
      }
      for (int64_t token = 0; token < args.m; ++token) {
        for (int r = 0; r < rows; ++r) {
          const float bias = args.bias ? load_as_float(args.bias, args.x_dtype, row + r) : 0;
          const float sum = streams ? reduce_add(load(sums + 16 * (token * kRows + r))) : sums[16 * token + r];
          store_from_float(args.y, args.x_dtype, token * args.ldy + row + r, sum * units[token] + bias);
        }
      }
    }
  });
  return TERSOR_OK;
}

int float_dequantize(const FloatLinearArgs& args, float* out) {
  const Weights weights(args);
  const int64_t useful = 1 + args.n * args.k / kWorkPerThread;
  const int threads = useful < args.threads ? static_cast<int>(useful) : args.threads;
  parallel_for(threads, [&](int index) {
    const Range range = split(args.n, threads, index);
    alignas(64) float chunk[kChunk];
    for (int64_t row = range.begin; row < range.end; ++row) {
      for (int64_t begin = 0; begin < args.k; begin += kChunk) {
        const int64_t end = begin + kChunk < args.k ? begin + kChunk : args.k;
        const int64_t whole = div_up(end, 16) * 16;
        weights.decode(row, begin, whole, chunk);
        std::memcpy(out + row * args.k + begin, chunk, sizeof(float) * (end - begin));
      }
    }
  });
  return TERSOR_OK;
}

}  // namespace tersor::TERSOR_ISA
