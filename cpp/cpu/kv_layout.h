// How a page of the cache is stored: `page_tokens` tokens of one sequence and one head of keys and values.
//
//   part          raw (as the model computes)          packed
//   keys          [tokens/16][key_dim][16 tokens]      [tokens/16][words(key_dim)][16 tokens] words of 32 bits
//   key scales    -                                    float16 [key_dim], then minima float16 [key_dim]
//   values        [tokens][value_dim]                  [value_dim/16][words(tokens)][16 channels] words of 32 bits
//   value scales  -                                    float16 [value_dim/value_group][tokens], then minima alike
//
// A key is minimum + scale * code of its channel in its page; a value that of its token and group of channels. Lanes of
// a vector are tokens for keys and channels for values, so that both products of attention are one loop: a sum over
// the depth (channels, or tokens) of a coefficient times 16 codes. A word holds codes of one lane that follow one
// another along the depth, lowest bits first: 4 of 8 bits, 8 of 4 bits, 16 of 2 bits. Three bits are all words of the
// two lower bits, then words with the third bits of 32. In a packed page, a part of 16 bits is stored as in a raw one.
#pragma once

#include "common/float16.h"
#include "tersor.h"

namespace tersor {

static inline int64_t kv_words(int64_t depth, int64_t bits) {
  return bits == 3 ? depth / 16 + (depth + 31) / 32 : depth * bits / 32;
}

struct KvOffsets {  // bytes from the start of a page
  int64_t key_scales, key_minima, values, value_scales, value_minima, bytes;
};
static inline KvOffsets kv_offsets(const tersor_kv& kv, bool packed) {
  const int64_t size = dtype_size(static_cast<int>(kv.dtype)), tokens = kv.page_tokens;
  const bool keys = packed && kv.key_bits < 16, values = packed && kv.value_bits < 16;
  const int64_t parameters = values ? kv.value_dim / kv.value_group * tokens * 2 : 0;
  KvOffsets at;
  at.key_scales = keys ? tokens / 16 * kv_words(kv.key_dim, kv.key_bits) * 64 : tokens * kv.key_dim * size;
  at.key_minima = at.key_scales + (keys ? kv.key_dim * 2 : 0);
  at.values = at.key_minima + (keys ? kv.key_dim * 2 : 0);
  at.value_scales = at.values + (values ? kv.value_dim / 16 * kv_words(tokens, kv.value_bits) * 64
                                        : tokens * kv.value_dim * size);
  at.value_minima = at.value_scales + parameters;
  at.bytes = (at.value_minima + parameters + 63) / 64 * 64;
  return at;
}

// A row of the page table: tokens, packed or not, then the addresses for each sequence.
static inline const int64_t* kv_page(const tersor_kv& kv, int64_t page) {
  return kv.table + page * (2 + kv.batch);
}
static inline char* kv_address(const int64_t* page, int64_t sequence) {
  return reinterpret_cast<char*>(page[2 + sequence]);
}

}  // namespace tersor
