// Launcher of kernels/sm80_kv_attention.cu: checks what can be checked from sizes and addresses, chooses the instance
// and cuts the sequences into splits.
#include <cstdint>

#include "common/status.h"
#include "dispatch/kv_checks.h"
#include "dispatch/launch.h"
#include "kernels/sm80_kv_attention.h"
#include "tersor_kv.h"

namespace tersor {

KvAttentionChooser* kv_attention_choosers[257] = {};

namespace {

// Pages that a split has at least: two for each of its four warps. Fewer cost more in their sums than they gain.
constexpr int64_t kKvMinPages = 2 * kKvWarps;

struct Problem {
  int rows, row_tiles;
  int64_t places;  // (sequence, head of keys, row tile)
};

int describe(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t queries, Problem* p) {
  if (int status = check_kv_shape(batch, kv_heads, head_dim)) return status;
  if (heads < 1 || heads % kv_heads != 0 || heads > 65535) {
    return fail(TERSOR_INVALID, "heads is %lld; accepted: a multiple of kv_heads = %lld to 65535", (long long)heads,
                (long long)kv_heads);
  }
  const int64_t most = int64_t(1) << 24;
  if (queries < 0 || queries > most) {
    return fail(TERSOR_INVALID, "queries is %lld; accepted: 0 to 2^24", (long long)queries);
  }
  const int64_t rows = queries * (heads / kv_heads);
  p->rows = rows <= 8 ? 8 : kv_most_rows(static_cast<int>(head_dim));
  const int64_t tiles = (rows + p->rows - 1) / p->rows;
  if (tiles * kv_heads > 65535) {
    return fail(TERSOR_INVALID, "queries is %lld; accepted on CUDA: so many that %d rows each make at most %lld blocks",
                (long long)queries, p->rows, 65535 / (long long)kv_heads);
  }
  p->row_tiles = static_cast<int>(tiles);
  p->places = batch * kv_heads * tiles;
  return TERSOR_OK;
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int64_t tersor_cuda_kv_page_bytes(int64_t head_dim, int64_t key_bits, int64_t value_bits) {
  if (check_kv_shape(1, 1, head_dim) || check_kv_bits(key_bits, value_bits)) return -1;
  return kv_page_bytes(static_cast<int>(head_dim), static_cast<int>(key_bits), static_cast<int>(value_bits));
}

extern "C" int tersor_cuda_kv_attention_plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                             int64_t queries, int64_t pages, int multiprocessors,
                                             int64_t shared_memory_per_multiprocessor, int64_t* splits) {
  Problem p;
  if (int status = describe(batch, heads, kv_heads, head_dim, queries, &p)) return status;
  if (multiprocessors < 1 || pages < 0) {
    return fail(TERSOR_INVALID, "multiprocessors, pages are %d, %lld; accepted: from 1 and from 0", multiprocessors,
                (long long)pages);
  }
  const int dim = static_cast<int>(head_dim);
  // The driver keeps 1 KB of each block's shared memory for itself.
  int64_t resident = shared_memory_per_multiprocessor / (kv_shared_bytes(dim, p.rows) + 1024);
  const int64_t by_registers = kv_blocks_per_multiprocessor(dim, p.rows);
  if (resident > by_registers) resident = by_registers;
  if (resident < 1) resident = 1;
  int64_t count = p.places > 0 ? multiprocessors * resident / p.places : 1;
  if (count > pages / kKvMinPages) count = pages / kKvMinPages;
  *splits = count < 1 ? 1 : count > 65535 ? 65535 : count;
  return TERSOR_OK;
}

extern "C" int tersor_cuda_kv_attention_workspace(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                                  int64_t queries, int64_t splits, int64_t* partial_bytes,
                                                  int64_t* counter_bytes) {
  Problem p;
  if (int status = describe(batch, heads, kv_heads, head_dim, queries, &p)) return status;
  if (splits < 1 || splits > 65535) {
    return fail(TERSOR_INVALID, "splits is %lld; accepted: 1 to 65535", (long long)splits);
  }
  *partial_bytes = *counter_bytes = 0;  // one split writes its results itself
  if (splits == 1) return TERSOR_OK;
  *partial_bytes = p.places * splits * kv_partial_floats(static_cast<int>(head_dim), p.rows) * 4;
  *counter_bytes = p.places * 4;
  return TERSOR_OK;
}

extern "C" int tersor_cuda_kv_attention(const void* table, const int32_t* pages, int64_t batch, int64_t table_pages,
                                        const void* q, int dtype, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                        int64_t queries, int64_t q_batch, int64_t q_head, int64_t q_query, void* out,
                                        float* log_sum_exp, const int32_t* positions, const int32_t* first,
                                        const float* sinks, int64_t window, int causal, float scale, float softcap,
                                        int64_t splits, float* partials, uint32_t* counters, void* stream) {
  Problem p;
  if (int status = describe(batch, heads, kv_heads, head_dim, queries, &p)) return status;
  if (batch == 0 || queries == 0) return TERSOR_OK;
  if (int status = check_kv_table(table, pages, table_pages)) return status;
  if (int status = check_kv_dtype(dtype)) return status;
  if (!q || !out) return fail(TERSOR_INVALID, "%s is absent", !q ? "q" : "out");
  if (!kv_aligned(q, 8) || q_batch % 4 || q_head % 4 || q_query % 4) {
    return fail(TERSOR_INVALID, "q starts at %p with strides %lld, %lld, %lld; accepted: 8-byte aligned rows", q,
                (long long)q_batch, (long long)q_head, (long long)q_query);
  }
  if (!kv_aligned(out, 8)) return fail(TERSOR_INVALID, "out: accepted is an 8-byte aligned address");
  if (window < 0 || window > INT32_MAX) {
    return fail(TERSOR_INVALID, "window is %lld; accepted: 0 to 2^31 - 1", (long long)window);
  }
  if (!(softcap >= 0)) return fail(TERSOR_INVALID, "softcap is %g; accepted: 0 or more", softcap);
  if (splits < 1 || splits > 65535) {
    return fail(TERSOR_INVALID, "splits is %lld; accepted: 1 to 65535", (long long)splits);
  }
  if (splits > 1 && (!partials || !counters || !kv_aligned(partials, 16))) {
    return fail(TERSOR_INVALID,
                "partials and counters: accepted is the workspace, 16-byte aligned, for splits above 1");
  }
  KvAttentionChooser* chooser = kv_attention_choosers[head_dim];
  KvAttentionKernel* kernel = chooser ? chooser(p.rows) : nullptr;
  if (!kernel) return fail(TERSOR_INVALID, "head_dim %lld: not in this build", (long long)head_dim);

  KvAttentionArguments a{};
  a.q = q;
  a.out = out;
  a.log_sum_exp = log_sum_exp;
  a.table = static_cast<const KvPage*>(table);
  a.pages = pages;
  a.positions = positions;
  a.first = first;
  a.sinks = sinks;
  a.partials = partials;
  a.counters = counters;
  a.q_strides[0] = q_batch;
  a.q_strides[1] = q_head;
  a.q_strides[2] = q_query;
  a.heads = static_cast<int>(heads);
  a.kv_heads = static_cast<int>(kv_heads);
  a.queries = static_cast<int>(queries);
  a.group = static_cast<int>(heads / kv_heads);
  a.table_pages = static_cast<int>(table_pages);
  a.splits = static_cast<int>(splits);
  a.window = static_cast<int>(window);
  a.causal = causal;
  a.is_bfloat16 = dtype == TERSOR_BFLOAT16;
  a.scale = scale;
  a.softcap = softcap;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(p.row_tiles * kv_heads),
                  static_cast<unsigned>(batch));
  const int shared = kv_shared_bytes(static_cast<int>(head_dim), p.rows);
  const int error = launch(kernel, grid, dim3(kKvThreads), shared, static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "kv_attention: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}
