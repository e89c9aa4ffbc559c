// What one instruction set offers. Each family of kernels is compiled once per instruction set, into
// the namespace tersor::<name>; isa.cpp gathers the entry points of one set in a table, and
// dispatch.cpp picks the table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tersor.h"

namespace tersor {

// Arguments of tersor_int_linear after validation: m, k >= 1, each n >= 1.
struct IntLinearArgs {
  const void* x;
  int x_dtype;
  int64_t m, k, ldx;
  const tersor_projection* projections;
  int count, scale_dtype, bits;
  int64_t group_size;
  int threads;
  const tersor_input* input;
};
// Arguments of tersor_int_fit after validation: n, k, steps >= 1.
struct IntFitArgs {
  const float* w;
  int64_t n, k, ldw;
  const float* importance;
  int bits;
  int64_t group_size;
  bool symmetric;
  int steps, scale_dtype;
  float *scales, *zero_points;
  int threads;
};

// gram [k, k] += x^T x, x [tokens, k] with row stride ldx, on and above the diagonal; tokens, k >= 1.
struct GramArgs {
  const void* x;
  int x_dtype;
  int64_t tokens, k, ldx;
  float* gram;
  int threads;
};
// y = weight * round(x / rms(x)) for rows of k values, all of one dtype; rows, k >= 1.
struct RmsNormArgs {
  const void *x, *weight;
  void* y;
  int dtype;
  int64_t rows, k, ldx;
  float epsilon;
  int threads;
};

// Arguments of tersor_kv_append and tersor_kv_attention after validation; fresh may be null for the latter.
struct KvAppendArgs {
  const tersor_kv* kv;
  int64_t page, slot;
  const tersor_kv_tokens* fresh;
  int threads;
};
struct KvPackArgs {
  const tersor_kv* kv;
  int64_t kind;
  const int64_t *raw, *packed;
  int threads;
};
struct KvAttentionArgs {
  const tersor_kv* kv;
  const tersor_kv_query* query;
  int threads;
};
struct KvMassArgs {
  const tersor_kv* kv;
  const tersor_kv_query* query;
  float* mass;
  int threads;
};

using IntLinearFunction = int (*)(const IntLinearArgs&);

struct IsaKernels {
  const char* name;
  IntLinearFunction exact;  // activations as they are
  IntLinearFunction a8;     // activations rounded to integers; null when not built
  int (*fit)(const IntFitArgs&);
  int (*gram)(const GramArgs&);
  void (*rms_norm)(const RmsNormArgs&);
  int (*kv_append)(const KvAppendArgs&);
  int (*kv_pack)(const KvPackArgs&);
  int (*kv_attention)(const KvAttentionArgs&);
  int (*kv_mass)(const KvMassArgs&);
  // Both give a CodecFault, and which stream has it.
  int (*kv_encode)(tersor_kv_stream* streams, int64_t count, int threads, int64_t* bad);
  int (*kv_decode)(const tersor_kv_stream* streams, int64_t count, int threads, int64_t* bad);
  // Loops that only do one thing, for machine.cpp to time: bytes read, and operations done in
  // `rounds` rounds (0: the instruction set has no such instruction).
  uint64_t (*read)(const void* data, size_t bytes);
  double (*fp32)(long rounds);
  double (*int8)(long rounds);
  double (*bf16)(long rounds);
};

#define TERSOR_DECLARE_ISA(name)     \
  namespace name {                   \
  extern const IsaKernels kernels;   \
  int int_linear_exact(const IntLinearArgs& arguments); \
  int int_linear_a8(const IntLinearArgs& arguments);    \
  bool int_linear_limbs(const IntLinearArgs& arguments, int* status); \
  int int_fit(const IntFitArgs& arguments);             \
  int gram(const GramArgs& arguments);                  \
  void rms_norm(const RmsNormArgs& arguments);          \
  int kv_append(const KvAppendArgs& arguments);         \
  int kv_pack(const KvPackArgs& arguments);             \
  int kv_attention(const KvAttentionArgs& arguments);   \
  int kv_mass(const KvMassArgs& arguments);             \
  int kv_encode(tersor_kv_stream* streams, int64_t count, int threads, int64_t* bad);       \
  int kv_decode(const tersor_kv_stream* streams, int64_t count, int threads, int64_t* bad); \
  uint64_t floor_read(const void* data, size_t bytes);  \
  double floor_fp32(long rounds);    \
  double floor_int8(long rounds);    \
  double floor_bf16(long rounds);    \
  }
TERSOR_DECLARE_ISA(generic)
TERSOR_DECLARE_ISA(avx2)
TERSOR_DECLARE_ISA(avx512)
TERSOR_DECLARE_ISA(avx512_emulated)
#undef TERSOR_DECLARE_ISA

// The instruction set in use.
const IsaKernels& current_isa();

}  // namespace tersor
