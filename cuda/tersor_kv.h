/* The C ABI of the compressed cache on CUDA, beside cpp/tersor.h: device pointers, work put on `stream` (a
 * cudaStream_t) of the current device and not waited for. Every function returns TERSOR_OK or an error code.
 *
 * A cache is a table [batch, table_pages] of 16-byte entries (struct KvPage of cuda/tile/kv_layout.h: int64 address,
 * int32 position of the first token, uint8 tokens, format, key_bits, value_bits) and pages [batch], the entries in use.
 * A page holds up to 64 tokens of one sequence, all heads of keys; positions ascend from page to page. Addresses are
 * multiples of 16. Numbers are 16-bit: dtype is 1 bfloat16, 2 float16. head_dim is 64, 80, 96, 128 or 256, bits are 2,
 * 3, 4, 8 or 16 (raw); format 0 is plain, k the k-th of the cache's. Fields of structs are int64 or pointers. */
#ifndef TERSOR_KV_CUDA_H
#define TERSOR_KV_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of a page for one head; -1 where there is no such page. */
int64_t tersor_cuda_kv_page_bytes(int64_t head_dim, int64_t key_bits, int64_t value_bits);

/* What a format above 0 says (struct KvFormat of cuda/tile/kv_layout.h, enum tersor_kv_coding). */
typedef struct tersor_cuda_kv_format {
  int64_t key_coding, value_coding; /* levels: of 2 to 4 bits, ascending, -127 to 127; E4M3: of 8 bits */
  int64_t key_axis;                 /* scales of keys: 0 channels', 1 tokens' over all channels, 2 channels' of 32 tokens */
  int64_t value_records;            /* scales of values are for so many times 16 channels of a token; 0: as plain pages */
  int64_t separable;                /* channels of values have factors; scales are then for all channels */
  int64_t key_outliers, value_outliers;
  int8_t key_levels[16], value_levels[16];
} tersor_cuda_kv_format;

typedef struct tersor_cuda_kv_cache {
  const void* table;
  const int32_t* pages;
  int64_t batch, table_pages, kv_heads, head_dim, dtype;
  int64_t biased;  /* pages have a float32 for each token of a head, which is added to its logits */
  /* Packed keys are turned back to their page's first slot: rotary [64, rotary_dim / 2, 2], 16-byte aligned, cosines
   * and sines of slots; rotary_dim 0: not, or a multiple of 4. Not interleaved: channels i and i + rotary_dim / 2 are a
   * pair, and pages, raw ones too, hold keys' channels in the order of pairs. */
  int64_t rotary_dim, rotary_interleaved;
  const float* rotary;
  int64_t formats; /* to 7 */
  const tersor_cuda_kv_format* format;
} tersor_cuda_kv_cache;

/* Tokens [batch, kv_heads, tokens, head_dim]: strides of the first three dimensions (multiples of 4), the last one's is
 * 1; 8-byte aligned. */
typedef struct tersor_cuda_kv_tokens {
  const void *keys, *values;
  int64_t tokens, key_strides[3], value_strides[3];
  const float* bias; /* [batch, kv_heads, tokens] of a biased cache, or NULL: 0 */
} tersor_cuda_kv_tokens;

/* Bytes of a page for one head, in format `format`; -1 where there is no such page. */
int64_t tersor_cuda_kv_format_bytes(const tersor_cuda_kv_cache* cache, int64_t format, int64_t key_bits,
                                    int64_t value_bits);

/* Writes the last `tokens` tokens of each sequence, as the table counts them, to their raw pages. Tokens whose page is
 * packed are left out. */
int tersor_cuda_kv_append(const tersor_cuda_kv_cache* cache, const tersor_cuda_kv_tokens* fresh, void* stream);

/* Packs full raw pages in format `format`: jobs [count, 2] int64, the address of each raw page and of its packed one; a
 * job with an address of 0 is none. The cache's table is not read. */
int tersor_cuda_kv_pack(const tersor_cuda_kv_cache* cache, int64_t format, int64_t key_bits, int64_t value_bits,
                        const int64_t* jobs, int64_t count, void* stream);

/* How many splits suit a device, for sequences of up to `pages` pages, and what scratch memory a launch needs. */
int tersor_cuda_kv_attention_plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t queries,
                                  int64_t pages, int multiprocessors, int64_t shared_memory_per_multiprocessor,
                                  int64_t* splits);
int tersor_cuda_kv_attention_workspace(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                       int64_t queries, int64_t splits, int64_t* partial_bytes,
                                       int64_t* counter_bytes);

typedef struct tersor_cuda_kv_query {
  const void* q; /* [batch, heads, queries, head_dim], 8-byte aligned; strides are multiples of 4, the last is 1 */
  int64_t heads, queries, strides[3];
  void* out;                /* [batch, queries, heads, head_dim] */
  float* log_sum_exp;       /* [batch, heads, queries], or NULL */
  const int32_t* positions; /* [batch]: of the first query, or NULL: the queries are each sequence's last tokens */
  const int32_t* first;     /* [batch]: the first position that is seen, or NULL */
  int64_t window;           /* a query sees so many positions up to its own, 0: all */
  int64_t causal;           /* a query sees no position after its own */
  const uint8_t* mask;      /* 1 where a query sees a position, or NULL */
  int64_t mask_strides[4];  /* of batch, head, query, position */
  int64_t mask_first, mask_tokens; /* positions that the mask covers; others are not seen */
  const float* sinks;       /* [heads]: logits of the denominator alone, or NULL */
  int64_t splits;
  float* partials;          /* 16-byte aligned; both of workspace's sizes, used by one launch at a time */
  uint32_t* counters;       /* zero before the first launch, and again after each */
  /* What is added to packed keys and values: NULL, or [batch, table_pages] of struct KvResidual of
   * cuda/tile/kv_layout.h, of the page at position / 64 (pages are full, from 0 on), 16-byte aligned; and queries times
   * the right factors of keys, [batch, heads, queries, residual_width], not scaled. */
  const void* residuals;
  const float* residual_query;
  int64_t residual_width;
} tersor_cuda_kv_query;

/* out = softmax(cap(q k^T scale) + bias) v; softcap 0: none. A query that sees nothing gives 0 and -infinity. */
int tersor_cuda_kv_attention(const tersor_cuda_kv_cache* cache, const tersor_cuda_kv_query* query, float scale,
                             float softcap, void* stream);

/* mass [batch, kv_heads, tokens], zeros before: for each token, counted from the first of a sequence's first page, the
 * sum over all queries of all query heads that read its head of keys of exp(score - log_sum_exp). log_sum_exp of the
 * query is read; out, sinks, partials and counters are not used. */
int tersor_cuda_kv_mass(const tersor_cuda_kv_cache* cache, const tersor_cuda_kv_query* query, float scale,
                        float softcap, float* mass, int64_t tokens, void* stream);

#ifdef __cplusplus
}
#endif
#endif
