// Launcher of kernels/kv_advance.cu.
#include <cstdint>

#include "common/status.h"
#include "dispatch/kv_checks.h"
#include "dispatch/launch.h"
#include "kernels/kv_advance.h"
#include "tersor_kv_static.h"

namespace tersor {

KvAdvanceKernel* kv_advance_kernel = nullptr;

}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_kv_advance(const tersor_cuda_kv_static* cache, int64_t tokens, void* stream) {
  const tersor_cuda_kv_static& c = *cache;
  if (int status = check_kv_shape(c.batch, 1, 64)) return status;
  if (int status = check_kv_bits(c.key_bits, c.value_bits)) return status;
  if (c.batch == 0) return TERSOR_OK;
  if (int status = check_kv_table(c.table, c.pages, c.table_pages)) return status;
  const bool packs = c.key_bits < 16 || c.value_bits < 16;
  if (!c.state || !kv_aligned(c.state, 8) || !c.jobs || !kv_aligned(c.jobs, 16) || c.job_pages < 1) {
    return fail(TERSOR_INVALID, "state and jobs: accepted are addresses, 8- and 16-byte aligned, and a job or more");
  }
  if (!c.raw || !kv_aligned(c.raw, 16) || c.raw_bytes < 16 || c.raw_bytes % 16 ||
      (c.sink_pages > 0 && (!c.sinks || !kv_aligned(c.sinks, 16))) ||
      (packs && (!c.packed || !kv_aligned(c.packed, 16) || c.packed_bytes < 16 || c.packed_bytes % 16))) {
    return fail(TERSOR_INVALID, "sinks, raw and packed: accepted are 16-byte aligned regions");
  }
  const int64_t most = int64_t(1) << 30;
  if (c.max_tokens < 1 || c.max_tokens > kKvTokens * c.table_pages || c.max_tokens > most) {
    return fail(TERSOR_INVALID, "max_tokens is %lld; accepted: 1 to %lld, those of the table, and 2^30",
                (long long)c.max_tokens, (long long)(kKvTokens * c.table_pages));
  }
  if (tokens < 0 || tokens > c.most || c.most > most || c.recent < 0 || c.recent > most) {
    return fail(TERSOR_INVALID, "tokens, most, recent are %lld, %lld, %lld; accepted: 0 to most, to 2^30, 0 to 2^30",
                (long long)tokens, (long long)c.most, (long long)c.recent);
  }
  const int64_t after_sinks = c.table_pages - c.sink_pages;
  if (c.sink_pages < 0 || c.sink_pages > c.table_pages || c.raw_pages < 1 ||
      (c.raw_pages < after_sinks && (!packs || kKvTokens * c.raw_pages < c.recent + c.most + 2 * kKvTokens))) {
    return fail(TERSOR_INVALID, "raw_pages is %lld; accepted: the table's %lld after the sinks, or, where pages are "
                "packed, those of recent + most tokens and two more", (long long)c.raw_pages, (long long)after_sinks);
  }
  if (packs && (c.packed_pages < 1 || kKvTokens * c.job_pages < c.most)) {
    return fail(TERSOR_INVALID, "packed_pages, job_pages are %lld, %lld; accepted: 1 or more, and most / 64 jobs",
                (long long)c.packed_pages, (long long)c.job_pages);
  }
  if (c.format < 0 || c.format > 255) {
    return fail(TERSOR_INVALID, "format is %lld; accepted: 0 to 255", (long long)c.format);
  }
  if (!kv_advance_kernel) return fail(TERSOR_INVALID, "kv_advance: not in this build");
  KvAdvanceArguments a{};
  a.table = static_cast<KvPage*>(c.table);
  a.pages = c.pages;
  a.state = c.state;
  a.jobs = c.jobs;
  a.sinks = reinterpret_cast<int64_t>(c.sinks);
  a.raw = reinterpret_cast<int64_t>(c.raw);
  a.packed = reinterpret_cast<int64_t>(c.packed);
  a.raw_bytes = c.raw_bytes;
  a.packed_bytes = c.packed_bytes;
  a.table_pages = static_cast<int>(c.table_pages);
  a.job_pages = static_cast<int>(c.job_pages);
  a.sink_pages = static_cast<int>(c.sink_pages);
  a.raw_pages = static_cast<int>(c.raw_pages);
  a.packed_pages = static_cast<int>(packs ? c.packed_pages : 1);
  a.tokens = static_cast<int>(tokens);
  a.recent = static_cast<int>(c.recent);
  a.most = static_cast<int>(c.most);
  a.max_tokens = static_cast<int>(c.max_tokens);
  a.key_bits = static_cast<uint8_t>(c.key_bits);
  a.value_bits = static_cast<uint8_t>(c.value_bits);
  a.format = static_cast<uint8_t>(c.format);
  const int error = launch(kv_advance_kernel, dim3(static_cast<unsigned>(c.batch)), dim3(32), 0,
                           static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "kv_advance: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}
