/* The C ABI of the compressed cache on CUDA, beside cpp/tersor.h: device pointers, work put on `stream` (a
 * cudaStream_t) of the current device and not waited for. Every function returns TERSOR_OK or an error code.
 *
 * A cache is a table [batch, table_pages] of 16-byte entries (struct KvPage of cuda/tile/kv_layout.h: int64 address,
 * int32 position of the first token, uint16 tokens, uint8 key_bits, uint8 value_bits) and pages [batch], the entries in
 * use. A page holds up to 64 tokens of one sequence, all heads of keys; positions ascend from page to page. Addresses
 * are multiples of 16. Numbers are 16-bit: dtype is 1 bfloat16, 2 float16. head_dim is 64, 80, 96, 128 or 256, bits are
 * 2, 3, 4, 8 or 16 (raw). */
#ifndef TERSOR_KV_CUDA_H
#define TERSOR_KV_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of a page for one head; -1 where there is no such page. */
int64_t tersor_cuda_kv_page_bytes(int64_t head_dim, int64_t key_bits, int64_t value_bits);

/* Writes the last `tokens` tokens of each sequence, as the table counts them, to their raw pages. keys and values
 * [batch, kv_heads, tokens, head_dim]: strides of the first three dimensions (multiples of 4), the last one's is 1;
 * 8-byte aligned. Tokens whose page is packed are left out. */
int tersor_cuda_kv_append(const void* table, const int32_t* pages, int64_t batch, int64_t table_pages, int64_t kv_heads,
                          int64_t head_dim, const void* keys, const void* values, int64_t tokens, int64_t key_batch,
                          int64_t key_head, int64_t key_token, int64_t value_batch, int64_t value_head,
                          int64_t value_token, void* stream);

/* Packs full raw pages: jobs [count, 2] int64, the address of each raw page and of its packed one. */
int tersor_cuda_kv_pack(const int64_t* jobs, int64_t count, int64_t kv_heads, int64_t head_dim, int dtype,
                        int64_t key_bits, int64_t value_bits, void* stream);

/* How many splits suit a device, for sequences of up to `pages` pages, and what scratch memory a launch needs. */
int tersor_cuda_kv_attention_plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t queries,
                                  int64_t pages, int multiprocessors, int64_t shared_memory_per_multiprocessor,
                                  int64_t* splits);
int tersor_cuda_kv_attention_workspace(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                       int64_t queries, int64_t splits, int64_t* partial_bytes,
                                       int64_t* counter_bytes);

/* out [batch, queries, heads, head_dim] = softmax(cap(q k^T scale)) v, log_sum_exp [batch, heads, queries] or NULL.
 * q [batch, heads, queries, head_dim]: strides (multiples of 4) of the first three dimensions, 8-byte aligned. The
 * first query's position is positions [batch], or, if NULL, the queries are each sequence's last tokens. first [batch]:
 * the first position that is seen, or NULL. window: a query sees so many positions up to its own, 0: all. sinks [heads]:
 * logits of the denominator alone, or NULL. softcap 0: none. A query that sees nothing gives 0 and -infinity. partials
 * (16-byte aligned) and counters are scratch memory of workspace's sizes, used by one launch at a time; counters are
 * zero before the first launch, and again after each. */
int tersor_cuda_kv_attention(const void* table, const int32_t* pages, int64_t batch, int64_t table_pages, const void* q,
                             int dtype, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t queries,
                             int64_t q_batch, int64_t q_head, int64_t q_query, void* out, float* log_sum_exp,
                             const int32_t* positions, const int32_t* first, const float* sinks, int64_t window,
                             int causal, float scale, float softcap, int64_t splits, float* partials,
                             uint32_t* counters, void* stream);

#ifdef __cplusplus
}
#endif
#endif
