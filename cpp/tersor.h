/* The C ABI of tersor's native core.
 *
 * Matrices are row-major; sizes and strides count elements; pointers may be host pointers only.
 * Every function returns TERSOR_OK or an error code; tersor_last_error() then gives the sentence
 * (per thread). Nothing here throws, allocates for the caller or keeps a pointer after returning.
 */
#ifndef TERSOR_H
#define TERSOR_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum tersor_status { TERSOR_OK = 0, TERSOR_INVALID = 1, TERSOR_NO_MEMORY = 2, TERSOR_CUDA_ERROR = 3 };
enum tersor_dtype { TERSOR_FLOAT32 = 0, TERSOR_BFLOAT16 = 1, TERSOR_FLOAT16 = 2 };

const char* tersor_last_error(void);

/* One weight matrix w[n, k] = (code - zero_point) * scale, in the layout of cpp/cpu/int_layout.h. scale_dtype: that of
 * scales, or 3: two levels, 2 to 6 bits (cpp/cpu/int_scales.h; on CUDA tersor_cuda_lowbit_linear alone takes them). */
typedef struct tersor_projection {
  const uint8_t* qweight;     /* [ceil(n/16), ceil(k/32), 64*bits] */
  const void* scales;         /* [ceil(n/16), groups, 16], scale_dtype */
  const uint8_t* zero_points; /* [ceil(n/16), groups, 16], or NULL: 2^(bits-1) */
  const void* bias;           /* [n], x's dtype, or NULL */
  void* y;                    /* [m, n] with row stride ldy, x's dtype */
  int64_t n;
  int64_t ldy;
} tersor_projection;

/* How activations are taken (formats/integer.py:activation_codes). With bits below 16 each row first goes through the
 * steps below whose pointers are set, in this order, in fp32 and in memory of one thread. */
typedef struct tersor_input {
  int64_t bits;              /* 16: as they are; 4, 6, 8: rounded to integers */
  int64_t group;             /* k that share a scale: a multiple of 32, or 0: all of a row */
  int64_t asymmetric;        /* the range of a group is min to max, with a zero point; else -max|x| to max|x| */
  const float* scales;       /* [groups]: steps used instead of those of the input, or NULL */
  const uint8_t* block_bits; /* [ceil(k/128)]: 4 or 8 for each 128 k instead of bits, or NULL; group 32, 64, 128 */
  const void* norm_weight;   /* [k], x's dtype: x becomes norm_weight * x / sqrt(mean(x^2) + epsilon) */
  const void* other;         /* [m, k], x's dtype, row stride ldother: x becomes silu(x) * other */
  int64_t ldother;
  const int32_t* index;      /* [k]: x becomes x[index] */
  const float* signs;        /* [k]: factors of x */
  /* Each row is taken as [k/(rows*columns)][rows][columns]; then left X, then X right. */
  int64_t rows, columns;
  const float* left;         /* [rows, rows], or NULL */
  const float* right;        /* [columns, columns rounded up to 16], zeros beyond columns, or NULL */
  int64_t butterflies;       /* instead of right: a Hadamard matrix, columns a power of two from 16 on */
  float clip;                /* factor of the range, above 0 up to 1 */
  float epsilon;
  float hadamard_scale;      /* what the butterflies multiply by */
} tersor_input;

/* y_i = x w_i^T + bias_i for `count` weights of equal k, bits and group size, in one parallel region. */
int tersor_int_linear(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx,
                      const tersor_projection* projections, int count, int scale_dtype, int bits,
                      int64_t group_size, const tersor_input* input, int threads);

/* The same for a mixture of experts: x [rows, k] sorted by expert, ends [experts] the row after each expert's last one
 * (ascending, at most rows). The weights of all experts follow one another; bias is [experts, n], input's scales
 * [experts, groups], and it has no steps. Rows from the last end on become 0. */
int tersor_int_linear_grouped(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t ldx, const int32_t* ends,
                              int64_t experts, const tersor_projection* weights, int scale_dtype, int bits,
                              int64_t group_size, const tersor_input* input, int threads);

int tersor_int_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* qweight, int threads);
int tersor_int_unpack(const uint8_t* qweight, int64_t n, int64_t k, int bits, uint8_t* codes, int threads);
int tersor_int_dequantize(const uint8_t* qweight, const void* scales, int scale_dtype,
                          const uint8_t* zero_points, int64_t n, int64_t k, int bits,
                          int64_t group_size, void* out, int out_dtype, int threads);

/* Scales and zero points [n, groups] (fp32, scales rounded to scale_dtype) of w [n, k] for integers of `bits` bits:
 * from each group's range (steps 1), or the best in squared error, weighted by importance [k] or NULL, of `steps` ranges
 * that shrink by a hundredth each. Symmetric zero points are 2^(bits-1). */
int tersor_int_fit(const float* w, int64_t n, int64_t k, int64_t ldw, const float* importance, int bits,
                   int64_t group_size, int symmetric, int steps, int scale_dtype, float* scales, float* zero_points,
                   int threads);

/* gram [k, k] (fp32) += x^T x for x [tokens, k], on and above the diagonal; some of what is below is written too. */
int tersor_gram(const void* x, int x_dtype, int64_t tokens, int64_t k, int64_t ldx, float* gram, int threads);

/* y = weight * round(x / sqrt(mean(x^2) + epsilon)) for rows of k values; sums in fp32, round to the type of all three. */
int tersor_rms_norm(const void* x, const void* weight, void* y, int dtype, int64_t rows, int64_t k, int64_t ldx,
                    float epsilon, int threads);

/* How the numbers of a packed page are coded (python/tersor/kv/formats.py). Levels: int8 [2^bits], ascending, -127 the
 * least number of a vector and 127 its largest: code c is minimum + scale * (2^bits - 1) * (level[c] + 127) / 254.
 * Float8 e4m3 has no minimum. Outliers: entries of a token and channel and the difference to its code, by head. */
enum tersor_kv_coding { TERSOR_KV_UNIFORM = 0, TERSOR_KV_LEVELS = 1, TERSOR_KV_E4M3 = 2 };
typedef struct tersor_kv_format {
  int64_t key_bits, value_bits;   /* 2, 3, 4, 8, or 16 for as in raw pages */
  int64_t key_group;              /* channels that share a token's scale; 0: a scale for each channel over the page */
  int64_t value_group;            /* channels that share a token's scale: a multiple of 16 */
  int64_t value_separable;        /* values are divided by a factor of their channel first; value_group is value_dim */
  int64_t key_coding, value_coding;
  int64_t key_outliers, value_outliers;
  int64_t rank;                   /* of a residual, 0 to 16; its factors stand in the page and in a segment */
  const int8_t *key_levels, *value_levels;
} tersor_kv_format;

/* A layer's cache of keys and values: a list of pages of at most page_tokens tokens, each a block of memory for every
 * sequence with its heads one after another (cpp/cpu/kv_layout.h). All fields are int64 or pointers. */
typedef struct tersor_kv {
  int64_t batch, kv_heads, key_dim, value_dim; /* dimensions: multiples of 16 */
  int64_t dtype;                               /* of queries, fresh keys and values, and raw pages */
  int64_t page_tokens;                         /* a multiple of 32, to 256 */
  int64_t biased;                              /* each slot of a head has a float32 added to its scores */
  int64_t rotary_dim, rotary_interleaved;      /* packed keys are turned back to their page's first slot; 0: not */
  const float* rotary;                         /* [page_tokens/16, rotary_dim/2, 2, 16]: cosines, sines of slots */
  int64_t formats;                             /* at most 8 */
  const tersor_kv_format* format;
  int64_t pages;
  /* [pages, 2 + batch], or [pages, 2 + 2 * batch] where a format has a rank: tokens held, kind (0 raw, k: format
   * k - 1), the page's address for each sequence, then the address of its segment, or 0: float16 [kv_heads, rank,
   * key_dim + value_dim], the right factors of the residual. */
  const int64_t* table;
} tersor_kv;

/* Tokens [batch, kv_heads, tokens, dim] in kv's dtype; strides of the first three dimensions, the last one's is 1. */
typedef struct tersor_kv_tokens {
  const void *keys, *values;
  int64_t tokens;
  int64_t key_strides[3], value_strides[3];
  const float* bias; /* [batch, kv_heads, tokens] of a biased cache, or NULL: 0 */
} tersor_kv_tokens;

/* Bytes of a page of a kind for one sequence and one head. */
int64_t tersor_kv_page_bytes(const tersor_kv* kv, int64_t kind);

/* Writes tokens from slot `slot` of page `page` on, across as many pages as they need. The tokens held by each page,
 * as the table says, are those after this call; a packed page is written whole, from slot 0. */
int tersor_kv_append(const tersor_kv* kv, int64_t page, int64_t slot, const tersor_kv_tokens* fresh, int threads);

/* Packs a full raw page into format `kind` - 1: addresses [batch] of the raw memory and of the packed memory. */
int tersor_kv_pack(const tersor_kv* kv, int64_t kind, const int64_t* raw, const int64_t* packed, int threads);

typedef struct tersor_kv_query {
  const void* q; /* [batch, heads, queries, key_dim]; the last stride is 1 */
  int64_t heads, queries, strides[3];
  void* out;              /* [batch, queries, heads, value_dim] */
  float* log_sum_exp;     /* [batch, heads, queries], or NULL */
  int64_t first;          /* position of the first token of the first page */
  int64_t position;       /* position of the first query; each next one follows */
  const int64_t* positions; /* [queries]: positions of queries that do not, or NULL */
  int64_t window;         /* a query sees the last `window` positions up to its own; 0: all */
  int64_t causal;         /* a query sees no position after its own */
  const uint8_t* mask;    /* 1 where a query sees a position, or NULL */
  int64_t mask_strides[4]; /* of batch, head, query, position */
  int64_t mask_first, mask_tokens; /* positions that the mask covers; others are not seen */
  const float* sinks;     /* [heads]: logits that only take part in the denominator, or NULL */
  float scale, softcap;   /* softcap 0: none */
} tersor_kv_query;

/* softmax(cap(q k^T scale) + bias) v over all tokens of the cache, after appending `fresh` (or NULL) as
 * tersor_kv_append does.
 * Products of packed codes with fp32 coefficients, sums in fp32. A query that sees nothing gives 0 (log-sum-exp -inf).
 * The result does not depend on the number of threads. */
int tersor_kv_attention(const tersor_kv* kv, const tersor_kv_query* query, int64_t page, int64_t slot,
                        const tersor_kv_tokens* fresh, int threads);

/* mass [batch, kv_heads, tokens] = for each token the sum over all queries of all query heads that read its key head of
 * exp(score - log_sum_exp), with log_sum_exp [batch, heads, queries] of the query read, not written; q and what
 * restricts it are as for attention, out and sinks are not used. */
int tersor_kv_mass(const tersor_kv* kv, const tersor_kv_query* query, float* mass, int threads);

/* The bitstream of one head's keys or values over a chunk of tokens (cpp/cpu/kv_codec.h). All fields are 64 bits. */
typedef struct tersor_kv_stream {
  void* values;          /* [tokens][dim]: float32 to encode, dtype to decode */
  int64_t stride;        /* from one token to the next */
  uint8_t* bytes;        /* the stream */
  int64_t size;          /* its length; for encoding the room, then its length */
  const float* rotation; /* decoding turns keys by these: cosines [rotary_dim/2][tokens], then sines alike; or NULL */
  int32_t* levels;       /* [dim][tokens]: the integers that values are step/8 times, also given out; or NULL */
  int64_t tokens, dim, dtype;
  int64_t rotary_dim;    /* channels that are turned, from the first on; 0: none */
  int64_t interleaved;   /* pairs are (2i, 2i+1), or (i, i + rotary_dim/2) */
  int64_t step_bits;     /* for encoding: the step, a float16 */
} tersor_kv_stream;

/* Room that encoding takes at most, -1 for sizes that are not accepted. */
int64_t tersor_kv_encode_room(int64_t tokens, int64_t dim);
int tersor_kv_encode(tersor_kv_stream* streams, int64_t count, int threads);
/* Any bytes are safe; those that encoding did not write are refused, or give some numbers. */
int tersor_kv_decode(const tersor_kv_stream* streams, int64_t count, int threads);
/* Frequencies, out of 4096, of the symbols 0 to 127, then the escape, then -127 to -1, in the table of the format. */
int tersor_kv_codec_table(int index, uint16_t* frequencies);

/* Instruction sets: the i-th that this machine can run (best first, NULL past the end). */
const char* tersor_isa_name(int index);
const char* tersor_current_isa(void);
int tersor_set_isa(const char* name);
const char* tersor_threading(void);

/* What this machine can do at most, measured with `threads` threads; 0 where it cannot. */
typedef struct tersor_floors {
  double read_gbs, fp32_gflops, int8_gops, bf16_gflops;
} tersor_floors;
int tersor_machine_floors(int threads, double seconds, tersor_floors* floors);

typedef struct tersor_cuda_device_info {
  char name[256];
  int major, minor, multiprocessors;
  int64_t memory_bytes, shared_memory_per_block, l2_bytes;
} tersor_cuda_device_info;
int tersor_cuda_device_count(void);
int tersor_cuda_device(int index, tersor_cuda_device_info* info);

/* On CUDA: device pointers, x and y in 16 bits, work put on `stream` (a cudaStream_t) of the current device and not
 * waited for. The work is cut into `ranges` of equal length, one for each block that runs at the same time; plan says
 * how many suit a device. partials (16-byte aligned) and counters are scratch memory of workspace's sizes, used by
 * one launch at a time; counters are zero before the first launch, and zero again after each. Rows of x, and qweight,
 * scales and zero_points, are 16-byte aligned. With bfloat16 x, zero points are at most 2^bits. */
int tersor_cuda_int_linear_plan(int64_t m, int64_t n, int64_t k, int bits, int64_t group_size, int scale_dtype,
                                int has_zero_points, int multiprocessors, int64_t shared_memory_per_multiprocessor,
                                int64_t* ranges);
int tersor_cuda_int_linear_workspace(int64_t m, int64_t n, int64_t ranges, int64_t* partial_bytes,
                                     int64_t* counter_bytes);
int tersor_cuda_int_linear(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx, const uint8_t* qweight,
                           const void* scales, int scale_dtype, const uint8_t* zero_points, const void* bias, void* y,
                           int64_t n, int64_t ldy, int bits, int64_t group_size, int64_t ranges, float* partials,
                           uint32_t* counters, void* stream);
/* tersor_int_linear_grouped there: ends lie on the device and are not looked at before the launch; those out of order
 * or range are cut to the rows that there are. */
int tersor_cuda_int_linear_grouped_plan(int64_t rows, int64_t n, int64_t k, int bits, int64_t group_size,
                                        int scale_dtype, int has_zero_points, int64_t experts, int multiprocessors,
                                        int64_t shared_memory_per_multiprocessor, int64_t* ranges,
                                        int64_t* partial_bytes, int64_t* counter_bytes);
int tersor_cuda_int_linear_grouped(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t ldx,
                                   const int32_t* ends, int64_t experts, const uint8_t* qweight, const void* scales,
                                   int scale_dtype, const uint8_t* zero_points, const void* bias, void* y, int64_t n,
                                   int64_t ldy, int bits, int64_t group_size, int64_t ranges, float* partials,
                                   uint32_t* counters, void* stream);
/* Low-bit activations times integer weights, in integers: y = x w^T + bias + residual. Codes, sums and zero points of
 * activations lie as cuda/tile/act_codes.h says; width: 0 bytes, 1 nibbles (4-bit weights; groups of both sides
 * multiples of 64), 2 blocks of 128 channels of either. act_scales has rows of act_scale_stride, or one for all where
 * that is 0; act_group 0: one scale for a token. sums may be null where weights have no zero points, act_zero_points
 * (int16 [m, groups]) where activations have none. For width 2, stage_starts is int32 [2, ceil(k / 128) + 1]: for each
 * 128 channels the 64-byte units of a row before them, and the cost before them, 1 or 2 each; row_cost is the last.
 * bias, residual and y have y_dtype. k is at most 65536, with zero points on both sides of one level 32768; those of
 * weights at most 2^bits. scale_dtype 3: width 0, no sums. partials, counters as above, of the sizes that plan says. */
int tersor_cuda_lowbit_linear_plan(int64_t m, int64_t n, int64_t k, int bits, int64_t group_size, int scale_dtype,
                                   int has_zero_points, int64_t act_group, int act_has_zero_points, int width,
                                   int multiprocessors, int64_t shared_memory_per_multiprocessor, int64_t* ranges,
                                   int64_t* partial_bytes, int64_t* counter_bytes);
int tersor_cuda_lowbit_linear(const uint8_t* codes, int width, int64_t row_bytes, const float* act_scales,
                              int64_t act_scale_stride, const int16_t* sums, const int16_t* act_zero_points,
                              const int32_t* stage_starts, int64_t row_cost, int64_t act_group, int64_t m, int64_t k,
                              const uint8_t* qweight, const void* scales, int scale_dtype, const uint8_t* zero_points,
                              const void* bias, const void* residual, int64_t ldr, void* y, int y_dtype, int64_t n,
                              int64_t ldy, int bits, int64_t group_size, int64_t ranges, uint32_t* partials,
                              uint32_t* counters, void* stream);
/* The same for rows sorted by expert, as in tersor_cuda_int_linear_grouped: codes in bytes, no residual. */
int tersor_cuda_lowbit_linear_grouped_plan(int64_t rows, int64_t n, int64_t k, int bits, int64_t group_size,
                                           int scale_dtype, int has_zero_points, int64_t act_group,
                                           int act_has_zero_points, int64_t experts, int multiprocessors,
                                           int64_t shared_memory_per_multiprocessor, int64_t* ranges,
                                           int64_t* partial_bytes, int64_t* counter_bytes);
int tersor_cuda_lowbit_linear_grouped(const uint8_t* codes, int64_t row_bytes, const float* act_scales,
                                      int64_t act_scale_stride, const int16_t* sums, const int16_t* act_zero_points,
                                      int64_t act_group, int64_t rows, int64_t k, const int32_t* ends, int64_t experts,
                                      const uint8_t* qweight, const void* scales, int scale_dtype,
                                      const uint8_t* zero_points, const void* bias, void* y, int y_dtype, int64_t n,
                                      int64_t ldy, int bits, int64_t group_size, int64_t ranges, uint32_t* partials,
                                      uint32_t* counters, void* stream);
int tersor_cuda_int_dequantize(const uint8_t* qweight, const void* scales, int scale_dtype, const uint8_t* zero_points,
                               int64_t n, int64_t k, int bits, int64_t group_size, void* out, int out_dtype,
                               void* stream);

#ifdef __cplusplus
}
#endif
#endif
