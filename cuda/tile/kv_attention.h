// Attention of a row tile over the pages of a split: what is done with a page's scores and values, the online softmax
// between them, and the four warps' results as one.
#pragma once

#include "tile/kv_results.h"
#include "tile/kv_values.h"

namespace tersor {

template <int kDim, int kRows, bool kFormats>
struct KvAttention : KvValues<kDim, kRows, kFormats> {
  using Values = KvValues<kDim, kRows, kFormats>;
  using Results = KvResults<kDim, kRows>;
  using shared_t = ptx::shared_t;
  using Values::a;
  using Values::g;
  using Values::kGroupRecords;
  using Values::kGroups;
  using Values::kOwn;
  using Values::kPaired;
  using Values::kRecords;
  using Values::minima;
  using Values::out;
  using Values::stream;
  using Values::t;
  using Values::warp;
  static_assert(Results::kBytes <= kKvWarps * Values::kStreamBytes, "what warps merge fits where the units were");

  float peak[kOwn], total[kOwn];

  using Values::Values;

  // Logits to probabilities relative to the row's maximum so far; what was summed before is brought to it.
  TERSOR_DEVICE void soften(float (&score)[8][2 * kOwn]) {
    float factor[kOwn];
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      float most = peak[row];
#pragma unroll
      for (int j = 0; j < 8; ++j) most = larger(larger(score[j][2 * row], score[j][2 * row + 1]), most);
      most = larger(ptx::shuffle_xor(most, 1), most);
      most = larger(ptx::shuffle_xor(most, 2), most);
      const float reference = reference_of(most);
      factor[row] = ptx::exp2_approx(peak[row] - reference);
      peak[row] = most;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) sum += score[j][i] = ptx::exp2_approx(score[j][i] - reference);
      total[row] = total[row] * factor[row] + sum;
    }
    // Maxima settle after some pages; then there is nothing to bring anywhere.
    bool moved = false;
    for (int row = 0; row < kOwn; ++row) moved |= factor[row] != 1.0f;
    if (!ptx::any(moved)) return;
#pragma unroll
    for (int n = 0; n < 2 * kRecords; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= factor[kPaired ? 0 : i / 2];
    if (kFormats) return;
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int row = 0; row < kOwn; ++row) minima[group][row] *= factor[row];
  }

  TERSOR_DEVICE void attend(const KvPage& page) {
    float p[8][2 * kOwn];
    const uint32_t valid = this->logits(p, page);
    soften(p);
    this->add_page(p, valid, page);
  }

  TERSOR_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < 2 * kRecords; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      peak[row] = -infinity();
      total[row] = 0;
      for (int group = 0; group < kGroups; ++group) minima[group][row] = 0;
    }
  }

  // The four warps' results as one in shared memory, in the order of the warps.
  TERSOR_DEVICE void merge_warps(const Results& results) {
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      total[row] += ptx::shuffle_xor(total[row], 1);
      total[row] += ptx::shuffle_xor(total[row], 2);
#pragma unroll
      for (int group = 0; group < kGroups && !kFormats; ++group) {
        minima[group][row] += ptx::shuffle_xor(minima[group][row], 1);
        minima[group][row] += ptx::shuffle_xor(minima[group][row], 2);
      }
    }
    ptx::barrier();  // nobody reads units any more
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      const ptx::Vec<float, 2> both = {{peak[row], total[row]}};
      if (t == 0) ptx::store_shared(results.statistics_at(warp, g + 8 * row), both);
    }
    ptx::barrier();
    float factor[kOwn];
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      factor[row] = ptx::exp2_approx(peak[row] - reference_of(results.merged(g + 8 * row)[0]));
    }
#pragma unroll 1
    for (int turn = 0; turn < kKvWarps; ++turn) {
      if (warp == turn) {
#pragma unroll
        for (int n = 0; n < 2 * kRecords; ++n)
#pragma unroll
          for (int row = 0; row < kOwn; ++row) {
            const shared_t at = results.sum_at(g + 8 * row, 8 * n + 2 * t);
            ptx::Vec<float, 2> two = {{0, 0}};
            if (turn > 0) two = ptx::load_shared<ptx::Vec<float, 2>>(at);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float sum = kPaired ? out[n][i] + out[n][i + 2] : out[n][2 * row + i];
              two[i] += (kFormats ? sum : sum + minima[n / 2 / kGroupRecords][row]) * factor[row];
            }
            ptx::store_shared(at, two);
          }
      }
      ptx::barrier();
    }
  }

  TERSOR_DEVICE void run() {
    clear();
    const Limits seen = this->limits();
    stream.start(seen.any_from, seen.any_to);
    ptx::region("pages");
    for (int index = 0; index < stream.listed(); ++index) attend(stream.page(index));
    ptx::region("results");
    ptx::cp_async_wait<0>();
    const Results results(a, this->tile, this->shared);
    merge_warps(results);
    if (a.splits > 1) {
      results.write_with_splits();
    } else {
      results.write();
    }
  }
};

// The whole of a block's work: blockIdx is (split, row tile and head of keys, sequence).
template <int kDim, int kRows, bool kFormats>
TERSOR_DEVICE void kv_attend(const KvAttentionArguments& a) {
  ptx::region("start");
  const int sequence = blockIdx.z, warp = threadIdx.x / 32;
  const KvPage* table = a.table + int64_t(sequence) * a.table_pages;
  const int pages = ptx::load_global_constant(a.pages + sequence);
  const int position = kv_query_position(a, table, pages, sequence);
  const int share = (pages + a.splits - 1) / a.splits, begin = blockIdx.x * share;
  KvAttention<kDim, kRows, kFormats> attention(a, blockIdx.y / a.kv_heads, table, begin + warp,
                                               begin + share < pages ? begin + share : pages);
  attention.store_limits(attention.limits_at, position);
  attention.template load_queries<kFormats>(attention.query);
  ptx::barrier();
  attention.run();
}

}  // namespace tersor
