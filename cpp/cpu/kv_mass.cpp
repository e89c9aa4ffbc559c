// What the weights of many queries give each token, without their matrix: scores against a page, exponentials with the
// log-sum-exp that attention gave, and the sum over the rows, chunk by chunk. Each token's sum belongs to one item of
// work and is added up in the order of the rows: results do not depend on the threads.
#include "cpu/kv_work.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kItemTokens = 512, kMacsPerThread = 1 << 19;

void add_page(const Item& item, Work& work, const int64_t* row, int64_t first, float* mass) {
  const tersor_kv_query& query = item.query;
  const int64_t slots = item.kv.page_tokens, width = kv_scores(item, work, row);
  float* sums = work.weights;
  std::memset(sums, 0, width * sizeof(float));
  for (int r = 0; r < item.rows; ++r) {
    const float total =
        query.log_sum_exp[(item.sequence * query.heads + item.query_head(r)) * query.queries + item.query_index(r)];
    float* scores = work.scores + r * slots;
    if (total == -INFINITY || !kv_restrict(item, r, first, row[0], width, scores)) continue;
    for (int64_t t = 0; t < width; t += kLanes) lanes(sums + t) += exp_approximate(lanes(scores + t) - total);
  }
  for (int64_t t = 0; t < row[0]; ++t) mass[t] += sums[t];
}

}  // namespace

int kv_mass(const KvMassArgs& args) {
  const tersor_kv& kv = *args.kv;
  const tersor_kv_query& query = *args.query;
  const int64_t rows = Item::group_rows(kv, query), chunks = (rows + kRows - 1) / kRows;
  int64_t tokens = 0;
  for (int64_t p = 0; p < kv.pages; ++p) tokens += kv_page(kv, p)[0];
  const int64_t item_pages = kItemTokens / kv.page_tokens, parts = (kv.pages + item_pages - 1) / item_pages;
  const int64_t heads = kv.batch * kv.kv_heads;
  const int64_t useful = 1 + heads * rows * tokens * kv.key_dim / kMacsPerThread;
  std::memset(args.mass, 0, heads * tokens * sizeof(float));
  const Span span(query);
  return kv_for_each(kv, kv_workers(useful, args.threads), heads * parts, [&](Work& work, int64_t i) {
    const int64_t begin = i % parts * item_pages, end = begin + item_pages < kv.pages ? begin + item_pages : kv.pages;
    int64_t before = 0;
    for (int64_t p = 0; p < begin; ++p) before += kv_page(kv, p)[0];
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Item item(kv, query, span, i / parts * chunks + chunk);
      kv_load_queries(item, work);
      int64_t at = before;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t* row = kv_page(kv, p);
        if (item.reaches(query.first + at, row[0])) {
          add_page(item, work, row, query.first + at, args.mass + i / parts * tokens + at);
        }
        at += row[0];
      }
    }
  });
}

}  // namespace tersor::TERSOR_ISA
