// Launcher of kernels/sm80_int_linear.cu: checks what can be checked from sizes and addresses, chooses the instance
// and cuts the work into ranges.
#include <cstdint>

#include "common/status.h"
#include "cpu/int_layout.h"
#include "dispatch/int_linear_tiles.h"
#include "dispatch/stream_plan.h"
#include "tersor.h"

namespace tersor {

IntLinearChooser* int_linear_choosers[9] = {};
IntLinearGroupedChooser* int_linear_grouped_choosers[9] = {};

namespace {

constexpr int kRowTiles = kStreamRows / kTileRows;  // storage tiles of a row block

// What a launch needs to know about one problem; valid: sizes are in range.
struct Problem {
  int token_tiles, token_blocks, row_blocks, stages, group_blocks, groups, group_slots;
  int group_bytes, stage_bytes, shared_bytes;
  int64_t units;  // (row block, stage) pairs
};

// experts 0: one weight for all rows.
int describe(int64_t m, int64_t n, int64_t k, int bits, int64_t group_size, int scale_dtype, bool zero_points,
             int64_t experts, Problem* p) {
  if (int status = check_int_arguments(n, k, bits, group_size, 1)) return status;
  constexpr int64_t limit = int64_t(1) << 25;  // the kernel counts bytes of a row's codes in 32 bits
  if (n > limit || k > limit || m < 0 || m > 32 * limit) {
    return fail(TERSOR_INVALID, "m, n, k are %lld, %lld, %lld; accepted on CUDA: 0 to 2^30, 2^25, 2^25", (long long)m,
                (long long)n, (long long)k);
  }
  if (scale_dtype < 0 || scale_dtype > 2) {
    return fail(TERSOR_INVALID, "scale_dtype is %d; accepted: 0 float32, 1 bfloat16, 2 float16", scale_dtype);
  }
  const IntShape shape = int_shape(n, k, bits, group_size);
  if (int status = check_experts(experts, 0)) return status;
  p->token_tiles = experts ? int_linear_grouped_token_tiles(m, experts) : int_linear_token_tiles(m);
  p->token_blocks = static_cast<int>(token_blocks_of(m, 8 * p->token_tiles, experts));
  p->row_blocks = static_cast<int>(div_up(shape.tiles, kRowTiles));
  p->stages = static_cast<int>(div_up(shape.blocks, kStreamBlocks));
  p->units = int64_t(p->row_blocks) * p->stages;
  if (p->units > INT32_MAX) {
    return fail(TERSOR_INVALID, "n x k is %lld x %lld; accepted on CUDA: up to 2^45 weights", (long long)n,
                (long long)k);
  }
  p->groups = static_cast<int>(shape.groups);
  p->group_blocks = static_cast<int>(shape.group_blocks);
  p->group_slots = stage_groups(p->group_blocks, p->groups);
  p->group_bytes = int_linear_group_bytes(scale_dtype == TERSOR_FLOAT32 ? 4 : 2, zero_points);
  p->stage_bytes = int_linear_weight_bytes(bits) + int_linear_token_bytes(p->token_tiles) +
                   p->group_slots * p->group_bytes;
  p->shared_bytes = int_linear_stages(bits, p->token_tiles) * p->stage_bytes + 16;
  return TERSOR_OK;
}

int plan(int64_t m, int64_t n, int64_t k, int bits, int64_t group_size, int scale_dtype, bool zero_points,
         int64_t experts, int multiprocessors, int64_t shared_memory_per_multiprocessor, int64_t* ranges) {
  Problem p;
  if (int status = describe(m, n, k, bits, group_size, scale_dtype, zero_points, experts, &p)) return status;
  if (multiprocessors < 1) return fail(TERSOR_INVALID, "multiprocessors is %d; accepted: 1 or more", multiprocessors);
  const StreamShape shape{p.token_blocks, p.row_blocks, p.units, p.token_tiles, p.shared_bytes};
  *ranges = ranges_that_fill(shape, int_linear_blocks_per_multiprocessor(bits, p.token_tiles), multiprocessors,
                             shared_memory_per_multiprocessor);
  return TERSOR_OK;
}

int workspace(int64_t m, int64_t n, int64_t experts, int64_t ranges, int64_t* partial_bytes, int64_t* counter_bytes) {
  if (m < 0 || n < 0 || experts < 0 || ranges < 1) {
    return fail(TERSOR_INVALID, "m, n, ranges are %lld, %lld, %lld; accepted: m, n from 0 and ranges from 1",
                (long long)m, (long long)n, (long long)ranges);
  }
  const int tiles = experts ? int_linear_grouped_token_tiles(m, experts) : int_linear_token_tiles(m);
  stream_workspace(token_blocks_of(m, 8 * tiles, experts), div_up(n, kStreamRows), tiles, ranges, partial_bytes,
                   counter_bytes);
  return TERSOR_OK;
}

// What a call brings; experts 0 and ends null: one weight for all rows.
struct Call {
  const void* x;
  int x_dtype;
  int64_t m, k, ldx;
  const uint8_t* qweight;
  const void* scales;
  int scale_dtype;
  const uint8_t* zero_points;
  const void* bias;
  void* y;
  int64_t n, ldy;
  int bits;
  int64_t group_size, ranges;
  float* partials;
  uint32_t* counters;
  void* stream;
  const int32_t* ends;
  int64_t experts;
};

int check_call(const Call& c, const Problem& p) {
  if (c.x_dtype != TERSOR_BFLOAT16 && c.x_dtype != TERSOR_FLOAT16) {
    return fail(TERSOR_INVALID, "x_dtype is %d; accepted by the CUDA kernel: 1 bfloat16, 2 float16", c.x_dtype);
  }
  if (c.m > 1 && (c.ldx < c.k || c.ldy < c.n)) {
    return fail(TERSOR_INVALID, "ldx, ldy are %lld, %lld; accepted: at least k = %lld and n = %lld", (long long)c.ldx,
                (long long)c.ldy, (long long)c.k, (long long)c.n);
  }
  if (!c.x || !c.qweight || !c.scales || !c.y || (c.experts && !c.ends)) {
    return fail(TERSOR_INVALID, "%s is absent",
                !c.x ? "x" : !c.qweight ? "qweight" : !c.scales ? "scales" : !c.y ? "y" : "ends");
  }
  if (!is_aligned(c.x, 16) || (c.m > 1 && c.ldx % 8 != 0)) {
    return fail(TERSOR_INVALID, "x starts at %p with ldx %lld; accepted: 16-byte aligned rows", c.x, (long long)c.ldx);
  }
  if (!is_aligned(c.qweight, 16) || !is_aligned(c.scales, 16) || (c.zero_points && !is_aligned(c.zero_points, 16)) ||
      !is_aligned(c.y, 2)) {
    return fail(TERSOR_INVALID, "qweight, scales, zero_points: accepted are 16-byte aligned addresses");
  }
  return check_ranges("int_linear", c.ranges, p.units, c.partials, c.counters);
}

IntLinearArguments arguments_of(const Call& c, const Problem& p) {
  const IntShape shape = int_shape(c.n, c.k, c.bits, c.group_size);
  IntLinearArguments a{};
  a.x = c.x;
  a.qweight = c.qweight;
  a.scales = c.scales;
  a.zero_points = c.zero_points;
  a.bias = c.bias;
  a.y = c.y;
  a.partials = c.partials;
  a.counters = c.counters;
  a.ldx = c.m > 1 ? c.ldx : 0;
  a.ldy = c.m > 1 ? c.ldy : 0;
  a.m = static_cast<int>(c.m);
  a.n = static_cast<int>(c.n);
  a.k = static_cast<int>(c.k);
  a.tiles = static_cast<int>(shape.tiles);
  a.blocks = static_cast<int>(shape.blocks);
  a.groups = p.groups;
  a.group_blocks = p.group_blocks;
  a.stages = p.stages;
  a.group_slots = p.group_slots;
  a.group_bytes = p.group_bytes;
  a.stage_bytes = p.stage_bytes;
  a.scale_dtype = c.scale_dtype;
  a.wide_stores = is_aligned(c.y, 8) && (c.m == 1 || c.ldy % 4 == 0);
  a.ranges = equal_ranges(p.units, c.ranges);
  return a;
}

int start(const Call& c) {
  Problem p;
  if (int status = describe(c.m, c.n, c.k, c.bits, c.group_size, c.scale_dtype, c.zero_points != nullptr, c.experts,
                            &p)) {
    return status;
  }
  if (c.m == 0 || c.n == 0) return TERSOR_OK;
  if (int status = check_call(c, p)) return status;
  const IntLinearArguments a = arguments_of(c, p);
  const bool bfloat16 = c.x_dtype == TERSOR_BFLOAT16;
  const dim3 grid(p.token_blocks, static_cast<unsigned>(c.ranges));
  const auto stream = static_cast<cudaStream_t>(c.stream);
  int error = 0;
  if (c.experts) {
    IntLinearGroupedChooser* chooser = int_linear_grouped_choosers[c.bits];
    IntLinearGroupedKernel* kernel = chooser ? chooser(bfloat16, p.token_tiles) : nullptr;
    if (!kernel) {
      return fail(TERSOR_INVALID, "bits %d with %d tokens at once: not in this build", c.bits, 8 * p.token_tiles);
    }
    error = launch(kernel, grid, dim3(kStreamThreads), p.shared_bytes, stream, a,
                   expert_weights(a, c.bits, c.ends, c.experts));
  } else {
    IntLinearChooser* chooser = int_linear_choosers[c.bits];
    IntLinearKernel* kernel = chooser ? chooser(bfloat16, p.token_tiles) : nullptr;
    if (!kernel) {
      return fail(TERSOR_INVALID, "bits %d with %d tokens at once: not in this build", c.bits, 8 * p.token_tiles);
    }
    error = launch(kernel, grid, dim3(kStreamThreads), p.shared_bytes, stream, a);
  }
  if (error) return fail(TERSOR_CUDA_ERROR, "int_linear: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_int_linear_plan(int64_t m, int64_t n, int64_t k, int bits, int64_t group_size,
                                           int scale_dtype, int has_zero_points, int multiprocessors,
                                           int64_t shared_memory_per_multiprocessor, int64_t* ranges) {
  return plan(m, n, k, bits, group_size, scale_dtype, has_zero_points != 0, 0, multiprocessors,
              shared_memory_per_multiprocessor, ranges);
}

extern "C" int tersor_cuda_int_linear_workspace(int64_t m, int64_t n, int64_t ranges, int64_t* partial_bytes,
                                                int64_t* counter_bytes) {
  return workspace(m, n, 0, ranges, partial_bytes, counter_bytes);
}

extern "C" int tersor_cuda_int_linear_grouped_plan(int64_t rows, int64_t n, int64_t k, int bits, int64_t group_size,
                                                   int scale_dtype, int has_zero_points, int64_t experts,
                                                   int multiprocessors, int64_t shared_memory_per_multiprocessor,
                                                   int64_t* ranges, int64_t* partial_bytes, int64_t* counter_bytes) {
  if (int status = check_experts(experts, 1)) return status;
  if (int status = plan(rows, n, k, bits, group_size, scale_dtype, has_zero_points != 0, experts, multiprocessors,
                        shared_memory_per_multiprocessor, ranges)) {
    return status;
  }
  return workspace(rows, n, experts, *ranges, partial_bytes, counter_bytes);
}

extern "C" int tersor_cuda_int_linear(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx,
                                      const uint8_t* qweight, const void* scales, int scale_dtype,
                                      const uint8_t* zero_points, const void* bias, void* y, int64_t n, int64_t ldy,
                                      int bits, int64_t group_size, int64_t ranges, float* partials,
                                      uint32_t* counters, void* stream) {
  return start({x, x_dtype, m, k, ldx, qweight, scales, scale_dtype, zero_points, bias, y, n, ldy, bits, group_size,
                ranges, partials, counters, stream, nullptr, 0});
}

extern "C" int tersor_cuda_int_linear_grouped(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t ldx,
                                              const int32_t* ends, int64_t experts, const uint8_t* qweight,
                                              const void* scales, int scale_dtype, const uint8_t* zero_points,
                                              const void* bias, void* y, int64_t n, int64_t ldy, int bits,
                                              int64_t group_size, int64_t ranges, float* partials, uint32_t* counters,
                                              void* stream) {
  if (int status = check_experts(experts, 1)) return status;
  return start({x, x_dtype, rows, k, ldx, qweight, scales, scale_dtype, zero_points, bias, y, n, ldy, bits, group_size,
                ranges, partials, counters, stream, ends, experts});
}
