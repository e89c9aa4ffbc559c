// Packing a page: once for every page_tokens tokens, so it is plain loops that compilers vectorize.
//
// A vector is what shares a scale: a channel of keys over the page's tokens, or a token's channels of one group. The
// reference is python/tersor/kv/formats.py.
#include "cpu/kv_pack.h"

#include <cmath>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/kv_dot.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr float kLargest = 65504.0f;  // of float16

bool is_finite(float x) { return std::fabs(x) <= 3.4028235e38f; }

// Float16 on the wanted side of a value within float16's range, so that minimum and scale always cover the vector.
uint16_t fp16_at_most(float value) {
  const uint16_t h = float_to_fp16(value);
  if (!(fp16_to_float(h) > value)) return h;
  return h & 0x8000 ? h + 1 : (h == 0 ? 0x8001 : h - 1);
}
uint16_t fp16_at_least(float value) {
  const uint16_t h = float_to_fp16(value);
  return fp16_to_float(h) < value ? h + 1 : h;  // values here are not negative
}
float clamp16(float x) { return x < -kLargest ? -kLargest : x > kLargest ? kLargest : x; }

// To nearest even, of a magnitude of at most 448 and a little.
uint8_t float_to_e4m3(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x3c800000u) {  // below 2^-6: units of 2^-9
    const float rounded = (bits_to_float(magnitude) * 512.0f + 8388608.0f) - 8388608.0f;
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(rounded));
  }
  const uint32_t code = (magnitude + 0x7ffffu + (magnitude >> 20 & 1) - 0x3c000000u) >> 20;
  return static_cast<uint8_t>(sign | (code > 0x7e ? 0x7e : code));
}
float e4m3_to_float(uint8_t code) {
  return bits_to_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
}

// How a vector's numbers become codes.
struct Coder {
  int64_t bits, coding;
  float top, table[16] = {}, borders[16] = {};  // levels in units of the scale; what lies between them
  Coder(int64_t wanted, int64_t kind, const int8_t* levels)
      : bits(wanted), coding(kind), top(static_cast<float>((1 << wanted) - 1)) {
    if (coding != TERSOR_KV_LEVELS) return;
    level_positions(levels, bits, table);
    for (int i = 0; i + 1 < 1 << bits; ++i) borders[i] = (table[i] + table[i + 1]) * 0.5f;
  }
  float value(uint8_t code) const {
    return coding == TERSOR_KV_E4M3 ? e4m3_to_float(code) : coding == TERSOR_KV_LEVELS ? table[code] : code;
  }
};

// A vector with a NaN or an infinity gets a NaN scale: attention over it is NaN, as it would be over raw values.
struct Affine {
  uint16_t scale = 0x7e00, minimum = 0;
  float unit = NAN, low = 0, inverse = 0;
};
Affine fit(const Coder& coder, float low, float high, bool finite) {
  Affine a;
  if (!finite) return a;
  float step;
  if (coder.coding == TERSOR_KV_E4M3) {
    step = (-low > high ? -low : high) / 448.0f;
  } else {
    a.minimum = fp16_at_most(clamp16(low));
    a.low = fp16_to_float(a.minimum);
    step = (high - a.low) / coder.top;
  }
  a.scale = fp16_at_least(step > kLargest ? kLargest : step > 0 ? step : 0);
  a.unit = fp16_to_float(a.scale);
  a.inverse = a.unit > 0 ? 1.0f / a.unit : 0;
  return a;
}
inline uint8_t encode(float x, const Affine& a, const Coder& coder) {  // a NaN becomes 0: its scale is NaN
  if (coder.coding == TERSOR_KV_E4M3) {
    float y = x * a.inverse;
    y = y > 448.0f ? 448.0f : y < -448.0f ? -448.0f : y == y ? y : 0;
    return float_to_e4m3(y);
  }
  const float units = (x - a.low) * a.inverse;
  if (coder.coding == TERSOR_KV_LEVELS) {
    int code = 0;
    for (int i = 0; i + 1 < 1 << coder.bits; ++i) code += units >= coder.borders[i];
    return static_cast<uint8_t>(code);
  }
  float code = units + 0.5f;
  code = code > coder.top + 0.5f ? coder.top + 0.5f : code;
  return static_cast<uint8_t>(code > 0 ? code : 0);
}

// Codes [depth][16 lanes] into words.
void pack_words(const uint8_t* codes, int64_t depth, int64_t bits, uint32_t* words) {
  const int low = bits == 3 ? 2 : static_cast<int>(bits), per_word = 32 / low;
  std::memset(words, 0, kv_words(depth, bits) * 64);
  for (int64_t i = 0; i < depth; ++i) {
    uint32_t* word = words + i / per_word * 16;
    const int shift = static_cast<int>(i % per_word) * low;
    for (int lane = 0; lane < 16; ++lane) word[lane] |= (codes[i * 16 + lane] & ((1u << low) - 1)) << shift;
  }
  if (bits != 3) return;
  for (int64_t i = 0; i < depth; ++i) {
    uint32_t* word = words + (depth / 16 + i / 32) * 16;
    for (int lane = 0; lane < 16; ++lane) word[lane] |= static_cast<uint32_t>(codes[i * 16 + lane] >> 2) << i % 32;
  }
}

using Extremes = PackScratch::Extremes;

// What the next removal from a vector would be worth: by how much its squared range falls.
void find_extremes(const float* x, const uint8_t* removed, int64_t length, bool symmetric, Extremes& e) {
  e.high[0] = e.high[1] = -INFINITY;
  e.low[0] = e.low[1] = INFINITY;
  e.left = 0;
  bool finite = true;
  for (int64_t i = 0; i < length; ++i) {
    finite = finite && is_finite(x[i]);
    if (removed[i]) continue;
    const float v = symmetric ? std::fabs(x[i]) : x[i];
    ++e.left;
    if (v > e.high[0]) {
      e.high[1] = e.high[0];
      e.high[0] = v;
      e.high_at = static_cast<int32_t>(i);
    } else if (v > e.high[1]) {
      e.high[1] = v;
    }
    if (v < e.low[0]) {
      e.low[1] = e.low[0];
      e.low[0] = v;
      e.low_at = static_cast<int32_t>(i);
    } else if (v < e.low[1]) {
      e.low[1] = v;
    }
  }
  e.gain = -1;
  if (e.left < 2 || !finite) return;
  if (symmetric) e.low[0] = e.low[1] = 0;
  const double span = static_cast<double>(e.high[0]) - e.low[0];
  const double without_high = static_cast<double>(e.high[1]) - e.low[0];
  const double without_low = static_cast<double>(e.high[0]) - e.low[1];
  const bool top = symmetric || without_high <= without_low;
  const double after = top ? without_high : without_low;
  e.gain = (span - after) * (span + after);
  if (!top) e.high_at = e.low_at;
}

// Marks up to `count` numbers of x [vectors][length] without which the ranges shrink most.
void choose_outliers(PackScratch& scratch, int64_t vectors, int64_t length, int64_t count, bool symmetric) {
  std::memset(scratch.removed, 0, vectors * length);
  if (!count) return;
  Extremes* all = scratch.extremes;
  for (int64_t v = 0; v < vectors; ++v) {
    find_extremes(scratch.x + v * length, scratch.removed + v * length, length, symmetric, all[v]);
  }
  for (int64_t i = 0; i < count; ++i) {
    int64_t best = 0;
    for (int64_t v = 1; v < vectors; ++v) best = all[v].gain > all[best].gain ? v : best;
    if (!(all[best].gain > 0)) return;
    scratch.removed[best * length + all[best].high_at] = 1;
    find_extremes(scratch.x + best * length, scratch.removed + best * length, length, symmetric, all[best]);
  }
}

Affine fit_vector(const Coder& coder, const float* x, const uint8_t* removed, int64_t length, bool outliers) {
  float low = INFINITY, high = -INFINITY;
  bool finite = true;
  for (int64_t i = 0; i < length; ++i) finite = finite && is_finite(x[i]);
  if (outliers) {
    for (int64_t i = 0; i < length; ++i) {
      low = !removed[i] && x[i] < low ? x[i] : low;
      high = !removed[i] && x[i] > high ? x[i] : high;
    }
  } else {
    for (int64_t i = 0; i < length; ++i) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
  }
  return fit(coder, low, high, finite);
}

// Entries in the order of token * dim + channel; number(token, channel) is what an entry's difference is taken from.
template <class Vector, class Difference>
void write_entries(char* index, char* delta, int64_t count, int64_t tokens, int64_t dim, const uint8_t* removed,
                   const Vector& position, const Difference& difference) {
  int64_t used = 0;
  for (int64_t i = 0; i < tokens * dim && used < count; ++i) {
    const int64_t at = position(i / dim, i % dim);
    if (!removed[at]) continue;
    const uint16_t where = static_cast<uint16_t>(i);
    const uint16_t bits = float_to_fp16(clamp16(difference(i / dim, i % dim, at)));
    std::memcpy(index + used * 2, &where, 2);
    std::memcpy(delta + used++ * 2, &bits, 2);
  }
  for (; used < count; ++used) {  // entries without a use
    const uint16_t where = static_cast<uint16_t>(tokens * dim - 1);
    std::memcpy(index + used * 2, &where, 2);
    std::memset(delta + used * 2, 0, 2);
  }
}

// Keys [channel][token] of a raw page, turned back to its first slot.
void load_keys(const tersor_kv& kv, const char* raw, float* x) {
  const int64_t tokens = kv.page_tokens, dim = kv.key_dim;
  const int dtype = static_cast<int>(kv.dtype);
  for (int64_t tile = 0; tile < tokens / 16; ++tile) {
    for (int64_t d = 0; d < dim; ++d) {
      store(x + d * tokens + tile * 16, load_as(raw + (tile * dim + d) * 16 * dtype_size(dtype), dtype));
    }
    const float* table = kv.rotary + tile * kv.rotary_dim * 16;
    for (int64_t i = 0; i < kv.rotary_dim / 2; ++i) {
      float* first = x + (kv.rotary_interleaved ? 2 * i : i) * tokens + tile * 16;
      float* second = first + (kv.rotary_interleaved ? 1 : kv.rotary_dim / 2) * tokens;
      const f32 cos = load(table + i * 32), sin = load(table + i * 32 + 16), a = load(first), b = load(second);
      store(first, fma(a, cos, mul(b, sin)));
      store(second, sub(mul(b, cos), mul(a, sin)));
    }
  }
}

void pack_keys(const tersor_kv& kv, const tersor_kv_format& f, const char* raw, char* page, const KvOffsets& at,
               PackScratch& scratch) {
  const int64_t tokens = kv.page_tokens, dim = kv.key_dim, group = f.key_group;
  const Coder coder(f.key_bits, f.key_coding, f.key_levels);
  float* x = scratch.x;
  load_keys(kv, raw, group ? scratch.turned : x);
  for (int64_t t = 0; group && t < tokens; ++t) {
    for (int64_t d = 0; d < dim; ++d) x[t * dim + d] = scratch.turned[d * tokens + t];
  }
  const int64_t length = group ? group : tokens, vectors = tokens * dim / length, groups = group ? dim / group : 1;
  choose_outliers(scratch, vectors, length, f.key_outliers, f.key_coding == TERSOR_KV_E4M3);
  uint16_t* scales = reinterpret_cast<uint16_t*>(page + at.key_scales);
  uint16_t* minima = reinterpret_cast<uint16_t*>(page + at.key_minima);
  for (int64_t v = 0; v < vectors; ++v) {
    const float* vector = x + v * length;
    const Affine a = fit_vector(coder, vector, scratch.removed + v * length, length, f.key_outliers > 0);
    const int64_t to = group ? v % groups * tokens + v / groups : v;
    scales[to] = a.scale;
    if (f.key_coding != TERSOR_KV_E4M3) minima[to] = a.minimum;
    if (group) {
      const int64_t t = v / groups, begin = v % groups * group;
      uint8_t* codes = scratch.codes + t / 16 * dim * 16 + t % 16;
      for (int64_t i = 0; i < length; ++i) codes[(begin + i) * 16] = encode(vector[i], a, coder);
    } else {
      for (int64_t t = 0; t < tokens; ++t) {
        scratch.codes[t / 16 * dim * 16 + v * 16 + t % 16] = encode(vector[t], a, coder);
      }
    }
  }
  const int64_t words = kv_words(dim, f.key_bits) * 16;
  for (int64_t tile = 0; tile < tokens / 16; ++tile) {
    pack_words(scratch.codes + tile * dim * 16, dim, f.key_bits, reinterpret_cast<uint32_t*>(page) + tile * words);
  }
  if (!f.key_outliers) return;
  write_entries(
      page + at.key_index, page + at.key_delta, f.key_outliers, tokens, dim, scratch.removed,
      [&](int64_t t, int64_t d) { return group ? t * dim + d : d * tokens + t; },
      [&](int64_t t, int64_t d, int64_t from) {
        const int64_t parameter = group ? d / group * tokens + t : d;
        const float low = f.key_coding == TERSOR_KV_E4M3 ? 0 : fp16_to_float(minima[parameter]);
        const float code = coder.value(scratch.codes[t / 16 * dim * 16 + d * 16 + t % 16]);
        return x[from] - (fp16_to_float(scales[parameter]) * code + low);
      });
}

void pack_values(const tersor_kv& kv, const tersor_kv_format& f, const char* raw, char* page, const KvOffsets& at,
                 PackScratch& scratch) {
  const int64_t tokens = kv.page_tokens, dim = kv.value_dim, group = f.value_group, groups = dim / group;
  const int dtype = static_cast<int>(kv.dtype), size = dtype_size(dtype);
  const Coder coder(f.value_bits, f.value_coding, f.value_levels);
  float* x = scratch.x;
  for (int64_t i = 0; i < tokens * dim; i += 16) store(x + i, load_as(raw + i * size, dtype));
  uint16_t* factors = reinterpret_cast<uint16_t*>(page + at.value_factors);
  for (int64_t d = 0; f.value_separable && d < dim; ++d) {
    float largest = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const float v = std::fabs(x[t * dim + d]);
      largest = v > largest && is_finite(v) ? v : largest;
    }
    factors[d] = float_to_fp16(clamp16(std::sqrt(largest)));
    const float factor = fp16_to_float(factors[d]);
    for (int64_t t = 0; t < tokens; ++t) {
      float& v = x[t * dim + d];
      v = factor == 0 && is_finite(v) ? 0 : v / factor;
    }
  }
  choose_outliers(scratch, tokens * groups, group, f.value_outliers, f.value_coding == TERSOR_KV_E4M3);
  uint16_t* scales = reinterpret_cast<uint16_t*>(page + at.value_scales);
  uint16_t* minima = reinterpret_cast<uint16_t*>(page + at.value_minima);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = t * dim + g * group;
      const Affine a = fit_vector(coder, x + from, scratch.removed + from, group, f.value_outliers > 0);
      scales[g * tokens + t] = a.scale;
      if (f.value_coding != TERSOR_KV_E4M3) minima[g * tokens + t] = a.minimum;
      for (int64_t d = g * group; d < (g + 1) * group; ++d) {
        scratch.codes[d / 16 * tokens * 16 + t * 16 + d % 16] = encode(x[t * dim + d], a, coder);
      }
    }
  }
  uint32_t* words = reinterpret_cast<uint32_t*>(page + at.values);
  for (int64_t block = 0; block < dim / 16; ++block) {
    pack_words(scratch.codes + block * tokens * 16, tokens, f.value_bits,
               words + block * kv_words(tokens, f.value_bits) * 16);
  }
  if (!f.value_outliers) return;
  write_entries(
      page + at.value_index, page + at.value_delta, f.value_outliers, tokens, dim, scratch.removed,
      [&](int64_t t, int64_t d) { return t * dim + d; },
      [&](int64_t t, int64_t d, int64_t from) {
        const int64_t parameter = d / group * tokens + t;
        const float low = f.value_coding == TERSOR_KV_E4M3 ? 0 : fp16_to_float(minima[parameter]);
        const float code = coder.value(scratch.codes[d / 16 * tokens * 16 + t * 16 + d % 16]);
        const float factor = f.value_separable ? fp16_to_float(factors[d]) : 1.0f;
        return load_as_float(raw, dtype, from) - (fp16_to_float(scales[parameter]) * code + low) * factor;
      });
}

}  // namespace

void kv_pack_page(const tersor_kv& kv, int64_t kind, const char* raw, char* page, PackScratch& scratch) {
  const KvOffsets at = kv_offsets(kv, kind), from = kv_offsets(kv, 0);
  const tersor_kv_format& f = *kv_format(kv, kind);
  const int64_t size = dtype_size(static_cast<int>(kv.dtype));
  if (f.key_bits < 16) {
    pack_keys(kv, f, raw, page, at, scratch);
  } else {
    std::memcpy(page, raw, kv.page_tokens * kv.key_dim * size);
  }
  if (f.value_bits < 16) {
    pack_values(kv, f, raw + from.values, page, at, scratch);
  } else {
    std::memcpy(page + at.values, raw + from.values, kv.page_tokens * kv.value_dim * size);
  }
  std::memset(page + at.key_rank, 0, at.key_index - at.key_rank);  // no residual until a segment comes
  if (kv.biased) std::memcpy(page + at.bias, raw + from.bias, kv.page_tokens * sizeof(float));
}

int kv_pack(const KvPackArgs& args) {
  const tersor_kv& kv = *args.kv;
  const int64_t heads = kv.batch * kv.kv_heads;
  const int64_t from = kv_offsets(kv, 0).bytes, to = kv_offsets(kv, args.kind).bytes;
  const int workers = kv_useful_threads(heads * kv.page_tokens * (kv.key_dim + kv.value_dim), args.threads);
  bool failed[256] = {};
  parallel_for(workers, [&](int index) {
    Scratch memory;
    PackScratch scratch;
    if (!scratch.allocate(kv, memory)) {
      failed[index] = true;
      return;
    }
    const Range mine = split(heads, workers, index);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t sequence = i / kv.kv_heads, head = i % kv.kv_heads;
      kv_pack_page(kv, args.kind, reinterpret_cast<const char*>(args.raw[sequence]) + head * from,
                   reinterpret_cast<char*>(args.packed[sequence]) + head * to, scratch);
    }
  });
  for (int i = 0; i < workers; ++i) {
    if (failed[i]) return fail(TERSOR_NO_MEMORY, "no memory to pack a page of the cache");
  }
  return TERSOR_OK;
}

}  // namespace tersor::TERSOR_ISA
