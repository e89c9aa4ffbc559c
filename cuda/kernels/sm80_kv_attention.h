// What the attention kernels over a paged cache (sm80_kv_attention.cu, and sm80_kv_attention_formats.cu for pages of
// formats) and their launcher (dispatch/kv_attention.cu) agree on.
#pragma once

#include <cstdint>

#include "tile/kv_layout.h"
#include "tile/kv_stream.h"

namespace tersor {

constexpr int kKvThreads = 32 * kKvWarps;
struct KvAttentionArguments {
  const void* q;        // [batch, heads, queries, dim], 16 bits, rows 8-byte aligned
  void* out;            // [batch, queries, heads, dim]
  float* log_sum_exp;   // [batch, heads, queries] or null
  const KvPage* table;  // [batch, table_pages]
  const int32_t* pages;      // [batch]: entries of the table in use
  const int32_t* positions;  // [batch]: of the first query, or null: the queries are the last tokens
  const int32_t* first;      // [batch]: the first position that is seen, or null
  const uint8_t* mask;       // of batch, head, query, position, or null
  const float* sinks;        // [heads] or null
  float* partials;           // for each (sequence, head of keys, row tile, split): rows x (dim + 2)
  uint32_t* counters;        // for each (sequence, head of keys, row tile); zero before and after
  int64_t q_strides[3], mask_strides[4];
  int heads, kv_heads, queries, group;  // group: query heads that share a head of keys
  int table_pages, splits;
  int window, causal, is_bfloat16;
  int mask_first, mask_end;  // positions that the mask covers
  int biased;                // pages have tails with float32 of their tokens
  int residual_width;
  const KvResidual* residuals;  // [batch, table_pages], by position / 64; or null. With formats alone
  const float* residual_query;  // [batch, heads, queries, residual_width]
  float scale, softcap;
  KvRotary rotary;
  KvFormat formats[kKvFormats];
};

using KvAttentionKernel = void(KvAttentionArguments);

// Query rows of a block: 8, whose remainders fill the other half of a fragment, or 16. Beside the queries lie the
// positions that each row, and the block, sees; with formats, then 8 rows' probabilities for each warp.
__host__ __device__ constexpr int kv_query_bytes(int dim, int rows) { return dim * rows * 2; }
__host__ __device__ constexpr int kv_limit_bytes(int rows) { return 16 + 8 * rows; }
constexpr int kKvWeightBytes = 8 * kKvTokens * 4;
constexpr int kv_shared_bytes(int dim, int rows, int slots, bool formats) {
  return kKvWarps * kv_stream_bytes(dim, slots, formats) + kv_query_bytes(dim, rows) + kv_limit_bytes(rows) +
         (formats ? kKvWarps * kKvWeightBytes : 0);
}
// Units under way and the present one: as many of 4 as one block may have without asking.
constexpr int kv_slots(int dim, int rows, bool formats) {
  return kv_shared_bytes(dim, rows, 4, formats) <= 48 * 1024 ? 4 : 3;
}
constexpr int kv_shared_bytes(int dim, int rows, bool formats) {
  return kv_shared_bytes(dim, rows, kv_slots(dim, rows, formats), formats);
}
constexpr bool kv_shared_memory_fits(bool formats) {
  return kv_shared_bytes(64, 16, formats) <= 48 * 1024 && kv_shared_bytes(80, 16, formats) <= 48 * 1024 &&
         kv_shared_bytes(96, 16, formats) <= 48 * 1024 && kv_shared_bytes(128, 16, formats) <= 48 * 1024 &&
         kv_shared_bytes(256, 8, formats) <= 48 * 1024;
}
static_assert(kv_shared_memory_fits(false) && kv_shared_memory_fits(true),
              "shared memory stays below what needs an attribute");

__host__ __device__ constexpr int kv_partial_floats(int dim, int rows) { return rows * (dim + 2); }

// With 256 channels the registers hold the sums of 8 rows.
constexpr int kv_most_rows(int dim) { return dim == 256 ? 8 : 16; }

// Blocks that should share a multiprocessor: the register budget follows from it.
constexpr int kv_blocks_per_multiprocessor(int dim, int rows, bool formats = false) {
  return rows == 8 && dim == 64 && !formats ? 3 : 2;
}

// The kernel for one head dimension, for 8 or 16 rows, without and with formats; null for what was not built.
using KvAttentionChooser = KvAttentionKernel*(int rows);
extern KvAttentionChooser* kv_attention_choosers[257];
extern KvAttentionChooser* kv_format_choosers[257];

}  // namespace tersor
