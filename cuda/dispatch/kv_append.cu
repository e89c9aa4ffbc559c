// Launchers of kernels/kv_append.cu and kernels/kv_pack.cu.
#include <cstdint>

#include "common/status.h"
#include "dispatch/kv_checks.h"
#include "dispatch/launch.h"
#include "kernels/kv_append.h"
#include "kernels/kv_pack.h"
#include "tersor_kv.h"

namespace tersor {

KvAppendKernel* kv_append_kernel = nullptr;
KvPackKernel* kv_pack_kernel = nullptr;

}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_kv_append(const void* table, const int32_t* pages, int64_t batch, int64_t table_pages,
                                     int64_t kv_heads, int64_t head_dim, const void* keys, const void* values,
                                     int64_t tokens, int64_t key_batch, int64_t key_head, int64_t key_token,
                                     int64_t value_batch, int64_t value_head, int64_t value_token, void* stream) {
  if (int status = check_kv_shape(batch, kv_heads, head_dim)) return status;
  if (tokens < 0 || tokens > int64_t(1) << 30) {
    return fail(TERSOR_INVALID, "tokens is %lld; accepted: 0 to 2^30", (long long)tokens);
  }
  if (batch == 0 || tokens == 0) return TERSOR_OK;
  if (int status = check_kv_table(table, pages, table_pages)) return status;
  const int64_t strides[] = {key_batch, key_head, key_token, value_batch, value_head, value_token};
  bool whole = keys && values && kv_aligned(keys, 8) && kv_aligned(values, 8);
  for (int64_t stride : strides) whole = whole && stride % 4 == 0;
  if (!whole) {
    return fail(TERSOR_INVALID, "keys and values start at %p and %p; accepted: rows that are 8-byte aligned", keys,
                values);
  }
  if (!kv_append_kernel) return fail(TERSOR_INVALID, "kv_append: not in this build");
  KvAppendArguments a{};
  a.table = static_cast<const KvPage*>(table);
  a.pages = pages;
  a.keys = keys;
  a.values = values;
  for (int i = 0; i < 3; ++i) {
    a.key_strides[i] = strides[i];
    a.value_strides[i] = strides[3 + i];
  }
  a.tokens = static_cast<int>(tokens);
  a.dim = static_cast<int>(head_dim);
  a.table_pages = static_cast<int>(table_pages);
  const dim3 grid(static_cast<unsigned>((tokens + kKvAppendWarps - 1) / kKvAppendWarps),
                  static_cast<unsigned>(kv_heads), static_cast<unsigned>(batch));
  const int error = launch(kv_append_kernel, grid, dim3(32 * kKvAppendWarps), 0, static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "kv_append: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}

extern "C" int tersor_cuda_kv_pack(const int64_t* jobs, int64_t count, int64_t kv_heads, int64_t head_dim, int dtype,
                                   int64_t key_bits, int64_t value_bits, void* stream) {
  if (int status = check_kv_shape(0, kv_heads, head_dim)) return status;
  if (int status = check_kv_bits(key_bits, value_bits)) return status;
  if (int status = check_kv_dtype(dtype)) return status;
  if (count < 0 || count > INT32_MAX) {
    return fail(TERSOR_INVALID, "count is %lld; accepted: 0 to 2^31 - 1", (long long)count);
  }
  if (count == 0) return TERSOR_OK;
  if (!jobs || !kv_aligned(jobs, 16)) return fail(TERSOR_INVALID, "jobs: accepted is a 16-byte aligned address");
  if (!kv_pack_kernel) return fail(TERSOR_INVALID, "kv_pack: not in this build");
  KvPackArguments a{};
  a.jobs = jobs;
  a.dim = static_cast<int>(head_dim);
  a.key_bits = static_cast<int>(key_bits);
  a.value_bits = static_cast<int>(value_bits);
  a.is_bfloat16 = dtype == TERSOR_BFLOAT16;
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(kv_heads));
  const int error = launch(kv_pack_kernel, grid, dim3(32 * kKvPackWarps), 0, static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "kv_pack: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}
