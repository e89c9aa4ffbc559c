// How a page of the cache is stored: `page_tokens` tokens of one sequence and one head of keys and values.
//
//   part           raw (as the model computes)          packed
//   keys           [tokens/16][key_dim][16 tokens]      [tokens/16][words(key_dim)][16 tokens] words of 32 bits
//   key scales     -                                    float16 [key_dim], or [key_dim/key_group][tokens]; minima alike
//   values         [tokens][value_dim]                  [value_dim/16][words(tokens)][16 channels] words of 32 bits
//   value scales   -                                    float16 [value_dim/value_group][tokens]; minima alike
//   value factors  -                                    float16 [value_dim], of separable values
//   rank           -                                    float16 [rank][tokens] for keys, the same for values
//   outliers       -                                    uint16 token * dim + channel ascending, float16 differences
//   bias           float32 [tokens]                     float32 [tokens], of biased caches
//
// A key is minimum + scale * code of its channel in its page (or of its token), a value that of its token and group of
// channels, times its channel's factor; float8 has no minimum. Then differences are added; then, with rotary, keys are
// turned from their page's first slot to their own; then the residual is added, which is a product of the page's and
// the segment's factors.
// Lanes of a vector are tokens for keys and channels for values, so that both products of attention are one loop: a sum
// over the depth (channels, or tokens) of a coefficient times 16 codes. A word holds codes of one lane that follow one
// another along the depth, lowest bits first: 4 of 8 bits, 8 of 4 bits, 16 of 2 bits. Three bits are all words of the
// two lower bits, then words with the third bits of 32. In a packed page, a part of 16 bits is stored as in a raw one.
#pragma once

#include "common/float16.h"
#include "tersor.h"

namespace tersor {

static inline int64_t kv_words(int64_t depth, int64_t bits) {
  return bits == 3 ? depth / 16 + (depth + 31) / 32 : depth * bits / 32;
}

static inline const tersor_kv_format* kv_format(const tersor_kv& kv, int64_t kind) {
  return kind ? kv.format + kind - 1 : nullptr;
}

struct KvOffsets {  // bytes from the start of a page
  int64_t key_scales, key_minima, values, value_scales, value_minima, value_factors, key_rank, value_rank, key_index,
      key_delta, value_index, value_delta, bias, bytes;
};
static inline KvOffsets kv_offsets(const tersor_kv& kv, int64_t kind) {
  const int64_t size = dtype_size(static_cast<int>(kv.dtype)), tokens = kv.page_tokens;
  KvOffsets at{};
  int64_t end = tokens * kv.key_dim * size;
  if (const tersor_kv_format* f = kv_format(kv, kind)) {
    const bool keys = f->key_bits < 16, values = f->value_bits < 16;
    const int64_t key_scales = keys ? (f->key_group ? kv.key_dim / f->key_group * tokens : kv.key_dim) * 2 : 0;
    const int64_t value_scales = values ? kv.value_dim / f->value_group * tokens * 2 : 0;
    if (keys) end = tokens / 16 * kv_words(kv.key_dim, f->key_bits) * 64;
    at.key_scales = end;
    at.key_minima = end += key_scales;
    at.values = end += f->key_coding == TERSOR_KV_E4M3 ? 0 : key_scales;
    at.value_scales = end += values ? kv.value_dim / 16 * kv_words(tokens, f->value_bits) * 64
                                    : tokens * kv.value_dim * size;
    at.value_minima = end += value_scales;
    at.value_factors = end += f->value_coding == TERSOR_KV_E4M3 ? 0 : value_scales;
    at.key_rank = end += values && f->value_separable ? kv.value_dim * 2 : 0;
    at.value_rank = end += f->rank * tokens * 2;
    at.key_index = end += f->rank * tokens * 2;
    at.key_delta = end += f->key_outliers * 2;
    at.value_index = end += f->key_outliers * 2;
    at.value_delta = end += f->value_outliers * 2;
    end += f->value_outliers * 2;
  } else {
    at.values = end;
    end += tokens * kv.value_dim * size;
  }
  at.bias = end = (end + 3) / 4 * 4;
  if (kv.biased) end += tokens * 4;
  at.bytes = (end + 63) / 64 * 64;
  return at;
}

static inline bool kv_has_segments(const tersor_kv& kv) {
  for (int64_t i = 0; i < kv.formats; ++i) {
    if (kv.format[i].rank) return true;
  }
  return false;
}
// A row of the page table: tokens, kind, then the addresses for each sequence, then those of segments.
static inline int64_t kv_stride(const tersor_kv& kv) { return 2 + (kv_has_segments(kv) ? 2 : 1) * kv.batch; }
static inline const int64_t* kv_page(const tersor_kv& kv, int64_t page) { return kv.table + page * kv_stride(kv); }
static inline char* kv_address(const int64_t* page, int64_t sequence) {
  return reinterpret_cast<char*>(page[2 + sequence]);
}

}  // namespace tersor
