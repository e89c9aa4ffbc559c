/* The C ABI of rounding activations on CUDA, beside cpp/tersor.h: device pointers, work put on `stream` (a
 * cudaStream_t) of the current device and not waited for. Functions return TERSOR_OK or an error code. All fields of
 * structs are int64 or pointers. The layout of what is written is in cuda/tile/act_codes.h. */
#ifndef TERSOR_ROWS_CUDA_H
#define TERSOR_ROWS_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Rows x [m, k] (dtype: enum tersor_dtype, row stride ldx) and the steps before they are rounded: those that are set,
 * in this order. A norm excludes `other`; of index, butterflies with or without left, and left with right there is
 * one. */
typedef struct tersor_cuda_rows {
  const void* x;
  int64_t dtype, m, k, ldx;
  const void* norm_weight; /* [k], x's dtype, 16-byte aligned: x becomes norm_weight * x / sqrt(mean(x^2) + epsilon) */
  const void* other;       /* [m, k], x's dtype, row stride ldother: x becomes SiLU(x) * other */
  int64_t ldother;
  const int32_t* index; /* [k], 0 to k - 1, 16-byte aligned: x becomes x[index] */
  const float* signs;   /* [k], 16-byte aligned: factors in front of butterflies */
  /* The row as [k / (rows * columns)][rows][columns]: left^T X, then X right or a Hadamard matrix of `butterflies`
   * channels, a power of two (1: none), along the columns. Without left, rows is 1 and columns is butterflies. The
   * matrices are fragments (cuda/tile/producer_products.h), 16-byte aligned; rows and columns of products up to 256. */
  int64_t rows, columns;
  const uint32_t* left;
  int64_t left_parts; /* 1: of -1 and 1; 2 */
  const uint32_t* right;
  int64_t butterflies;
} tersor_cuda_rows;

typedef struct tersor_cuda_codes {
  uint8_t* codes; /* 16-byte aligned */
  int64_t row_bytes;
  float* scales;        /* [m, groups] */
  int16_t* sums;        /* [m, K / 32], or NULL */
  int16_t* zero_points; /* [m, groups] for asymmetric codes of 8 bits, else NULL */
  int64_t bits, width;  /* 4, 6 or 8; 4 or 8, or 0: each block's own */
  int64_t group;        /* channels that share a scale: a multiple of 32, or 0: all */
  int64_t asymmetric;
  const float* static_scales; /* [groups]: steps instead of those of the input, or NULL */
  const uint8_t* block_bits;  /* [ceil(k / 128)] of 4 and 8 instead of bits, or NULL; then group is 32, 64 or 128 */
} tersor_cuda_codes;

/* Bytes of shared memory that a call takes; -1 where no kernel has such products. */
int64_t tersor_cuda_round_rows_shared(const tersor_cuda_rows* rows, const tersor_cuda_codes* codes);

/* clip: factor of the range, above 0 up to 1; factor: of the input of a Hadamard transform; most_shared: of a block. */
int tersor_cuda_round_rows(const tersor_cuda_rows* rows, const tersor_cuda_codes* codes, float clip, float epsilon,
                           float factor, int64_t most_shared, void* stream);

#ifdef __cplusplus
}
#endif

#endif
