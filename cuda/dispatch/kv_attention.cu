// Launchers of kernels/sm80_kv_attention.cu, its formats and kernels/kv_mass.cu: check what can be checked from sizes
// and addresses, choose the instance and cut the sequences into splits.
#include <cstdint>

#include "common/status.h"
#include "dispatch/kv_checks.h"
#include "dispatch/launch.h"
#include "kernels/kv_mass.h"
#include "kernels/sm80_kv_attention.h"
#include "tersor_kv.h"

namespace tersor {

KvAttentionChooser* kv_attention_choosers[257] = {};
KvAttentionChooser* kv_format_choosers[257] = {};
KvMassKernel* kv_mass_kernels[257] = {};

namespace {

// Pages that a split has at least: two for each of its four warps. Fewer cost more in their sums than they gain.
constexpr int64_t kKvMinPages = 2 * kKvWarps;

struct Problem {
  int rows, row_tiles;
  int64_t places;  // (sequence, head of keys, row tile)
};

// Tiles of 8 rows where the kernel has no others (`eight`: that of formats).
int describe(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t queries, bool eight,
             Problem* p) {
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
  p->rows = rows <= 8 || eight ? 8 : kv_most_rows(static_cast<int>(head_dim));
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

extern "C" int64_t tersor_cuda_kv_format_bytes(const tersor_cuda_kv_cache* cache, int64_t format, int64_t key_bits,
                                               int64_t value_bits) {
  KvFormat formats[kKvFormats];
  if (check_kv_shape(1, 1, cache->head_dim) || check_kv_bits(key_bits, value_bits)) return -1;
  if (read_kv_formats(*cache, formats) || format < 0 || format > cache->formats) return -1;
  return kv_page_bytes(static_cast<int>(cache->head_dim), static_cast<int>(key_bits), static_cast<int>(value_bits),
                       formats[format], cache->biased != 0);
}

extern "C" int tersor_cuda_kv_attention_plan(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                             int64_t queries, int64_t pages, int multiprocessors,
                                             int64_t shared_memory_per_multiprocessor, int64_t* splits) {
  Problem p;
  if (int status = describe(batch, heads, kv_heads, head_dim, queries, false, &p)) return status;
  if (multiprocessors < 1 || pages < 0) {
    return fail(TERSOR_INVALID, "multiprocessors, pages are %d, %lld; accepted: from 1 and from 0", multiprocessors,
                (long long)pages);
  }
  const int dim = static_cast<int>(head_dim);
  // The driver keeps 1 KB of each block's shared memory for itself.
  int64_t resident = shared_memory_per_multiprocessor / (kv_shared_bytes(dim, p.rows, false) + 1024);
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
  if (int status = describe(batch, heads, kv_heads, head_dim, queries, false, &p)) return status;
  if (splits < 1 || splits > 65535) {
    return fail(TERSOR_INVALID, "splits is %lld; accepted: 1 to 65535", (long long)splits);
  }
  *partial_bytes = *counter_bytes = 0;  // one split writes its results itself
  if (splits == 1) return TERSOR_OK;
  *partial_bytes = p.places * splits * kv_partial_floats(static_cast<int>(head_dim), p.rows) * 4;
  // For tiles of 8 rows, whichever the launch takes: with those its partial sums are no more.
  if (int status = describe(batch, heads, kv_heads, head_dim, queries, true, &p)) return status;
  *counter_bytes = p.places * 4;
  return TERSOR_OK;
}

namespace {

// What attention and mass ask of a query alike, and their arguments.
int read_query(const tersor_cuda_kv_cache& c, const tersor_cuda_kv_query& q, float scale, float softcap,
               KvAttentionArguments* arguments) {
  if (int status = check_kv_table(c.table, c.pages, c.table_pages)) return status;
  if (int status = check_kv_dtype(c.dtype)) return status;
  if (!q.q) return fail(TERSOR_INVALID, "q is absent");
  if (!kv_aligned(q.q, 8) || q.strides[0] % 4 || q.strides[1] % 4 || q.strides[2] % 4) {
    return fail(TERSOR_INVALID, "q starts at %p with strides %lld, %lld, %lld; accepted: 8-byte aligned rows", q.q,
                (long long)q.strides[0], (long long)q.strides[1], (long long)q.strides[2]);
  }
  if (q.window < 0 || q.window > INT32_MAX) {
    return fail(TERSOR_INVALID, "window is %lld; accepted: 0 to 2^31 - 1", (long long)q.window);
  }
  if (q.mask_first < 0 || q.mask_tokens < 0 || q.mask_tokens > INT32_MAX - q.mask_first) {
    return fail(TERSOR_INVALID, "mask_first, mask_tokens are %lld, %lld; accepted: 0 to 2^31 - 1, together too",
                (long long)q.mask_first, (long long)q.mask_tokens);
  }
  if (!(softcap >= 0)) return fail(TERSOR_INVALID, "softcap is %g; accepted: 0 or more", softcap);
  if (q.splits < 1 || q.splits > 65535) {
    return fail(TERSOR_INVALID, "splits is %lld; accepted: 1 to 65535", (long long)q.splits);
  }
  if (q.residuals && (!kv_aligned(q.residuals, 16) || !q.residual_query || !kv_aligned(q.residual_query, 4))) {
    return fail(TERSOR_INVALID, "residuals and residual_query: accepted are addresses, 16- and 4-byte aligned, or none");
  }
  if (q.residuals && !kv_adds_residuals(static_cast<int>(c.head_dim))) {
    return fail(TERSOR_INVALID, "residuals: accepted on CUDA is none where head_dim is %lld", (long long)c.head_dim);
  }
  if (q.residual_width < 0 || q.residual_width > INT32_MAX) {
    return fail(TERSOR_INVALID, "residual_width is %lld; accepted: 0 to 2^31 - 1", (long long)q.residual_width);
  }
  KvAttentionArguments& a = *arguments;
  a.residuals = static_cast<const KvResidual*>(q.residuals);
  a.residual_query = q.residual_query;
  a.residual_width = static_cast<int>(q.residual_width);
  if (int status = read_kv_formats(c, a.formats)) return status;
  if (int status = read_kv_rotary(c, &a.rotary)) return status;
  a.biased = c.biased != 0;
  a.q = q.q;
  a.out = q.out;
  a.log_sum_exp = q.log_sum_exp;
  a.table = static_cast<const KvPage*>(c.table);
  a.pages = c.pages;
  a.positions = q.positions;
  a.first = q.first;
  a.mask = q.mask;
  a.sinks = q.sinks;
  a.partials = q.partials;
  a.counters = q.counters;
  for (int i = 0; i < 3; ++i) a.q_strides[i] = q.strides[i];
  for (int i = 0; i < 4; ++i) a.mask_strides[i] = q.mask_strides[i];
  a.heads = static_cast<int>(q.heads);
  a.kv_heads = static_cast<int>(c.kv_heads);
  a.queries = static_cast<int>(q.queries);
  a.group = static_cast<int>(q.heads / c.kv_heads);
  a.table_pages = static_cast<int>(c.table_pages);
  a.splits = static_cast<int>(q.splits);
  a.window = static_cast<int>(q.window);
  a.causal = q.causal != 0;
  a.is_bfloat16 = c.dtype == TERSOR_BFLOAT16;
  a.mask_first = static_cast<int>(q.mask_first);
  a.mask_end = static_cast<int>(q.mask_first + q.mask_tokens);
  a.scale = scale;
  a.softcap = softcap;
  return TERSOR_OK;
}

}  // namespace

extern "C" int tersor_cuda_kv_attention(const tersor_cuda_kv_cache* cache, const tersor_cuda_kv_query* query,
                                        float scale, float softcap, void* stream) {
  const tersor_cuda_kv_cache& c = *cache;
  const tersor_cuda_kv_query& q = *query;
  Problem p;
  const bool formats = c.formats > 0 || c.biased || c.rotary_dim > 0 || q.residuals;
  if (int status = describe(c.batch, q.heads, c.kv_heads, c.head_dim, q.queries, formats, &p)) return status;
  if (c.batch == 0 || q.queries == 0) return TERSOR_OK;
  KvAttentionArguments a{};
  if (int status = read_query(c, q, scale, softcap, &a)) return status;
  if (!q.out || !kv_aligned(q.out, 8)) return fail(TERSOR_INVALID, "out: accepted is an 8-byte aligned address");
  if (q.splits > 1 && (!q.partials || !q.counters || !kv_aligned(q.partials, 16))) {
    return fail(TERSOR_INVALID,
                "partials and counters: accepted is the workspace, 16-byte aligned, for splits above 1");
  }
  KvAttentionChooser* chooser = (formats ? kv_format_choosers : kv_attention_choosers)[c.head_dim];
  KvAttentionKernel* kernel = chooser ? chooser(p.rows) : nullptr;
  if (!kernel) return fail(TERSOR_INVALID, "head_dim %lld: not in this build", (long long)c.head_dim);
  const dim3 grid(static_cast<unsigned>(q.splits), static_cast<unsigned>(p.row_tiles * c.kv_heads),
                  static_cast<unsigned>(c.batch));
  const int shared = kv_shared_bytes(static_cast<int>(c.head_dim), p.rows, formats);
  const int error = launch(kernel, grid, dim3(kKvThreads), shared, static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "kv_attention: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}

extern "C" int tersor_cuda_kv_mass(const tersor_cuda_kv_cache* cache, const tersor_cuda_kv_query* query, float scale,
                                   float softcap, float* mass, int64_t tokens, void* stream) {
  const tersor_cuda_kv_cache& c = *cache;
  const tersor_cuda_kv_query& q = *query;
  Problem p;
  if (int status = describe(c.batch, q.heads, c.kv_heads, c.head_dim, q.queries, true, &p)) return status;
  if (c.batch == 0 || q.queries == 0 || tokens == 0) return TERSOR_OK;
  KvMassArguments m{};
  if (int status = read_query(c, q, scale, softcap, &m.query)) return status;
  if (!mass || !q.log_sum_exp) return fail(TERSOR_INVALID, "%s is absent", mass ? "log_sum_exp" : "mass");
  if (tokens < 0 || tokens > INT32_MAX) {
    return fail(TERSOR_INVALID, "tokens is %lld; accepted: 0 to 2^31 - 1", (long long)tokens);
  }
  KvMassKernel* kernel = kv_mass_kernels[c.head_dim];
  if (!kernel) return fail(TERSOR_INVALID, "head_dim %lld: not in this build", (long long)c.head_dim);
  m.mass = mass;
  m.tokens = static_cast<int>(tokens);
  const dim3 grid(static_cast<unsigned>(q.splits), static_cast<unsigned>(c.kv_heads), static_cast<unsigned>(c.batch));
  const int shared = kv_shared_bytes(static_cast<int>(c.head_dim), 8, true);
  const int error = launch(kernel, grid, dim3(kKvThreads), shared, static_cast<cudaStream_t>(stream), m);
  if (error) return fail(TERSOR_CUDA_ERROR, "kv_mass: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}
