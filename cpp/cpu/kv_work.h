// What attention and mass share: one item of work, and the scores of its rows against a page (kv_scores.cpp).
#pragma once

#include <cmath>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/isa.h"
#include "cpu/kv_dot.h"

namespace tersor::TERSOR_ISA {

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

// Outliers of a page, one after another.
struct Entries {
  const char *index, *delta;
  int64_t left, dim, token = 0, base = 0, channel = 0;
  int64_t taken = 0;
  float difference = 0, block[16];
  Entries(const char* at, const char* differences, int64_t count, int64_t channels)
      : index(at), delta(differences), left(count), dim(channels) {}
  // The next one, if it belongs to a token before `end`.
  TERSOR_INLINE bool next(Entries& e, int64_t end) {
    if (!e.left) return false;
    uint16_t at;
    std::memcpy(&at, e.index + e.taken * 2, 2);
    if (at >= end * e.dim) return false;
    if (at < e.base) e.token = e.base = 0;  // they ascend, unless the page is damaged
    for (; at >= e.base + e.dim; e.base += e.dim) ++e.token;
    e.channel = at - e.base;
    if (e.taken % 16 == 0) {
      if (e.left >= 16) {
        store(e.block, load_as(e.delta + e.taken * 2, TERSOR_FLOAT16));
      } else {
        for (int64_t i = 0; i < e.left; ++i) e.block[i] = load_as_float(e.delta, TERSOR_FLOAT16, e.taken + i);
      }
    }
    e.difference = e.block[e.taken++ % 16];
    --e.left;
    return true;
  }
};

// What one thread works with.
struct Work {
  float *q, *folded, *scores, *weights, *sums;
  float *tile, *parameters;      // 16 tokens of keys, scales and minima of its channels; where keys are unpacked first
  float *segment_q, *segment_p;  // [kRows][16]
  int64_t segment;               // of segment_q
  bool allocate(const tersor_kv& kv, Scratch& memory) {
    const size_t keys = kRows * kv.key_dim, page = kRows * kv.page_tokens, values = kRows * kv.value_dim;
    const size_t sizes[] = {keys, keys, page, page, values, size_t(16 * kv.key_dim), size_t(2 * kv.key_dim),
                            kRows * 16, kRows * 16};
    float** const pieces[] = {&q, &folded, &scores, &weights, &sums, &tile, &parameters, &segment_q, &segment_p};
    for (size_t count : sizes) memory.reserve<float>(count);
    if (!memory.allocate()) return false;
    for (int i = 0; i < 9; ++i) *pieces[i] = memory.take<float>(sizes[i]);
    segment = 0;
    return true;
  }
};

// Positions of the queries of a call.
struct Span {
  int64_t lowest, highest;
  explicit Span(const tersor_kv_query& query)
      : lowest(query.position), highest(query.position + query.queries - 1) {
    for (int64_t i = 0; query.positions && i < query.queries; ++i) {
      const int64_t own = query.positions[i];
      lowest = i == 0 || own < lowest ? own : lowest;
      highest = i == 0 || own > highest ? own : highest;
    }
  }
};

struct Item {
  const tersor_kv& kv;
  const tersor_kv_query& query;
  const Span& span;
  int64_t sequence, head, first_row;  // rows: query heads of the head, then queries
  int rows;
  float maximum[kRows], denominator[kRows];

  // Item `bundle` of all sequences, heads and chunks of kRows rows.
  Item(const tersor_kv& cache, const tersor_kv_query& asked, const Span& positions, int64_t bundle)
      : kv(cache), query(asked), span(positions) {
    const int64_t all = group_rows(kv, query), chunks = (all + kRows - 1) / kRows;
    sequence = bundle / (kv.kv_heads * chunks);
    head = bundle / chunks % kv.kv_heads;
    first_row = bundle % chunks * kRows;
    rows = static_cast<int>(all - first_row < kRows ? all - first_row : kRows);
  }
  static int64_t group_rows(const tersor_kv& kv, const tersor_kv_query& query) {
    return query.heads / kv.kv_heads * query.queries;
  }
  int64_t query_head(int r) const {
    return head * (query.heads / kv.kv_heads) + (first_row + r) / query.queries;
  }
  int64_t query_index(int r) const { return (first_row + r) % query.queries; }
  int64_t position(int r) const {
    return query.positions ? query.positions[query_index(r)] : query.position + query_index(r);
  }
  // Whether any row can see a position of [first, first + tokens).
  bool reaches(int64_t first, int64_t tokens) const {
    if (!tokens || (query.causal && first > span.highest)) return false;
    return !query.window || first + tokens - 1 > span.lowest - query.window;
  }
};

constexpr int kMostWorkers = 256;
inline int kv_workers(int64_t useful, int threads) {
  const int wanted = useful < threads ? static_cast<int>(useful) : threads;
  return wanted < kMostWorkers ? wanted : kMostWorkers;
}

// function(work, i) for every i below `items`, by `workers` threads with buffers of their own; a status of the C ABI.
template <class Function>
int kv_for_each(const tersor_kv& kv, int workers, int64_t items, const Function& function) {
  bool failed[kMostWorkers] = {};
  parallel_for(workers, [&](int index) {
    Scratch memory;
    Work work;
    if (!work.allocate(kv, memory)) {
      failed[index] = true;
      return;
    }
    const Range mine = split(items, workers, index);
    for (int64_t i = mine.begin; i < mine.end; ++i) function(work, i);
  });
  for (int i = 0; i < workers; ++i) {
    if (failed[i]) return fail(TERSOR_NO_MEMORY, "no memory for a page of scores");
  }
  return TERSOR_OK;
}

// The rows' queries times the scale, into work.q.
void kv_load_queries(const Item& item, Work& work);
// Scores of all rows against the page in a row of the table, in work.scores [kRows][page_tokens]: up to a whole number
// of tiles, which is returned. Soft cap and bias are in, what is not seen is not out yet.
int64_t kv_scores(const Item& item, Work& work, const int64_t* row);
// Scores outside what a query sees become -infinity; false when it sees nothing of the page, whose first token is at
// position `first`.
bool kv_restrict(const Item& item, int r, int64_t first, int64_t tokens, int64_t width, float* scores);

}  // namespace tersor::TERSOR_ISA
