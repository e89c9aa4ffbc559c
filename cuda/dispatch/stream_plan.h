// What the launchers of kernels on tile/stream_k.h share: how many tokens a block multiplies, how many ranges fill a
// device, how much scratch memory they need, and the launch. The figures are data, to be replaced by measured values.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/int_layout.h"
#include "dispatch/launch.h"
#include "tersor.h"
#include "tile/expert_rows.h"
#include "tile/row_stream.h"

namespace tersor {

// A range of fewer stages than this costs more in its start and its partial sums than it gains.
constexpr int kStreamMinStages = 4;

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// ---- ranges ---------------------------------------------------------------------------------------------------------

// What decides how a problem is cut: blocks of tokens and of rows, units (row block, stage), and a block's tokens (in
// tiles of 8) and shared memory.
struct StreamShape {
  int64_t token_blocks, row_blocks, units;
  int token_tiles;
  int64_t shared_bytes;
};

inline EqualRanges equal_ranges(int64_t units, int64_t ranges) {
  return {static_cast<uint32_t>(units / ranges), static_cast<uint32_t>(units % ranges)};
}

// As many ranges as fill a device with resident blocks, `most` of them on a multiprocessor.
inline int64_t ranges_that_fill(const StreamShape& s, int most, int multiprocessors, int64_t shared_memory) {
  // The driver keeps 1 KB of each block's shared memory for itself.
  int64_t resident = shared_memory / (s.shared_bytes + 1024);
  if (resident > most) resident = most;
  if (resident < 1) resident = 1;
  int64_t count = multiprocessors * resident / (s.token_blocks > 0 ? s.token_blocks : 1);
  if (count > s.units / kStreamMinStages) count = s.units / kStreamMinStages;
  return count < 1 ? 1 : count;
}

// Bytes of partial sums and of counters, which are zero before the first launch; none where one range sums everything
// itself.
inline void stream_workspace(int64_t token_blocks, int64_t row_blocks, int token_tiles, int64_t ranges,
                             int64_t* partial_bytes, int64_t* counter_bytes) {
  *partial_bytes = ranges == 1 ? 0 : token_blocks * ranges * 2 * kStreamRows * 8 * token_tiles * 4;
  *counter_bytes = ranges == 1 ? 0 : token_blocks * row_blocks * 4;
}

// `what` names the operation in errors.
inline int check_ranges(const char* what, int64_t ranges, int64_t most, const void* partials, const void* counters) {
  if (most > 65535) most = 65535;
  if (ranges < 1 || ranges > most) {
    return fail(TERSOR_INVALID, "%s: ranges is %lld; accepted: 1 to %lld", what, (long long)ranges, (long long)most);
  }
  if (ranges > 1 && (!partials || !counters || !is_aligned(partials, 16))) {
    return fail(TERSOR_INVALID,
                "%s: partials and counters: accepted is the workspace, 16-byte aligned, for ranges above 1", what);
  }
  return TERSOR_OK;
}

// ---- groups of integer weights, experts -----------------------------------------------------------------------------

// Groups that one stage can touch.
constexpr int stage_groups(int64_t group_blocks, int64_t groups) {
  return group_blocks == 1 ? 4 : group_blocks % kStreamBlocks == 0 || groups == 1 ? 1 : 2;
}

// Blocks of tokens that a launch has. Where rows belong to experts as they fall, each expert, and the rows of none, can
// leave one block unfilled: the most there can be. experts 0: one weight for all rows.
constexpr int64_t token_blocks_of(int64_t m, int64_t tokens, int64_t experts) {
  return experts ? m / tokens + (m < experts + 1 ? m : experts + 1) : div_up(m, tokens);
}

inline int check_experts(int64_t experts, int64_t least) {
  if (experts >= least && experts <= 65535) return TERSOR_OK;
  return fail(TERSOR_INVALID, "experts is %lld; accepted on CUDA: %lld to 65535", (long long)experts, (long long)least);
}

// The experts of a launch with the arguments `a` of one weight.
template <class Arguments>
ExpertWeights expert_weights(const Arguments& a, int bits, const int32_t* ends, int64_t experts) {
  const int64_t entries = int64_t(a.tiles) * a.groups * kTileRows, scale_bytes = a.scale_dtype ? 2 : 4;
  const int64_t weight_bytes = int64_t(a.tiles) * a.blocks * 64 * bits;
  return {ends, static_cast<int>(experts), a.m, weight_bytes, entries * scale_bytes, entries};
}

// ---- kernels on tile/row_stream.h -----------------------------------------------------------------------------------

// Token tiles of 8 that a block multiplies at once; more tokens are further blocks of the grid.
constexpr int stream_token_tiles(int64_t m) { return m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8; }

inline int check_stream(const char* what, int64_t m, int64_t n, int64_t k) {
  constexpr int64_t limit = int64_t(1) << 25;
  if (m < 0 || m > 32 * limit || n < 0 || n > limit || k < 1 || k > limit ||
      div_up(n, kStreamRows) * div_up(k, kStreamK) > INT32_MAX) {
    return fail(TERSOR_INVALID,
                "%s: m, n, k are %lld, %lld, %lld; accepted: 0 to 2^30, 0 to 2^25, 1 to 2^25, n x k up to 2^45", what,
                (long long)m, (long long)n, (long long)k);
  }
  return TERSOR_OK;
}

// `name`: which argument's type it is.
inline int check_half(const char* what, const char* name, int dtype) {
  if (dtype == TERSOR_BFLOAT16 || dtype == TERSOR_FLOAT16) return TERSOR_OK;
  return fail(TERSOR_INVALID, "%s: %s is %d; accepted on CUDA: 1 bfloat16, 2 float16", what, name, dtype);
}

// Ranges and bytes of the workspace for one problem on a device.
inline void plan_stream(int64_t m, int64_t n, int64_t k, int stage_bytes, int multiprocessors, int64_t shared_memory,
                        int64_t* ranges, int64_t* partial_bytes, int64_t* counter_bytes) {
  const int tiles = stream_token_tiles(m);
  const int64_t row_blocks = div_up(n, kStreamRows), token_blocks = div_up(m, 8 * tiles);
  const StreamShape shape{token_blocks, row_blocks, row_blocks * div_up(k, kStreamK), tiles,
                          int64_t(stream_stages(stage_bytes)) * stage_bytes + 16};
  *ranges = ranges_that_fill(shape, stream_blocks_per_multiprocessor(tiles), multiprocessors, shared_memory);
  stream_workspace(token_blocks, row_blocks, tiles, *ranges, partial_bytes, counter_bytes);
}

// The results' part of a call's arguments; TERSOR_OK or what is wrong with them.
inline int describe_stream(const char* what, const void* bias, void* y, int64_t m, int64_t n, int64_t k, int64_t ldy,
                           int64_t ranges, float* partials, uint32_t* counters, RowStream* a) {
  const int64_t row_blocks = div_up(n, kStreamRows), stages = div_up(k, kStreamK), units = row_blocks * stages;
  if (!y || !is_aligned(y, 2) || (m > 1 && ldy < n)) {
    return fail(TERSOR_INVALID, "%s: y is %p with ldy %lld; accepted: 2-byte aligned, ldy at least n = %lld", what, y,
                (long long)ldy, (long long)n);
  }
  if (int status = check_ranges(what, ranges, units, partials, counters)) return status;
  a->bias = bias;
  a->y = y;
  a->partials = partials;
  a->counters = counters;
  a->ldy = m > 1 ? ldy : 0;
  a->m = static_cast<int>(m);
  a->n = static_cast<int>(n);
  a->row_blocks = static_cast<int>(row_blocks);
  a->stages = static_cast<int>(stages);
  a->wide_stores = is_aligned(y, 8) && (m == 1 || ldy % 4 == 0);
  a->ranges = equal_ranges(units, ranges);
  return TERSOR_OK;
}

template <class Arguments>
int launch_stream(const char* what, void (*kernel)(Arguments), int stage_bytes, int64_t ranges, void* stream,
                  const Arguments& a) {
  const int64_t token_blocks = div_up(a.rows.m, 8 * stream_token_tiles(a.rows.m));
  const dim3 grid(static_cast<unsigned>(token_blocks), static_cast<unsigned>(ranges));
  const int error = launch(kernel, grid, dim3(kStreamThreads), stream_stages(stage_bytes) * stage_bytes + 16,
                           static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "%s: the kernel did not start: CUDA error %d", what, error);
  return TERSOR_OK;
}

// ---- kernels that round rows for them -------------------------------------------------------------------------------

// Rows [m, ldx] of x and what is made of them: values in x's own type, or `codes` at multiples of code_bytes.
inline int check_rows(const char* what, const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx,
                      const void* values, const void* codes, const void* scales, int64_t code_bytes) {
  if (x_dtype < 0 || x_dtype > 2) {
    return fail(TERSOR_INVALID, "%s: x_dtype is %d; accepted: 0 float32, 1 bfloat16, 2 float16", what, x_dtype);
  }
  if (m > 0 && (!x || (!values && (!codes || !scales || !is_aligned(codes, code_bytes))))) {
    return fail(TERSOR_INVALID, "%s: x, codes or scales is absent, or codes no multiple of %lld", what,
                (long long)code_bytes);
  }
  if (m > 1 && ldx < k) {
    return fail(TERSOR_INVALID, "%s: ldx is %lld; accepted: at least k = %lld", what, (long long)ldx, (long long)k);
  }
  return TERSOR_OK;
}

// The same part of the arguments of kernels that round rows.
template <class Rows>
void describe_rows(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx, uint8_t* codes, void* values,
                   Rows* a) {
  const int64_t bytes = x_dtype == TERSOR_FLOAT32 ? 4 : 2;
  a->x = x;
  a->codes = codes;
  a->values = values;
  a->ldx = m > 1 ? ldx : 0;
  a->k = static_cast<int>(k);
  a->padded = static_cast<int>(div_up(k, kStreamK) * kStreamK);
  a->aligned = is_aligned(x, 16) && a->ldx * bytes % 16 == 0;
  a->aligned_values = is_aligned(values, 16) && k * bytes % 16 == 0;
}

}  // namespace tersor
