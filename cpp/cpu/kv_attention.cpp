// Attention of a few queries over a cache as it is stored (flash decoding).
//
// One item of work is a sequence, a key head, up to kRows of the queries that read that head, and a range of pages. It
// goes page by page: scores of all its rows against the page, their exponentials, and the weighted values into sums,
// rescaled when the maximum grows. A page is read once for all rows and nothing of it is written back unpacked: what a
// thread holds is its rows times one page of scores. Scales of packed keys are folded into the query, page by page;
// scales of packed values into the weights, group by group; the minima add a product that does not involve codes.
//
// Ranges of pages are cut by length, never by threads, and merged in order: results do not depend on the threads.
#include <cmath>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/isa.h"
#include "cpu/kv_dot.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int kRows = 16;                           // queries of one item
constexpr int kBlock = kPanelRows >= 12 ? 8 : 4;    // rows whose sums fit the registers
constexpr int64_t kRangeTokens = 512, kEnoughItems = 32, kMacsPerThread = 1 << 19;

// One register of floats with operators, for what simd.h has no words for.
typedef float Lanes __attribute__((vector_size(sizeof(Native)), aligned(4)));
typedef int32_t LaneBits __attribute__((vector_size(sizeof(Native)), aligned(4)));
constexpr int kLanes = sizeof(Native) / 4;
TERSOR_INLINE Lanes& lanes(float* p) { return *reinterpret_cast<Lanes*>(p); }

// Relative error 2e-7. Below -87: 0. A NaN stays one.
TERSOR_INLINE Lanes exp_approximate(Lanes x) {
  const Lanes all = {};
  Lanes clamped = x < -87.0f ? all - 87.0f : x;
  clamped = clamped > 88.0f ? all + 88.0f : clamped;
  const Lanes shifted = clamped * 1.44269504f + 12582912.0f;  // the integer part lands in the lowest bits
  const Lanes whole = shifted - 12582912.0f;
  const Lanes f = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Lanes p = all + 1.0f / 5040;
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  LaneBits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  Lanes power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? all : p * power;
}

// How 16 numbers are stored: dtypes of raw pages, then bits.
enum Kind { kFloat32, kBfloat16, kFloat16, kCodes8, kCodes4, kCodes3, kCodes2 };
Kind kind_of(const tersor_kv& kv, bool packed, int64_t bits) {
  if (!packed || bits == 16) return static_cast<Kind>(kv.dtype);
  return bits == 8 ? kCodes8 : bits == 4 ? kCodes4 : bits == 3 ? kCodes3 : kCodes2;
}

template <int kind, int rows>
TERSOR_INLINE void dot(const char* x, int64_t stride, int64_t depth, const float* coefficients, int64_t ld, f32* out) {
  if constexpr (kind <= kFloat16) {
    kv_dot_raw<kind, rows>(x, stride, depth, coefficients, ld, out);
  } else {
    constexpr int bits = kind == kCodes8 ? 8 : kind == kCodes4 ? 4 : kind == kCodes3 ? 3 : 2;
    kv_dot_codes<bits, rows>(reinterpret_cast<const uint32_t*>(x), depth, coefficients, ld, out);
  }
}

// Calls take(row, 16 sums) for each row.
template <int kind, int block, class Take>
TERSOR_INLINE void dot_rows(const char* x, int64_t stride, int64_t depth, const float* coefficients, int64_t ld,
                            int rows, const Take& take) {
  int r = 0;
  f32 out[block];
  for (; r + block <= rows; r += block) {
    dot<kind, block>(x, stride, depth, coefficients + r * ld, ld, out);
    for (int i = 0; i < block; ++i) take(r + i, out[i]);
  }
  if constexpr (block > 1) {
    if (r < rows) {
      dot_rows<kind, block / 2>(x, stride, depth, coefficients + r * ld, ld, rows - r,
                                [&](int i, f32 sum) TERSOR_LAMBDA { take(r + i, sum); });
    }
  }
}

// scores[row][16 * tile ...] = q . key + constant[row]
template <int kind>
void score_tiles(const char* keys, int64_t tile_bytes, int64_t tiles, int64_t dim, int64_t stride, const float* q,
                 int rows, const float* constants, float* scores, int64_t ld) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    dot_rows<kind, kBlock>(keys + tile * tile_bytes, stride, dim, q, dim, rows, [&](int r, f32 sum) TERSOR_LAMBDA {
      store(scores + r * ld + tile * 16, add(sum, splat(constants[r])));
    });
  }
}

// sums[row][16 * block ...] = sums * keep[row] + p . value + constant[row]
template <int kind>
void add_values(const char* values, int64_t block_bytes, int64_t blocks, int64_t depth, int64_t stride, const float* p,
                int64_t ld, int rows, const float* keep, const float* constants, float* sums, int64_t dim) {
  for (int64_t block = 0; block < blocks; ++block) {
    dot_rows<kind, kBlock>(values + block * block_bytes, stride, depth, p, ld, rows, [&](int r, f32 sum) TERSOR_LAMBDA {
      float* to = sums + r * dim + block * 16;
      store(to, fma(load(to), splat(keep[r]), add(sum, splat(constants[r]))));
    });
  }
}

#define TERSOR_KINDS(function) \
  {function<kFloat32>, function<kBfloat16>, function<kFloat16>, function<kCodes8>, function<kCodes4>, \
   function<kCodes3>, function<kCodes2>}
constexpr decltype(&score_tiles<kFloat32>) kScoreTiles[] = TERSOR_KINDS(score_tiles);
constexpr decltype(&add_values<kFloat32>) kAddValues[] = TERSOR_KINDS(add_values);
#undef TERSOR_KINDS

// What one thread works with.
struct Work {
  Scratch memory;
  float *q, *folded, *scores, *weights, *sums;
  bool allocate(const tersor_kv& kv) {
    const size_t keys = kRows * kv.key_dim, page = kRows * kv.page_tokens, values = kRows * kv.value_dim;
    for (size_t count : {keys, keys, page, page, values}) memory.reserve<float>(count);
    if (!memory.allocate()) return false;
    q = memory.take<float>(keys);
    folded = memory.take<float>(keys);
    scores = memory.take<float>(page);
    weights = memory.take<float>(page);
    sums = memory.take<float>(values);
    return true;
  }
};

struct Item {
  const tersor_kv& kv;
  const tersor_kv_query& query;
  int64_t sequence, head, first_row;  // rows: query heads of the head, then queries
  int rows;
  float maximum[kRows], denominator[kRows];

  int64_t query_head(int r) const {
    return head * (query.heads / kv.kv_heads) + (first_row + r) / query.queries;
  }
  int64_t query_index(int r) const { return (first_row + r) % query.queries; }
};

void load_queries(const Item& item, Work& work) {
  const tersor_kv_query& query = item.query;
  const int dtype = static_cast<int>(item.kv.dtype), size = dtype_size(dtype);
  const int64_t dim = item.kv.key_dim;
  const f32 scale = splat(query.scale);
  for (int r = 0; r < item.rows; ++r) {
    const char* from = static_cast<const char*>(query.q) +
                       (item.sequence * query.strides[0] + item.query_head(r) * query.strides[1] +
                        item.query_index(r) * query.strides[2]) * size;
    for (int64_t d = 0; d < dim; d += 16) store(work.q + r * dim + d, mul(load_as(from + d * size, dtype), scale));
  }
}

// Scores outside what a query sees become -infinity; false when it sees nothing of the page.
bool restrict_scores(const Item& item, int r, int64_t first, int64_t tokens, int64_t width, float* scores) {
  const tersor_kv_query& query = item.query;
  const int64_t own = query.position + item.query_index(r);
  int64_t begin = query.window ? own - query.window + 1 - first : 0, end = tokens;
  if (query.causal && own - first + 1 < end) end = own - first + 1;
  if (query.mask) {
    if (query.mask_first - first > begin) begin = query.mask_first - first;
    if (query.mask_first + query.mask_tokens - first < end) end = query.mask_first + query.mask_tokens - first;
  }
  if (begin < 0) begin = 0;
  if (begin >= end) return false;
  for (int64_t t = 0; t < begin; ++t) scores[t] = -INFINITY;
  for (int64_t t = end; t < width; ++t) scores[t] = -INFINITY;
  if (!query.mask) return true;
  const int64_t* strides = query.mask_strides;
  const uint8_t* mask = query.mask + item.sequence * strides[0] + item.query_head(r) * strides[1] +
                        item.query_index(r) * strides[2] + (first - query.mask_first) * strides[3];
  bool any = false;
  for (int64_t t = begin; t < end; ++t) {
    const bool seen = mask[t * strides[3]];
    scores[t] = seen ? scores[t] : -INFINITY;
    any = any || seen;
  }
  return any;
}

// Scores to weights in place; the factor by which earlier sums shrink.
float soften(Item& item, int r, int64_t width, float* scores) {
  Lanes top = lanes(scores);
  for (int64_t t = kLanes; t < width; t += kLanes) {
    const Lanes x = lanes(scores + t);
    top = x > top ? x : top;
  }
  float maximum = item.maximum[r];
  for (int l = 0; l < kLanes; ++l) maximum = top[l] > maximum ? top[l] : maximum;
  Lanes sum = {};
  for (int64_t t = 0; t < width; t += kLanes) {
    const Lanes weight = exp_approximate(lanes(scores + t) - maximum);
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

void attend_page(Item& item, Work& work, const int64_t* row, int64_t first) {
  const tersor_kv& kv = item.kv;
  const tersor_kv_query& query = item.query;
  const bool packed = row[1];
  const KvOffsets at = kv_offsets(kv, packed);
  const char* page = kv_address(row, item.sequence) + item.head * at.bytes;
  const int64_t tokens = row[0], dim = kv.key_dim, slots = kv.page_tokens;
  const int64_t size = dtype_size(static_cast<int>(kv.dtype));
  const int rows = item.rows;
  float constants[kRows] = {}, keep[kRows];

  const Kind key_kind = kind_of(kv, packed, kv.key_bits);
  const float* q = work.q;
  int64_t tile_bytes = dim * 16 * size;
  if (key_kind > kFloat16) {
    tile_bytes = kv_words(dim, kv.key_bits) * 64;
    for (int r = 0; r < rows; ++r) {
      f32 constant = zero();
      for (int64_t d = 0; d < dim; d += 16) {
        const f32 x = load(work.q + r * dim + d);
        store(work.folded + r * dim + d, mul(x, load_as(page + at.key_scales + d * 2, TERSOR_FLOAT16)));
        constant = fma(x, load_as(page + at.key_minima + d * 2, TERSOR_FLOAT16), constant);
      }
      constants[r] = reduce_add(constant);
    }
    q = work.folded;
  }
  const int64_t tiles = (tokens + 15) / 16, width = tiles * 16;
  kScoreTiles[key_kind](page, tile_bytes, tiles, dim, 16 * size, q, rows, constants, work.scores, slots);

  bool any = false;
  for (int r = 0; r < rows; ++r) {
    float* scores = work.scores + r * slots;
    if (query.softcap > 0) {
      const float inverse = 2.0f / query.softcap;
      for (int64_t t = 0; t < width; t += kLanes) {  // cap * tanh(x / cap)
        Lanes& x = lanes(scores + t);
        x = query.softcap - 2 * query.softcap / (exp_approximate(x * inverse) + 1.0f);
      }
    }
    if (restrict_scores(item, r, first, tokens, width, scores)) {
      keep[r] = soften(item, r, width, scores);
      any = true;
    } else {
      std::memset(scores, 0, width * sizeof(float));
      keep[r] = 1;
    }
  }
  if (!any) return;

  const Kind value_kind = kind_of(kv, packed, kv.value_bits);
  if (value_kind <= kFloat16) {
    const float none[kRows] = {};
    kAddValues[value_kind](page + at.values, 16 * size, kv.value_dim / 16, tokens, kv.value_dim * size, work.scores,
                           slots, rows, keep, none, work.sums, kv.value_dim);
    return;
  }
  const int64_t block_bytes = kv_words(slots, kv.value_bits) * 64, blocks = kv.value_group / 16;
  for (int r = 0; r < rows; ++r) {  // words of a page that was cropped hold codes past its end
    for (int64_t t = width; t < slots; ++t) work.scores[r * slots + t] = 0;
  }
  for (int64_t group = 0; group < kv.value_dim / kv.value_group; ++group) {
    const char* scales = page + at.value_scales + group * slots * 2;
    const char* minima = page + at.value_minima + group * slots * 2;
    for (int r = 0; r < rows; ++r) {
      f32 constant = zero();
      for (int64_t t = 0; t < slots; t += 16) {
        const f32 p = load(work.scores + r * slots + t);
        store(work.weights + r * slots + t, mul(p, load_as(scales + t * 2, TERSOR_FLOAT16)));
        constant = fma(p, load_as(minima + t * 2, TERSOR_FLOAT16), constant);
      }
      constants[r] = reduce_add(constant);
    }
    kAddValues[value_kind](page + at.values + group * blocks * block_bytes, block_bytes, blocks, slots, 0, work.weights,
                           slots, rows, keep, constants, work.sums + group * kv.value_group, kv.value_dim);
  }
}

// Whether any row can see a position of [first, first + tokens).
bool reaches(const Item& item, int64_t first, int64_t tokens) {
  const tersor_kv_query& query = item.query;
  if (!tokens) return false;
  if (query.causal && first > query.position + query.queries - 1) return false;
  return !query.window || first + tokens - 1 > query.position - query.window;
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
  const int64_t group_rows = query.heads / kv.kv_heads * query.queries, chunks = (group_rows + kRows - 1) / kRows;
  const int64_t bundles = kv.batch * kv.kv_heads * chunks, dim = kv.value_dim;
  int64_t tokens = 0;
  for (int64_t p = 0; p < kv.pages; ++p) tokens += kv_page(kv, p)[0];
  const int64_t range_pages = kRangeTokens / kv.page_tokens;
  const int64_t ranges = bundles >= kEnoughItems ? 1 : (kv.pages + range_pages - 1) / range_pages;
  const int64_t parts = ranges > 0 ? ranges : 1;
  const int64_t useful = 1 + kv.batch * kv.kv_heads * group_rows * tokens * (kv.key_dim + dim) / kMacsPerThread;
  int workers = useful < args.threads ? static_cast<int>(useful) : args.threads;
  if (workers > 256) workers = 256;

  Scratch shared;  // of each range: maximum, denominator, sums of its rows
  const size_t row_floats = dim + 16, part_rows = bundles * parts * kRows;
  float* partial = nullptr;
  if (parts > 1) {
    shared.reserve<float>(part_rows * row_floats);
    if (!shared.allocate()) return fail(TERSOR_NO_MEMORY, "no memory for partial sums of attention");
    partial = shared.take<float>(part_rows * row_floats);
  }
  const auto bundle_item = [&](int64_t bundle) {
    Item item{kv, query, bundle / (kv.kv_heads * chunks), bundle / chunks % kv.kv_heads, bundle % chunks * kRows,
              0,  {},    {}};
    const int64_t left = group_rows - item.first_row;
    item.rows = static_cast<int>(left < kRows ? left : kRows);
    return item;
  };

  bool failed[256] = {};
  parallel_for(workers, [&](int index) {
    Work work;
    if (!work.allocate(kv)) {
      failed[index] = true;
      return;
    }
    const Range mine = split(bundles * parts, workers, index);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      Item item = bundle_item(i / parts);
      for (int r = 0; r < item.rows; ++r) {
        item.maximum[r] = -INFINITY;
        item.denominator[r] = 0;
      }
      std::memset(work.sums, 0, item.rows * dim * sizeof(float));
      load_queries(item, work);
      const int64_t part = i % parts, begin = parts > 1 ? part * range_pages : 0;
      int64_t end = parts > 1 ? begin + range_pages : kv.pages, first = query.first;
      if (end > kv.pages) end = kv.pages;
      for (int64_t p = 0; p < begin; ++p) first += kv_page(kv, p)[0];
      for (int64_t p = begin; p < end; ++p) {
        const int64_t* row = kv_page(kv, p);
        if (reaches(item, first, row[0])) attend_page(item, work, row, first);
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
    }
  });
  for (int i = 0; i < workers; ++i) {
    if (failed[i]) return fail(TERSOR_NO_MEMORY, "no memory for a page of scores");
  }
  if (parts == 1) return TERSOR_OK;

  parallel_for(workers, [&](int index) {  // ranges in order, into the first one's place
    const Range mine = split(bundles * kRows, workers, index);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const Item item = bundle_item(i / kRows);
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
