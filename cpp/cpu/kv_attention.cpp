// Attention of a few queries over a cache as it is stored (flash decoding).
//
// One item of work is a sequence, a key head, up to kRows of the queries that read that head, and a range of pages. It
// goes page by page: scores of all its rows against the page, their exponentials, and the weighted values into sums,
// rescaled when the maximum grows. A page is read once for all rows and nothing of it is written back unpacked: what a
// thread holds is its rows times one page of scores. Scales of packed values are folded into the weights, group by
// group; the minima add a product that does not involve codes; outliers and the residual are added apart.
//
// Ranges of pages are cut by length, never by threads, and merged in order: results do not depend on the threads.
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/kv_work.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kRangeTokens = 512, kEnoughItems = 32, kMacsPerThread = 1 << 19;

// sums[row][16 * block ...] = sums * keep[row] + factor * (p . value + constant[row]); factors of channels, or null: 1
template <int kind>
void add_values(const char* values, int64_t block_bytes, int64_t blocks, int64_t depth, int64_t stride, const float* p,
                int64_t ld, int rows, const float* levels, const float* keep, const float* constants,
                const char* factors, float* sums, int64_t dim) {
  const f32 table = load(levels);
  for (int64_t block = 0; block < blocks; ++block) {
    const f32 factor = factors ? load_as(factors + block * 32, TERSOR_FLOAT16) : splat(1.0f);
    dot_rows<kind, kBlock>(values + block * block_bytes, stride, depth, p, ld, rows, table, [&](int r, f32 sum)
                           TERSOR_LAMBDA {
      float* to = sums + r * dim + block * 16;
      store(to, fma(load(to), splat(keep[r]), mul(factor, add(sum, splat(constants[r])))));
    });
  }
}
constexpr decltype(&add_values<kFloat32>) kAddValues[] = TERSOR_KINDS(add_values);

// Scores to weights in place; the factor by which earlier sums shrink.
float soften(Item& item, int r, int64_t width, float* scores) {
  Lanes top = lanes(scores);
  for (int64_t t = kLanes; t < width; t += kLanes) {
    const Lanes x = lanes(scores + t);
    top = x > top ? x : top;
  }
  float maximum = item.maximum[r];
  for (int l = 0; l < kLanes; ++l) maximum = top[l] > maximum ? top[l] : maximum;
  const float shift = maximum == -INFINITY ? 0 : maximum;  // biases can hide a whole page
  Lanes sum = {};
  for (int64_t t = 0; t < width; t += kLanes) {
    const Lanes weight = exp_approximate(lanes(scores + t) - shift);
    lanes(scores + t) = weight;
    sum += weight;
  }
  float total = 0;
  for (int l = 0; l < kLanes; ++l) total += sum[l];
  const float keep = item.maximum[r] == maximum ? 1.0f : std::exp(item.maximum[r] - maximum);
  item.maximum[r] = maximum;
  item.denominator[r] = item.denominator[r] * keep + total;
  return keep;
}

void add_packed_values(const Item& item, Work& work, const tersor_kv_format& f, const KvOffsets& at, const char* page,
                       int64_t width, const float* keep) {
  const tersor_kv& kv = item.kv;
  const int64_t slots = kv.page_tokens, dim = kv.value_dim;
  const Kind kind = kind_of(kv, f.value_bits, f.value_coding);
  const bool has_minima = f.value_coding != TERSOR_KV_E4M3;
  float levels[16] = {}, constants[kRows];
  if (f.value_coding == TERSOR_KV_LEVELS) level_positions(f.value_levels, f.value_bits, levels);
  const int64_t block_bytes = kv_words(slots, f.value_bits) * 64, blocks = f.value_group / 16;
  for (int r = 0; r < item.rows; ++r) {  // words of a page that was cropped hold codes past its end
    for (int64_t t = width; t < slots; ++t) work.scores[r * slots + t] = 0;
  }
  for (int64_t group = 0; group < dim / f.value_group; ++group) {
    const char* scales = page + at.value_scales + group * slots * 2;
    const char* minima = page + at.value_minima + group * slots * 2;
    for (int r = 0; r < item.rows; ++r) {
      f32 constant = zero();
      for (int64_t t = 0; t < slots; t += 16) {
        const f32 p = load(work.scores + r * slots + t);
        store(work.weights + r * slots + t, mul(p, load_as(scales + t * 2, TERSOR_FLOAT16)));
        if (has_minima) constant = fma(p, load_as(minima + t * 2, TERSOR_FLOAT16), constant);
      }
      constants[r] = reduce_add(constant);
    }
    kAddValues[kind](page + at.values + group * blocks * block_bytes, block_bytes, blocks, slots, 0, work.weights,
                     slots, item.rows, levels, keep, constants, f.value_separable ? page + at.value_factors : nullptr,
                     work.sums + group * f.value_group, dim);
  }
  Entries entries(page + at.value_index, page + at.value_delta, f.value_outliers, dim);
  while (Entries::next(entries, slots)) {
    for (int r = 0; r < item.rows; ++r) {
      work.sums[r * dim + entries.channel] += entries.difference * work.scores[r * slots + entries.token];
    }
  }
}

// sums += (p . left factors of the residual) . right factors
void add_rank(const Item& item, Work& work, int64_t rank, int64_t segment, const char* left, int64_t width) {
  const tersor_kv& kv = item.kv;
  const int64_t dim = kv.value_dim, row = kv.key_dim + dim;
  const char* right = reinterpret_cast<const char*>(segment) + (item.head * rank * row + kv.key_dim) * 2;
  for (int r = 0; r < item.rows; ++r) {
    for (int64_t j = 0; j < rank; ++j) {
      f32 sum = zero();
      for (int64_t t = 0; t < width; t += 16) {
        sum = fma(load(work.scores + r * kv.page_tokens + t),
                  load_as(left + (j * kv.page_tokens + t) * 2, TERSOR_FLOAT16), sum);
      }
      work.segment_p[r * 16 + j] = reduce_add(sum);
    }
  }
  for (int64_t d = 0; d < dim; d += 16) {
    for (int64_t j = 0; j < rank; ++j) {
      const f32 x = load_as(right + (j * row + d) * 2, TERSOR_FLOAT16);
      for (int r = 0; r < item.rows; ++r) {
        float* to = work.sums + r * dim + d;
        store(to, fma(x, splat(work.segment_p[r * 16 + j]), load(to)));
      }
    }
  }
}

void attend_page(Item& item, Work& work, const int64_t* row, int64_t first) {
  const tersor_kv& kv = item.kv;
  const int64_t tokens = row[0], slots = kv.page_tokens, dim = kv.value_dim;
  const int64_t width = kv_scores(item, work, row);
  float keep[kRows];
  bool any = false;
  for (int r = 0; r < item.rows; ++r) {
    float* scores = work.scores + r * slots;
    if (kv_restrict(item, r, first, tokens, width, scores)) {
      keep[r] = soften(item, r, width, scores);
      any = true;
    } else {
      std::memset(scores, 0, width * sizeof(float));
      keep[r] = 1;
    }
  }
  if (!any) return;

  const KvOffsets at = kv_offsets(kv, row[1]);
  const tersor_kv_format* f = kv_format(kv, row[1]);
  const char* page = kv_address(row, item.sequence) + item.head * at.bytes;
  if (f && f->value_bits < 16) {
    add_packed_values(item, work, *f, at, page, width, keep);
  } else {
    const int64_t size = dtype_size(static_cast<int>(kv.dtype));
    const float none[kRows] = {};
    kAddValues[kv.dtype](page + at.values, 16 * size, dim / 16, tokens, dim * size, work.scores, slots, item.rows, none,
                         keep, none, nullptr, work.sums, dim);
  }
  if (f && f->rank) {
    const int64_t segment = row[2 + kv.batch + item.sequence];
    if (segment) add_rank(item, work, f->rank, segment, page + at.value_rank, width);
  }
}

// Out of sums, and the logit of a sink: its probability goes nowhere.
void finish(const Item& item, int r, float maximum, float denominator, const float* sums, float factor) {
  const tersor_kv& kv = item.kv;
  const tersor_kv_query& query = item.query;
  const int64_t head = item.query_head(r), index = item.query_index(r);
  const int dtype = static_cast<int>(kv.dtype);
  if (query.sinks) {
    const float sink = query.sinks[head], top = sink > maximum ? sink : maximum;
    const float keep = maximum == -INFINITY ? 0 : std::exp(maximum - top);
    denominator = denominator * keep + (sink == -INFINITY ? 0 : std::exp(sink - top));
    factor *= keep;
    maximum = top;
  }
  const f32 scale = splat(denominator == 0 ? 0 : factor / denominator);
  char* out = static_cast<char*>(query.out) +
              ((item.sequence * query.queries + index) * query.heads + head) * kv.value_dim * dtype_size(dtype);
  for (int64_t d = 0; d < kv.value_dim; d += 16) {
    store_as(out + d * dtype_size(dtype), dtype, mul(load(sums + d), scale), 16);
  }
  if (query.log_sum_exp) {
    query.log_sum_exp[(item.sequence * query.heads + head) * query.queries + index] = maximum + std::log(denominator);
  }
}

}  // namespace

int kv_attention(const KvAttentionArgs& args) {
  const tersor_kv& kv = *args.kv;
  const tersor_kv_query& query = *args.query;
  const int64_t group_rows = Item::group_rows(kv, query), chunks = (group_rows + kRows - 1) / kRows;
  const int64_t bundles = kv.batch * kv.kv_heads * chunks, dim = kv.value_dim;
  int64_t tokens = 0;
  for (int64_t p = 0; p < kv.pages; ++p) tokens += kv_page(kv, p)[0];
  const int64_t range_pages = kRangeTokens / kv.page_tokens;
  const int64_t ranges = bundles >= kEnoughItems ? 1 : (kv.pages + range_pages - 1) / range_pages;
  const int64_t parts = ranges > 0 ? ranges : 1;
  const int64_t useful = 1 + kv.batch * kv.kv_heads * group_rows * tokens * (kv.key_dim + dim) / kMacsPerThread;
  const int workers = kv_workers(useful, args.threads);

  Scratch shared;  // of each range: maximum, denominator, sums of its rows
  const size_t row_floats = dim + 16, part_rows = bundles * parts * kRows;
  float* partial = nullptr;
  if (parts > 1) {
    shared.reserve<float>(part_rows * row_floats);
    if (!shared.allocate()) return fail(TERSOR_NO_MEMORY, "no memory for partial sums of attention");
    partial = shared.take<float>(part_rows * row_floats);
  }
  const Span span(query);
  const int status = kv_for_each(kv, workers, bundles * parts, [&](Work& work, int64_t i) {
    Item item(kv, query, span, i / parts);
    for (int r = 0; r < item.rows; ++r) {
      item.maximum[r] = -INFINITY;
      item.denominator[r] = 0;
    }
    std::memset(work.sums, 0, item.rows * dim * sizeof(float));
    kv_load_queries(item, work);
    const int64_t part = i % parts, begin = parts > 1 ? part * range_pages : 0;
    int64_t end = parts > 1 ? begin + range_pages : kv.pages, first = query.first;
    if (end > kv.pages) end = kv.pages;
    for (int64_t p = 0; p < begin; ++p) first += kv_page(kv, p)[0];
    for (int64_t p = begin; p < end; ++p) {
      const int64_t* row = kv_page(kv, p);
      if (item.reaches(first, row[0])) attend_page(item, work, row, first);
      first += row[0];
    }
    for (int r = 0; r < item.rows; ++r) {
      if (parts == 1) {
        finish(item, r, item.maximum[r], item.denominator[r], work.sums + r * dim, 1);
        continue;
      }
      float* to = partial + ((i / parts * parts + part) * kRows + r) * row_floats;
      to[0] = item.maximum[r];
      to[1] = item.denominator[r];
      std::memcpy(to + 16, work.sums + r * dim, dim * sizeof(float));
    }
  });
  if (status || parts == 1) return status;

  parallel_for(workers, [&](int index) {  // ranges in order, into the first one's place
    const Range mine = split(bundles * kRows, workers, index);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const Item item(kv, query, span, i / kRows);
      const int r = static_cast<int>(i % kRows);
      if (r >= item.rows) continue;
      float* to = partial + (i / kRows * parts * kRows + r) * row_floats;
      float maximum = -INFINITY, denominator = 0;
      for (int64_t part = 0; part < parts; ++part) {
        const float m = to[part * kRows * row_floats];
        maximum = m > maximum ? m : maximum;
      }
      for (int64_t part = 0; part < parts; ++part) {
        const float* from = to + part * kRows * row_floats;
        const float keep = from[1] == 0 ? 0 : from[0] == maximum ? 1 : std::exp(from[0] - maximum);
        denominator += from[1] * keep;
        const f32 factor = splat(keep), add_to = splat(part ? 1.0f : 0.0f);
        if (part && from[1] == 0) continue;
        for (int64_t d = 0; d < dim; d += 16) {
          store(to + 16 + d, fma(load(from + 16 + d), factor, mul(load(to + 16 + d), add_to)));
        }
      }
      finish(item, r, maximum, denominator, to + 16, 1);
    }
  });
  return TERSOR_OK;
}

}  // namespace tersor::TERSOR_ISA
