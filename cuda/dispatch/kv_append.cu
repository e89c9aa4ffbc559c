// Launchers of kernels/kv_append.cu, kernels/kv_pack.cu and kernels/kv_pack_formats.cu.
#include <cstdint>

#include "common/status.h"
#include "dispatch/kv_checks.h"
#include "dispatch/launch.h"
#include "kernels/kv_append.h"
#include "kernels/kv_pack.h"
#include "tersor_kv.h"

namespace tersor {

KvAppendKernel* kv_append_kernel = nullptr;
KvPackKernel *kv_pack_kernel = nullptr, *kv_pack_formats_kernel = nullptr;

}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_kv_append(const tersor_cuda_kv_cache* cache, const tersor_cuda_kv_tokens* fresh,
                                     void* stream) {
  const tersor_cuda_kv_cache& c = *cache;
  const tersor_cuda_kv_tokens& f = *fresh;
  if (int status = check_kv_shape(c.batch, c.kv_heads, c.head_dim)) return status;
  if (f.tokens < 0 || f.tokens > int64_t(1) << 30) {
    return fail(TERSOR_INVALID, "tokens is %lld; accepted: 0 to 2^30", (long long)f.tokens);
  }
  if (c.batch == 0 || f.tokens == 0) return TERSOR_OK;
  if (int status = check_kv_table(c.table, c.pages, c.table_pages)) return status;
  bool whole = f.keys && f.values && kv_aligned(f.keys, 8) && kv_aligned(f.values, 8);
  for (int i = 0; i < 3; ++i) whole = whole && f.key_strides[i] % 4 == 0 && f.value_strides[i] % 4 == 0;
  if (!whole) {
    return fail(TERSOR_INVALID, "keys and values start at %p and %p; accepted: rows that are 8-byte aligned", f.keys,
                f.values);
  }
  if (!kv_append_kernel) return fail(TERSOR_INVALID, "kv_append: not in this build");
  KvAppendArguments a{};
  if (int status = read_kv_rotary(c, &a.rotary)) return status;
  a.table = static_cast<const KvPage*>(c.table);
  a.pages = c.pages;
  a.keys = f.keys;
  a.values = f.values;
  a.bias = f.bias;
  for (int i = 0; i < 3; ++i) {
    a.key_strides[i] = f.key_strides[i];
    a.value_strides[i] = f.value_strides[i];
  }
  a.tokens = static_cast<int>(f.tokens);
  a.kv_heads = static_cast<int>(c.kv_heads);
  a.dim = static_cast<int>(c.head_dim);
  a.table_pages = static_cast<int>(c.table_pages);
  a.biased = c.biased != 0;
  const dim3 grid(static_cast<unsigned>((f.tokens + kKvAppendWarps - 1) / kKvAppendWarps),
                  static_cast<unsigned>(c.kv_heads), static_cast<unsigned>(c.batch));
  const int error = launch(kv_append_kernel, grid, dim3(32 * kKvAppendWarps), 0, static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "kv_append: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}

extern "C" int tersor_cuda_kv_pack(const tersor_cuda_kv_cache* cache, int64_t format, int64_t key_bits,
                                   int64_t value_bits, const int64_t* jobs, int64_t count, void* stream) {
  const tersor_cuda_kv_cache& c = *cache;
  if (int status = check_kv_shape(0, c.kv_heads, c.head_dim)) return status;
  if (int status = check_kv_bits(key_bits, value_bits)) return status;
  if (int status = check_kv_dtype(c.dtype)) return status;
  if (count < 0 || count > INT32_MAX) {
    return fail(TERSOR_INVALID, "count is %lld; accepted: 0 to 2^31 - 1", (long long)count);
  }
  if (count == 0) return TERSOR_OK;
  if (!jobs || !kv_aligned(jobs, 16)) return fail(TERSOR_INVALID, "jobs: accepted is a 16-byte aligned address");
  KvFormat formats[kKvFormats];
  if (int status = read_kv_formats(c, formats)) return status;
  if (format < 0 || format > c.formats) {
    return fail(TERSOR_INVALID, "format is %lld; accepted: 0 to %lld", (long long)format, (long long)c.formats);
  }
  KvPackArguments a{};
  a.format = formats[format];
  if (int status = check_kv_codings(a.format, c.head_dim, key_bits, value_bits)) return status;
  if (int status = read_kv_rotary(c, &a.rotary)) return status;
  const bool plain = format == 0 && !c.biased && c.rotary_dim == 0;
  KvPackKernel* kernel = plain ? kv_pack_kernel : kv_pack_formats_kernel;
  if (!kernel) return fail(TERSOR_INVALID, "kv_pack: not in this build");
  a.jobs = jobs;
  a.dim = static_cast<int>(c.head_dim);
  a.key_bits = static_cast<int>(key_bits);
  a.value_bits = static_cast<int>(value_bits);
  a.is_bfloat16 = c.dtype == TERSOR_BFLOAT16;
  a.biased = c.biased != 0;
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(c.kv_heads));
  const int error = launch(kernel, grid, dim3(32 * kKvPackWarps), plain ? 0 : kKvPackShared,
                           static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "kv_pack: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}
