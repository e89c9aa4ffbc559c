// What the weights of queries give each token of a paged cache: the sum over all queries of all query heads that read a
// head of keys of exp(score - log_sum_exp), without their matrix.
//
//   Scores are those of attention (tile/kv_scores.h), of pages of any format; a warp takes every fourth page of its
//   block's range, and the block takes the queries in tiles of 8 rows, one after another, so that a page belongs to one
//   warp and its sums grow in one order: results are the same in every launch, however many blocks there are. A page's
//   64 sums are added over the rows of a tile by shuffles and to memory by the lanes that hold them.
//
//   SHARED MEMORY, bytes: as sm80_kv_attention_formats.cu with 8 rows: the ring of copies has keys and biases alone.
//   Limits: each tile of 8 rows reads the keys again, from L2 while they fit.
//
// gate: defines TERSOR_HEAD_DIM=64,80,96,128,256
// gate: registers 255
// gate: wants HMMA.16816.F32 HMMA.16816.F32.BF16 LDGSTS.E.BYPASS LDS.128 MUFU.EX2 PRMT
#include "kernels/kv_mass.h"

#include "tile/kv_scores.h"

namespace tersor {
namespace {

constexpr int kRows = 8;

template <int kDim>
struct KvMass : KvScores<kDim, kRows, true, false> {
  using Scores = KvScores<kDim, kRows, true, false>;
  using Scores::a;
  using Scores::g;
  using Scores::Scores;
  using Scores::t;

  // In units of log 2, of the lane's row; infinity for one that does not exist or sees nothing.
  TERSOR_DEVICE float row_total() const {
    const int index = this->first_row() + g;
    if (index >= this->row_count()) return infinity();
    const int64_t at = (int64_t(this->sequence()) * a.heads + this->query_head(index)) * a.queries + index / a.group;
    const float total = ptx::load_global_constant(static_cast<const float*>(a.log_sum_exp) + at);
    return total == -infinity() ? infinity() : total * kLog2E;
  }

  // `mass`: of the sequence and head; of its first page's first token.
  TERSOR_DEVICE void add_page(const KvPage& page, float total, float* mass, int before, int tokens) {
    float score[8][2];
    this->logits(score, page);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      ptx::Vec<float, 2> two;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float sum = total == infinity() ? 0.0f : ptx::exp2_approx(score[j][column] - total);
        for (int lanes = 4; lanes <= 16; lanes *= 2) sum += ptx::shuffle_xor(sum, lanes);
        two[column] = sum;
      }
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int slot = 8 * j + 2 * t + column, token = page.position - before + slot;
        if (g != j || slot >= page.tokens || token < 0 || token >= tokens) continue;
        ptx::store_global(mass + token, (this->tile > 0 ? ptx::load_global(mass + token) : 0.0f) + two[column]);
      }
    }
  }

  TERSOR_DEVICE void run(float* mass, int before, int tokens) {
    const Limits seen = this->limits();
    const float total = row_total();
    this->stream.start(seen.any_from, seen.any_to);
    ptx::region("pages");
    for (int index = 0; index < this->stream.listed(); ++index) {
      add_page(this->stream.page(index), total, mass, before, tokens);
    }
    ptx::region("tiles");
    ptx::cp_async_wait<0>();
  }
};

template <int kDim>
__global__ void __launch_bounds__(kKvThreads, 2) kv_mass(const KvMassArguments m) {
  const KvAttentionArguments& a = m.query;
  const int sequence = blockIdx.z, warp = threadIdx.x / 32;
  const KvPage* table = a.table + int64_t(sequence) * a.table_pages;
  const int pages = ptx::load_global_constant(a.pages + sequence);
  if (pages <= 0) return;
  const int position = kv_query_position(a, table, pages, sequence);
  const int before = ptx::load_global_constant(table).position;
  const int share = (pages + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * share;
  const int end = begin + share < pages ? begin + share : pages;
  float* mass = m.mass + (int64_t(sequence) * a.kv_heads + blockIdx.y) * m.tokens;
  const int tiles = (a.queries * a.group + kRows - 1) / kRows;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    KvMass<kDim> rows(a, tile, table, begin + warp, end);
    ptx::barrier();  // nobody reads the queries of the tile before
    rows.store_limits(rows.limits_at, position);
    rows.template load_queries<true>(rows.query);
    ptx::barrier();
    rows.run(mass, before, m.tokens);
  }
}

const bool entered = (kv_mass_kernels[TERSOR_HEAD_DIM] = kv_mass<TERSOR_HEAD_DIM>, true);

}  // namespace
}  // namespace tersor
