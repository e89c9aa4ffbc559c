// Scores of some queries against a page of the cache as it is stored.
//
// Scales of channels are folded into the query, page by page; scales of tokens are applied to the sums; the minima add
// a product that does not involve codes. Where keys have to be turned, or a token has several scales, a tile of 16
// tokens is unpacked for all rows: 16 * key_dim floats of a thread's own, which the next tile overwrites.
#include "cpu/kv_work.h"

namespace tersor::TERSOR_ISA {
namespace {

// scores[row][16 * tile ...] = scale * (q . key) + minimum * constant[row]; scales and minima of tokens, or null for 1.
template <int kind>
void score_tiles(const char* keys, int64_t tile_bytes, int64_t tiles, int64_t dim, int64_t stride, const float* q,
                 int rows, const float* levels, const float* constants, const char* scales, const char* minima,
                 float* scores, int64_t ld) {
  const f32 table = load(levels);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const char* x = keys + tile * tile_bytes;
    const f32 scale = scales ? load_as(scales + tile * 32, TERSOR_FLOAT16) : splat(1.0f);
    const f32 minimum = !scales ? splat(1.0f) : minima ? load_as(minima + tile * 32, TERSOR_FLOAT16) : zero();
    dot_rows<kind, kBlock>(x, stride, dim, q, dim, rows, table, [&](int r, f32 sum) TERSOR_LAMBDA {
      store(scores + r * ld + tile * 16, fma(sum, scale, mul(minimum, splat(constants[r]))));
    });
  }
}

// Codes of a tile to floats [dim][16].
template <int kind>
void unpack_tile(const char* words, int64_t dim, const float* levels, float* tile) {
  if constexpr (!is_raw(kind)) {
    kv_each_code<kind>(reinterpret_cast<const uint32_t*>(words), dim, load(levels), [&](auto, int64_t i, f32 code)
                       TERSOR_LAMBDA { store(tile + i * 16, code); });
  }
}

constexpr decltype(&score_tiles<kFloat32>) kScoreTiles[] = TERSOR_KINDS(score_tiles);
constexpr decltype(&unpack_tile<kCodes8>) kUnpackTile[] = TERSOR_KINDS(unpack_tile);

// Of a tile's 16 tokens: cosines and sines [pairs][2][16].
void turn_tile(const tersor_kv& kv, const float* table, float* tile) {
  const int64_t half = kv.rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    float* first = tile + (kv.rotary_interleaved ? 2 * i : i) * 16;
    float* second = kv.rotary_interleaved ? first + 16 : first + half * 16;
    const f32 cos = load(table + i * 32), sin = load(table + i * 32 + 16), x = load(first), y = load(second);
    store(first, sub(mul(x, cos), mul(y, sin)));
    store(second, fma(x, sin, mul(y, cos)));
  }
}

// Through unpacked tiles.
void score_unpacked(const Item& item, Work& work, const tersor_kv_format& f, const KvOffsets& at, const char* page,
                    Kind kind, const float* levels, int64_t tiles) {
  const tersor_kv& kv = item.kv;
  const int64_t dim = kv.key_dim, tile_bytes = kv_words(dim, f.key_bits) * 64;
  const bool has_minima = f.key_coding != TERSOR_KV_E4M3;
  const float none[kRows] = {};
  if (!f.key_group) {
    for (int64_t d = 0; d < dim; d += 16) {
      store(work.parameters + d, load_as(page + at.key_scales + d * 2, TERSOR_FLOAT16));
      store(work.parameters + dim + d, has_minima ? load_as(page + at.key_minima + d * 2, TERSOR_FLOAT16) : zero());
    }
  }
  Entries entries(page + at.key_index, page + at.key_delta, f.key_outliers, dim);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    float* x = work.tile;
    kUnpackTile[kind](page + tile * tile_bytes, dim, levels, x);
    if (f.key_group) {
      for (int64_t g = 0; g < dim / f.key_group; ++g) {
        const int64_t from = (g * kv.page_tokens + tile * 16) * 2;
        const f32 scale = load_as(page + at.key_scales + from, TERSOR_FLOAT16);
        const f32 minimum = has_minima ? load_as(page + at.key_minima + from, TERSOR_FLOAT16) : zero();
        for (int64_t d = g * f.key_group; d < (g + 1) * f.key_group; ++d) {
          store(x + d * 16, fma(load(x + d * 16), scale, minimum));
        }
      }
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        store(x + d * 16, fma(load(x + d * 16), splat(work.parameters[d]), splat(work.parameters[dim + d])));
      }
    }
    while (Entries::next(entries, (tile + 1) * 16)) {
      x[entries.channel * 16 + entries.token % 16] += entries.difference;
    }
    if (kv.rotary_dim) turn_tile(kv, kv.rotary + tile * kv.rotary_dim * 16, x);
    kScoreTiles[kFloat32](reinterpret_cast<const char*>(x), 0, 1, dim, 64, work.q, item.rows, levels, none, nullptr,
                          nullptr, work.scores + tile * 16, kv.page_tokens);
  }
}

// scores += (q . right factors of the residual) . left factors
void add_rank(const Item& item, Work& work, int64_t rank, int64_t segment, const char* left, int64_t width) {
  const tersor_kv& kv = item.kv;
  const int64_t dim = kv.key_dim, row = dim + kv.value_dim;
  if (work.segment != segment) {
    const char* right = reinterpret_cast<const char*>(segment) + item.head * rank * row * 2;
    for (int r = 0; r < item.rows; ++r) {
      for (int64_t j = 0; j < rank; ++j) {
        f32 sum = zero();
        for (int64_t d = 0; d < dim; d += 16) {
          sum = fma(load(work.q + r * dim + d), load_as(right + (j * row + d) * 2, TERSOR_FLOAT16), sum);
        }
        work.segment_q[r * 16 + j] = reduce_add(sum);
      }
    }
    work.segment = segment;
  }
  for (int r = 0; r < item.rows; ++r) {
    for (int64_t t = 0; t < width; t += 16) {
      float* to = work.scores + r * kv.page_tokens + t;
      f32 sum = load(to);
      for (int64_t j = 0; j < rank; ++j) {
        sum = fma(splat(work.segment_q[r * 16 + j]), load_as(left + (j * kv.page_tokens + t) * 2, TERSOR_FLOAT16), sum);
      }
      store(to, sum);
    }
  }
}

void score_packed(const Item& item, Work& work, const tersor_kv_format& f, const KvOffsets& at, const char* page,
                  int64_t tiles) {
  const tersor_kv& kv = item.kv;
  const int64_t dim = kv.key_dim, slots = kv.page_tokens;
  const Kind kind = kind_of(kv, f.key_bits, f.key_coding);
  float levels[16] = {}, constants[kRows];
  if (f.key_coding == TERSOR_KV_LEVELS) level_positions(f.key_levels, f.key_bits, levels);
  if (kv.rotary_dim || (f.key_group && f.key_group < dim)) {
    score_unpacked(item, work, f, at, page, kind, levels, tiles);
    return;
  }
  const bool has_minima = f.key_coding != TERSOR_KV_E4M3;
  const float* q = f.key_group ? work.q : work.folded;
  for (int r = 0; r < item.rows; ++r) {
    f32 constant = zero();
    for (int64_t d = 0; d < dim; d += 16) {
      const f32 x = load(work.q + r * dim + d);
      if (f.key_group) {
        constant = add(constant, x);
        continue;
      }
      store(work.folded + r * dim + d, mul(x, load_as(page + at.key_scales + d * 2, TERSOR_FLOAT16)));
      if (has_minima) constant = fma(x, load_as(page + at.key_minima + d * 2, TERSOR_FLOAT16), constant);
    }
    constants[r] = reduce_add(constant);
  }
  kScoreTiles[kind](page, kv_words(dim, f.key_bits) * 64, tiles, dim, 0, q, item.rows, levels, constants,
                    f.key_group ? page + at.key_scales : nullptr, has_minima ? page + at.key_minima : nullptr,
                    work.scores, slots);
  Entries entries(page + at.key_index, page + at.key_delta, f.key_outliers, dim);
  while (Entries::next(entries, slots)) {
    for (int r = 0; r < item.rows; ++r) {
      work.scores[r * slots + entries.token] += entries.difference * work.q[r * dim + entries.channel];
    }
  }
}

}  // namespace

void kv_load_queries(const Item& item, Work& work) {
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
  work.segment = 0;
}

int64_t kv_scores(const Item& item, Work& work, const int64_t* row) {
  const tersor_kv& kv = item.kv;
  const tersor_kv_query& query = item.query;
  const KvOffsets at = kv_offsets(kv, row[1]);
  const tersor_kv_format* f = kv_format(kv, row[1]);
  const char* page = kv_address(row, item.sequence) + item.head * at.bytes;
  const int64_t dim = kv.key_dim, slots = kv.page_tokens, tiles = (row[0] + 15) / 16, width = tiles * 16;
  if (f && f->key_bits < 16) {
    score_packed(item, work, *f, at, page, tiles);
  } else {
    const int64_t size = dtype_size(static_cast<int>(kv.dtype));
    const float none[kRows] = {};
    kScoreTiles[kv.dtype](page, dim * 16 * size, tiles, dim, 16 * size, work.q, item.rows, none, none, nullptr, nullptr,
                          work.scores, slots);
  }
  if (f && f->rank) {
    const int64_t segment = row[2 + kv.batch + item.sequence];
    if (segment) add_rank(item, work, f->rank, segment, page + at.key_rank, width);
  }
  if (query.softcap > 0 || kv.biased) {
    const float inverse = 2.0f / query.softcap;
    float* bias = reinterpret_cast<float*>(const_cast<char*>(page) + at.bias);
    for (int r = 0; r < item.rows; ++r) {
      for (int64_t t = 0; t < width; t += kLanes) {
        Lanes& x = lanes(work.scores + r * slots + t);
        if (query.softcap > 0) {  // cap * tanh(x / cap)
          x = query.softcap - 2 * query.softcap / (exp_approximate(x * inverse) + 1.0f);
        }
        if (kv.biased) x += lanes(bias + t);
      }
    }
  }
  return width;
}

bool kv_restrict(const Item& item, int r, int64_t first, int64_t tokens, int64_t width, float* scores) {
  const tersor_kv_query& query = item.query;
  const int64_t own = item.position(r);
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

}  // namespace tersor::TERSOR_ISA
