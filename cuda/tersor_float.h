/* The C ABI of products with small floats on CUDA, beside cpp/tersor.h: device pointers, work put on `stream` (a
 * cudaStream_t) of the current device and not waited for. Every function returns TERSOR_OK or an error code. */
#ifndef TERSOR_FLOAT_CUDA_H
#define TERSOR_FLOAT_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Ranges that fill a device, and the bytes of partials and counters for them. element and scale_kind as below. */
int tersor_cuda_float_linear_plan(int64_t m, int64_t n, int64_t k, int element, int scale_kind, int multiprocessors,
                                  int64_t shared_memory_per_multiprocessor, int64_t* ranges, int64_t* partial_bytes,
                                  int64_t* counter_bytes);

/* y[m, n] = x[m, k] (values * scales)^T + bias; x, bias and y of x_dtype 1 bfloat16 or 2 float16. codes [n][k] e4m3
 * (element 0), [n][ceil(k/2)] pairs of e2m1 (1) or [n][ceil(6k/8)] of e2m3 (2), dense, low bits first. scales
 * [ceil(n/scale_rows)][ceil(k/group)]: enum tersor_dtype with groups that are multiples of 128 or cover k; 3: exponents
 * with a bias of 127, groups of 32; 4: e4m3 over *global, groups of 16, element 1. counters are zero before and
 * after. */
int tersor_cuda_float_linear(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx, const uint8_t* codes,
                             int element, const void* scales, int scale_kind, int64_t scale_rows, int64_t group,
                             const float* global, const void* bias, void* y, int64_t n, int64_t ldy, int64_t ranges,
                             float* partials, uint32_t* counters, void* stream);

/* x [m, k] of x_dtype (enum tersor_dtype) to e4m3 codes [m][128 ceil(k/128)] and fp32 scales [m][groups] of
 * cuda/tile/fp8_codes.h: groups 1, or ceil(k/128). top: the largest magnitude that all tokens share, or NULL for each
 * group's own. interleaved: channels in the order of 4-bit weights. values: codes times scales, [m][k] of x_dtype,
 * instead of codes and scales, or NULL. */
int tersor_cuda_fp8_rows(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx, const float* top,
                         int64_t groups, int interleaved, uint8_t* codes, float* scales, void* values,
                         void* stream);

int tersor_cuda_fp8_linear_plan(int64_t m, int64_t n, int64_t k, int weight, int multiprocessors,
                                int64_t shared_memory_per_multiprocessor, int64_t* ranges, int64_t* partial_bytes,
                                int64_t* counter_bytes);

/* y[m, n] = (x x_scales) (weights scales)^T + bias from such codes, on sm_89 and later. weight 0: symmetric integers of
 * 4 bits in the layout of cpp/cpu/int_layout.h, scales [ceil(n/16)][groups][16] of scale_dtype (enum tersor_dtype, or
 * 4: e4m3 times *scale_multiplier), groups of a multiple of 32 or (0) a row, x interleaved; 1: e4m3 [n][k], scales
 * [ceil(n/scale_rows)][ceil(k/group)], groups of a multiple of 128 or all of k. bias and y are of y_dtype, 1 bfloat16 or 2 float16. counters are zero before and after. */
int tersor_cuda_fp8_linear(const uint8_t* x, const float* x_scales, int64_t x_groups, int64_t m, int64_t k,
                           const uint8_t* codes, int weight, const void* scales, int scale_dtype,
                           const float* scale_multiplier, int64_t scale_rows, int64_t group, const void* bias,
                           int y_dtype, void* y, int64_t n, int64_t ldy, int64_t ranges, float* partials,
                           uint32_t* counters, void* stream);

/* x [m, k] rounded in groups: kind 0 MXFP4, 1 NVFP4, 2 MXFP8, 3 MXFP6 (e2m3). codes [m][64 ceil(k/128)], two of e2m1 in
 * a byte, or [m][128 ceil(k/128)], a byte each, and scales [m][ceil(k/128) * (4; NVFP4: 8)]: exponents with a bias of
 * 127, or e4m3 numbers over *global (NVFP4); or values [m][k] of x_dtype instead. */
int tersor_cuda_block_rows(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx, int kind,
                           const float* global, uint8_t* codes, uint8_t* scales, void* values, void* stream);

int tersor_cuda_fp4_linear_plan(int64_t m, int64_t n, int64_t k, int kind, int multiprocessors,
                                int64_t shared_memory_per_multiprocessor, int64_t* ranges, int64_t* partial_bytes,
                                int64_t* counter_bytes);

/* y[m, n] = x weights^T + bias from such codes and weights [n][ceil(k/2)] with scales [n][ceil(k/group)] of the same
 * kind, on sm_120a alone. bias and y are of y_dtype, 1 bfloat16 or 2 float16. counters are zero before and after. */
int tersor_cuda_fp4_linear(const uint8_t* x, const uint8_t* x_scales, const float* x_global, int64_t m, int64_t k,
                           const uint8_t* codes, const uint8_t* scales, const float* global, int kind,
                           const void* bias, int y_dtype, void* y, int64_t n, int64_t ldy, int64_t ranges,
                           float* partials, uint32_t* counters, void* stream);

int tersor_cuda_mx_linear_plan(int64_t m, int64_t n, int64_t k, int weight, int multiprocessors,
                               int64_t shared_memory_per_multiprocessor, int64_t* ranges, int64_t* partial_bytes,
                               int64_t* counter_bytes);

/* y[m, n] = x weights^T + bias from codes of kind 2 or 3 above (input 0: e4m3, 1: e2m3) and weights [n][ceil(k b/8)] of
 * b = 8 (weight 0: e4m3), 6 (1: e2m3) or 4 (2: e2m1) bits, dense, low bits first, with exponents [n][ceil(k/32)], on
 * sm_120a alone. bias and y are of y_dtype, 1 bfloat16 or 2 float16. counters are zero before and after. */
int tersor_cuda_mx_linear(const uint8_t* x, const uint8_t* x_scales, int input, int64_t m, int64_t k,
                          const uint8_t* codes, int weight, const uint8_t* scales, const void* bias, int y_dtype,
                          void* y, int64_t n, int64_t ldy, int64_t ranges, float* partials, uint32_t* counters,
                          void* stream);

#ifdef __cplusplus
}
#endif

#endif
