// Writing a cache: fresh tokens into raw pages, and full raw pages into packed ones. A raw page is written token by
// token; packing happens once for every page_tokens tokens, so it is plain loops that compilers vectorize.
#include <cmath>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/isa.h"
#include "cpu/kv_layout.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kValuesPerThread = 1 << 16;
constexpr float kLargest = 65504.0f;  // of float16

// Float16 on the wanted side of a value within float16's range, so that minimum and scale always cover the group.
uint16_t fp16_at_most(float value) {
  const uint16_t h = float_to_fp16(value);
  if (!(fp16_to_float(h) > value)) return h;
  return h & 0x8000 ? h + 1 : (h == 0 ? 0x8001 : h - 1);
}
uint16_t fp16_at_least(float value) {
  const uint16_t h = float_to_fp16(value);
  return fp16_to_float(h) < value ? h + 1 : h;  // values here are not negative
}

struct Affine {
  uint16_t scale, minimum;
  float low, inverse;
};
// A group with a NaN or an infinity gets a NaN scale: attention over it is NaN, as it would be over raw values.
Affine fit(float low, float high, bool finite, float levels) {
  Affine a{0x7e00, 0, 0, 0};
  if (!finite) return a;
  low = low < -kLargest ? -kLargest : low > kLargest ? kLargest : low;
  a.minimum = fp16_at_most(low);
  a.low = fp16_to_float(a.minimum);
  const float step = (high - a.low) / levels;
  a.scale = fp16_at_least(step > kLargest ? kLargest : step > 0 ? step : 0);
  const float scale = fp16_to_float(a.scale);
  a.inverse = scale > 0 ? 1.0f / scale : 0;
  return a;
}
inline uint8_t encode(float x, const Affine& a, float levels) {
  float code = (x - a.low) * a.inverse + 0.5f;
  code = code > levels + 0.5f ? levels + 0.5f : code;
  return static_cast<uint8_t>(code > 0 ? code : 0);  // a NaN becomes 0: its scale is NaN
}

// Codes [depth][16 lanes] into words.
void pack_words(const uint8_t* codes, int64_t depth, int bits, uint32_t* words) {
  const int low = bits == 3 ? 2 : bits, per_word = 32 / low;
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

void pack_keys(const tersor_kv& kv, const char* raw, char* page, const KvOffsets& at, uint8_t* codes) {
  const int64_t tiles = kv.page_tokens / 16, dim = kv.key_dim;
  const int dtype = static_cast<int>(kv.dtype), bits = static_cast<int>(kv.key_bits);
  const float levels = static_cast<float>((1 << bits) - 1);
  uint16_t* scales = reinterpret_cast<uint16_t*>(page + at.key_scales);
  uint16_t* minima = reinterpret_cast<uint16_t*>(page + at.key_minima);
  for (int64_t d = 0; d < dim; ++d) {
    float x[256], low = INFINITY, high = -INFINITY;
    bool finite = true;
    for (int64_t t = 0; t < kv.page_tokens; ++t) {
      x[t] = load_as_float(raw, dtype, t / 16 * dim * 16 + d * 16 + t % 16);
      low = x[t] < low ? x[t] : low;
      high = x[t] > high ? x[t] : high;
      finite = finite && std::fabs(x[t]) <= 3.4028235e38f;
    }
    const Affine a = fit(low, high, finite, levels);
    scales[d] = a.scale;
    minima[d] = a.minimum;
    for (int64_t t = 0; t < kv.page_tokens; ++t) codes[t / 16 * dim * 16 + d * 16 + t % 16] = encode(x[t], a, levels);
  }
  const int64_t words = kv_words(dim, bits) * 16;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    pack_words(codes + tile * dim * 16, dim, bits, reinterpret_cast<uint32_t*>(page) + tile * words);
  }
}

void pack_values(const tersor_kv& kv, const char* raw, char* page, const KvOffsets& at, uint8_t* codes) {
  const int64_t tokens = kv.page_tokens, dim = kv.value_dim, group = kv.value_group;
  const int dtype = static_cast<int>(kv.dtype), bits = static_cast<int>(kv.value_bits);
  const float levels = static_cast<float>((1 << bits) - 1);
  uint16_t* scales = reinterpret_cast<uint16_t*>(page + at.value_scales);
  uint16_t* minima = reinterpret_cast<uint16_t*>(page + at.value_minima);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t g = 0; g < dim / group; ++g) {
      float low = INFINITY, high = -INFINITY;
      bool finite = true;
      for (int64_t d = g * group; d < (g + 1) * group; ++d) {
        const float x = load_as_float(raw, dtype, t * dim + d);
        low = x < low ? x : low;
        high = x > high ? x : high;
        finite = finite && std::fabs(x) <= 3.4028235e38f;
      }
      const Affine a = fit(low, high, finite, levels);
      scales[g * tokens + t] = a.scale;
      minima[g * tokens + t] = a.minimum;
      for (int64_t d = g * group; d < (g + 1) * group; ++d) {
        codes[d / 16 * tokens * 16 + t * 16 + d % 16] = encode(load_as_float(raw, dtype, t * dim + d), a, levels);
      }
    }
  }
  uint32_t* words = reinterpret_cast<uint32_t*>(page + at.values);
  for (int64_t block = 0; block < dim / 16; ++block) {
    pack_words(codes + block * tokens * 16, tokens, bits, words + block * kv_words(tokens, bits) * 16);
  }
}

void pack_page(const tersor_kv& kv, const char* raw, char* page, uint8_t* codes) {
  const KvOffsets at = kv_offsets(kv, true), from = kv_offsets(kv, false);
  const int64_t size = dtype_size(static_cast<int>(kv.dtype));
  if (kv.key_bits < 16) {
    pack_keys(kv, raw, page, at, codes);
  } else {
    std::memcpy(page, raw, kv.page_tokens * kv.key_dim * size);
  }
  if (kv.value_bits < 16) {
    pack_values(kv, raw + from.values, page, at, codes);
  } else {
    std::memcpy(page + at.values, raw + from.values, kv.page_tokens * kv.value_dim * size);
  }
}

// Tokens [begin, end) of a sequence's head into slots from `slot` on.
template <class Word>
void write_raw(const tersor_kv& kv, const tersor_kv_tokens& fresh, int64_t sequence, int64_t head, int64_t begin,
               int64_t end, int64_t slot, char* page, const KvOffsets& at) {
  const int64_t* ks = fresh.key_strides;
  const int64_t* vs = fresh.value_strides;
  const Word* keys = static_cast<const Word*>(fresh.keys) + sequence * ks[0] + head * ks[1];
  const Word* values = static_cast<const Word*>(fresh.values) + sequence * vs[0] + head * vs[1];
  Word* to_keys = reinterpret_cast<Word*>(page);
  Word* to_values = reinterpret_cast<Word*>(page + at.values);
  for (int64_t t = begin; t < end; ++t, ++slot) {
    Word* column = to_keys + slot / 16 * kv.key_dim * 16 + slot % 16;
    for (int64_t d = 0; d < kv.key_dim; ++d) column[d * 16] = keys[t * ks[2] + d];
    std::memcpy(to_values + slot * kv.value_dim, values + t * vs[2], kv.value_dim * sizeof(Word));
  }
}

struct PackScratch {
  Scratch memory;
  char* raw = nullptr;
  uint8_t* codes = nullptr;
  bool allocate(const tersor_kv& kv) {
    const int64_t dim = kv.key_dim > kv.value_dim ? kv.key_dim : kv.value_dim;
    const size_t raw_bytes = kv_offsets(kv, false).bytes, code_bytes = kv.page_tokens * dim;
    memory.reserve<char>(raw_bytes);
    memory.reserve<uint8_t>(code_bytes);
    if (!memory.allocate()) return false;
    raw = memory.take<char>(raw_bytes);
    codes = memory.take<uint8_t>(code_bytes);
    return true;
  }
};

int useful_threads(int64_t values, int threads) {
  const int64_t useful = 1 + values / kValuesPerThread;
  return useful < threads ? static_cast<int>(useful) : threads;
}

int out_of_memory() { return fail(TERSOR_NO_MEMORY, "no memory to pack a page of the cache"); }

}  // namespace

int kv_append(const KvAppendArgs& args) {
  const tersor_kv& kv = *args.kv;
  const tersor_kv_tokens& fresh = *args.fresh;
  const int64_t heads = kv.batch * kv.kv_heads;
  const int threads = useful_threads(heads * fresh.tokens * (kv.key_dim + kv.value_dim), args.threads);
  bool packs = false;
  int64_t last = args.page;
  for (int64_t left = fresh.tokens, slot = args.slot; left > 0; ++last, slot = 0) {
    packs = packs || kv_page(kv, last)[1];
    left -= kv_page(kv, last)[0] - slot;
  }
  const KvOffsets raw = kv_offsets(kv, false), packed = kv_offsets(kv, true);
  bool failed[256] = {};
  const int workers = threads < 256 ? threads : 256;
  parallel_for(workers, [&](int index) {
    PackScratch scratch;
    if (packs && !scratch.allocate(kv)) {
      failed[index] = true;
      return;
    }
    const Range mine = split(heads, workers, index);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t sequence = i / kv.kv_heads, head = i % kv.kv_heads;
      int64_t done = 0, slot = args.slot;
      for (int64_t p = args.page; p < last; ++p, slot = 0) {
        const int64_t* row = kv_page(kv, p);
        const int64_t count = row[0] - slot;
        char* page = kv_address(row, sequence) + head * (row[1] ? packed : raw).bytes;
        char* target = row[1] ? scratch.raw : page;
        if (kv.dtype == TERSOR_FLOAT32) {
          write_raw<uint32_t>(kv, fresh, sequence, head, done, done + count, slot, target, raw);
        } else {
          write_raw<uint16_t>(kv, fresh, sequence, head, done, done + count, slot, target, raw);
        }
        if (row[1]) pack_page(kv, scratch.raw, page, scratch.codes);
        done += count;
      }
    }
  });
  for (int i = 0; i < workers; ++i) {
    if (failed[i]) return out_of_memory();
  }
  return TERSOR_OK;
}

int kv_pack(const tersor_kv& kv, const int64_t* raw, const int64_t* packed, int threads) {
  const int64_t heads = kv.batch * kv.kv_heads;
  const int64_t from = kv_offsets(kv, false).bytes, to = kv_offsets(kv, true).bytes;
  const int useful = useful_threads(heads * kv.page_tokens * (kv.key_dim + kv.value_dim), threads);
  const int workers = useful < 256 ? useful : 256;
  bool failed[256] = {};
  parallel_for(workers, [&](int index) {
    PackScratch scratch;
    if (!scratch.allocate(kv)) {
      failed[index] = true;
      return;
    }
    const Range mine = split(heads, workers, index);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t sequence = i / kv.kv_heads, head = i % kv.kv_heads;
      pack_page(kv, reinterpret_cast<const char*>(raw[sequence]) + head * from,
                reinterpret_cast<char*>(packed[sequence]) + head * to, scratch.codes);
    }
  });
  for (int i = 0; i < workers; ++i) {
    if (failed[i]) return out_of_memory();
  }
  return TERSOR_OK;
}

}  // namespace tersor::TERSOR_ISA
