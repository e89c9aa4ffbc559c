// Launcher of kernels/sm80_lowbit_linear.cu, sm80_lowbit_linear_s4.cu, sm80_lowbit_linear_experts.cu and
// sm80_two_level_linear.cu: checks what can be checked from sizes and addresses, chooses the instance and cuts the work
// into ranges.
#include <cstdint>

#include "common/status.h"
#include "cpu/int_layout.h"
#include "dispatch/lowbit_linear_tiles.h"
#include "dispatch/stream_plan.h"
#include "kernels/sm80_lowbit_linear_experts.h"
#include "kernels/sm80_two_level_linear.h"
#include "tersor.h"
#include "tile/act_codes.h"

namespace tersor {

LowbitLinearChooser* lowbit_linear_choosers[9] = {};
LowbitLinearChooser* lowbit_linear_nibble_choosers[3] = {};
LowbitExpertsChooser* lowbit_experts_choosers[9] = {};
TwoLevelChooser* two_level_choosers[kTwoLevelMostBits + 1] = {};

namespace {

constexpr int kRowTiles = kStreamRows / kTileRows;  // storage tiles of a row block
constexpr int kTwoLevelScales = 3;                  // scale_dtype: cpp/cpu/int_scales.h

struct Shape {
  int64_t m, n, k;
  int bits;
  int64_t group_size;
  int scale_dtype;
  bool zero_points, act_zero_points;
  int64_t act_group;
  int width;        // enum LowbitWidth
  int64_t experts;  // 0: one weight for all rows
  bool two_level() const { return scale_dtype == kTwoLevelScales; }
};

// What a launch needs to know about one problem.
struct Problem {
  IntShape weight;
  bool grouped;
  int token_tiles, token_blocks, row_blocks, stages;
  int act_groups, act_group_blocks, group_slots, act_slots;
  int group_bytes, stage_bytes, shared_bytes;
  int64_t units;  // (row block, stage) pairs
};

int check_groups(const Shape& s, const Problem& p) {
  if (s.width == kLowbitBytes) return TERSOR_OK;
  const bool fits = (p.weight.groups == 1 || p.weight.group_blocks % 2 == 0) &&
                    (p.act_groups == 1 || p.act_group_blocks % 2 == 0);
  if (s.bits != 4 || s.act_zero_points || !fits) {
    return fail(TERSOR_INVALID,
                "width is %d with %d-bit weights, groups of %lld and %lld: accepted are 4-bit weights, symmetric "
                "activations and groups of multiples of 64",
                s.width, s.bits, (long long)s.group_size, (long long)s.act_group);
  }
  if (s.width == kLowbitMixed && p.act_group_blocks != 2 && p.act_group_blocks != 4 && p.weight.blocks > 4) {
    return fail(TERSOR_INVALID, "act_group is %lld; accepted for activations of two widths: 64 and 128",
                (long long)s.act_group);
  }
  return TERSOR_OK;
}

int describe(const Shape& s, Problem* p) {
  if (int status = check_int_arguments(s.n, s.k, s.bits, s.group_size, 1)) return status;
  constexpr int64_t rows = int64_t(1) << 25;
  // Those whose sums are added: two levels have them in the weights.
  const bool zero_points = s.zero_points && !s.two_level();
  const int64_t columns = zero_points && s.act_zero_points ? 32768 : 65536;
  if (s.n > rows || s.k > columns || s.m < 0 || s.m > 32 * rows) {
    return fail(TERSOR_INVALID, "m, n, k are %lld, %lld, %lld; accepted: 0 to 2^30, 2^25, %lld", (long long)s.m,
                (long long)s.n, (long long)s.k, (long long)columns);
  }
  if (s.scale_dtype < 0 || s.scale_dtype > kTwoLevelScales) {
    return fail(TERSOR_INVALID, "scale_dtype is %d; accepted: 0 float32, 1 bfloat16, 2 float16, 3 two levels",
                s.scale_dtype);
  }
  if (s.two_level() && (s.width != kLowbitBytes || s.bits > kTwoLevelMostBits || s.experts)) {
    return fail(TERSOR_INVALID,
                "width is %d with %d bits, %lld experts and two levels of scales: accepted are 0 bytes, 2 to %d bits "
                "and no experts",
                s.width, s.bits, (long long)s.experts, kTwoLevelMostBits);
  }
  if (s.act_group < 0 || s.act_group % kBlockK) {
    return fail(TERSOR_INVALID, "act_group is %lld; accepted: multiples of %d, and 0 for one scale a token",
                (long long)s.act_group, kBlockK);
  }
  if (s.width < kLowbitBytes || s.width > kLowbitMixed) {
    return fail(TERSOR_INVALID, "width is %d; accepted: 0 bytes, 1 nibbles, 2 mixed", s.width);
  }
  p->weight = int_shape(s.n, s.k, s.bits, s.group_size);
  const bool whole = s.act_group == 0 || s.act_group >= s.k;
  p->act_groups = static_cast<int>(whole ? 1 : div_up(s.k, s.act_group));
  p->act_group_blocks = static_cast<int>(whole ? p->weight.blocks : s.act_group / kBlockK);
  if (int status = check_groups(s, *p)) return status;
  p->grouped = (p->weight.groups > 1 && !s.two_level()) || p->act_groups > 1 || s.width == kLowbitMixed;
  if (int status = check_experts(s.experts, 0)) return status;
  const int most = lowbit_most_token_tiles(p->grouped, zero_points || s.act_zero_points);
  p->token_tiles = s.experts ? lowbit_experts_token_tiles(s.m, s.experts) : lowbit_token_tiles(s.m, most);
  p->token_blocks = static_cast<int>(token_blocks_of(s.m, 8 * p->token_tiles, s.experts));
  p->row_blocks = static_cast<int>(div_up(p->weight.tiles, kRowTiles));
  p->stages = static_cast<int>(div_up(p->weight.blocks, kStreamBlocks));
  p->units = int64_t(p->row_blocks) * p->stages;
  p->group_slots = stage_groups(p->weight.group_blocks, p->weight.groups);
  p->act_slots = stage_groups(p->act_group_blocks, p->act_groups);
  const int scale_bytes = s.two_level() ? 1 : s.scale_dtype == TERSOR_FLOAT32 ? 4 : 2;
  p->group_bytes = lowbit_group_bytes(scale_bytes, s.zero_points);
  p->stage_bytes = s.two_level() ? two_level_stage_bytes(s.bits, p->token_tiles, p->grouped, p->group_slots,
                                                         p->act_slots, s.zero_points)
                                 : lowbit_stage_bytes(s.bits, p->token_tiles, s.width, p->grouped, p->group_slots,
                                                      p->act_slots, scale_bytes, s.zero_points);
  p->shared_bytes = lowbit_stages(s.bits, p->token_tiles, s.width, p->grouped) * p->stage_bytes + 16;
  return TERSOR_OK;
}

int plan(const Shape& shape, int multiprocessors, int64_t shared_memory_per_multiprocessor, int64_t* ranges,
         int64_t* partial_bytes, int64_t* counter_bytes) {
  Problem p;
  if (int status = describe(shape, &p)) return status;
  if (multiprocessors < 1) return fail(TERSOR_INVALID, "multiprocessors is %d; accepted: 1 or more", multiprocessors);
  const int most = shape.experts ? lowbit_experts_blocks_per_multiprocessor(p.token_tiles)
                   : shape.two_level() ? two_level_blocks(p.token_tiles)
                                       : lowbit_blocks(p.token_tiles, shape.width, p.grouped);
  const StreamShape blocks{p.token_blocks, p.row_blocks, p.units, p.token_tiles, p.shared_bytes};
  *ranges = ranges_that_fill(blocks, most, multiprocessors, shared_memory_per_multiprocessor);
  stream_workspace(p.token_blocks, p.row_blocks, p.token_tiles, *ranges, partial_bytes, counter_bytes);
  return TERSOR_OK;
}

// What a call brings; experts 0 and ends null: one weight for all rows.
struct Call {
  const uint8_t* codes;
  int width;
  int64_t row_bytes;
  const float* act_scales;
  int64_t act_scale_stride;
  const int16_t *sums, *act_zero_points;
  const int32_t* stage_starts;
  int64_t row_cost, act_group, m, k;
  const uint8_t* qweight;
  const void* scales;
  int scale_dtype;
  const uint8_t* zero_points;
  const void *bias, *residual;
  int64_t ldr;
  void* y;
  int y_dtype;
  int64_t n, ldy;
  int bits;
  int64_t group_size, ranges;
  uint32_t *partials, *counters;
  void* stream;
  const int32_t* ends;
  int64_t experts;
};

int check_call(const Call& c, const Problem& p) {
  if (c.y_dtype < 0 || c.y_dtype > 2) {
    return fail(TERSOR_INVALID, "y_dtype is %d; accepted: 0 float32, 1 bfloat16, 2 float16", c.y_dtype);
  }
  const bool no_sums = c.zero_points && !c.sums && c.scale_dtype != kTwoLevelScales;
  if (!c.codes || !c.act_scales || !c.qweight || !c.scales || !c.y || no_sums ||
      (c.experts && !c.ends) || (c.width == kLowbitMixed && !c.stage_starts)) {
    return fail(TERSOR_INVALID, "%s is absent",
                !c.codes ? "codes" : !c.act_scales ? "act_scales" : !c.qweight ? "qweight" : !c.scales ? "scales"
                : !c.y ? "y" : c.experts && !c.ends ? "ends" : no_sums ? "sums" : "stage_starts");
  }
  const bool aligned_to_16 = is_aligned(c.codes, 16) && c.row_bytes % 16 == 0 && is_aligned(c.qweight, 16) &&
                             is_aligned(c.scales, 16) && (!c.zero_points || is_aligned(c.zero_points, 16));
  if (!aligned_to_16 || (c.sums && !is_aligned(c.sums, 8)) || !is_aligned(c.act_scales, 4)) {
    return fail(TERSOR_INVALID, "codes, qweight, scales, zero_points: accepted are 16-byte aligned addresses and rows; "
                "sums: 8-byte, act_scales: 4-byte");
  }
  // Rows of two widths are as long as the caller's table says.
  const int64_t most = act_row_bytes(c.k, c.width == kLowbitNibbles ? 4 : 8);
  const int64_t least = c.width == kLowbitMixed ? most / 2 : most;
  if (c.row_bytes < least || (c.m > 1 && (c.ldy < c.n || (c.residual && c.ldr < c.n))) ||
      (c.act_scale_stride != 0 && c.act_scale_stride < p.act_groups)) {
    return fail(TERSOR_INVALID,
                "row_bytes, ldy, ldr, act_scale_stride are %lld, %lld, %lld, %lld; accepted: at least %lld, %lld, "
                "%lld, %d (or 0)",
                (long long)c.row_bytes, (long long)c.ldy, (long long)c.ldr, (long long)c.act_scale_stride,
                (long long)least, (long long)c.n, (long long)c.n, p.act_groups);
  }
  const bool balanced = c.width == kLowbitMixed;
  const int64_t longest = balanced ? p.row_blocks * c.row_cost / kLowbitMaxStageCost : p.units;
  if (balanced && c.row_cost < p.stages) {
    return fail(TERSOR_INVALID, "row_cost is %lld; accepted: at least %d", (long long)c.row_cost, p.stages);
  }
  return check_ranges("lowbit_linear", c.ranges, longest < 1 ? 1 : longest, c.partials, c.counters);
}

LowbitLinearArguments arguments_of(const Call& c, const Problem& p) {
  const bool balanced = c.width == kLowbitMixed;
  LowbitLinearArguments a{};
  a.codes = c.codes;
  a.act_scales = c.act_scales;
  a.sums = c.sums;
  a.act_zero_points = c.act_zero_points;
  a.stage_starts = c.stage_starts;
  a.qweight = c.qweight;
  a.scales = c.scales;
  a.zero_points = c.zero_points;
  a.bias = c.bias;
  a.residual = c.residual;
  a.y = c.y;
  a.partials = c.partials;
  a.counters = c.counters;
  a.row_bytes = c.row_bytes;
  a.act_scale_stride = c.act_scale_stride;
  a.ldy = c.ldy;
  a.ldr = c.ldr;
  a.m = static_cast<int>(c.m);
  a.n = static_cast<int>(c.n);
  a.k = static_cast<int>(c.k);
  a.tiles = static_cast<int>(p.weight.tiles);
  a.blocks = static_cast<int>(p.weight.blocks);
  a.stages = p.stages;
  a.groups = static_cast<int>(p.weight.groups);
  a.group_blocks = static_cast<int>(p.weight.group_blocks);
  a.act_groups = p.act_groups;
  a.act_group_blocks = p.act_group_blocks;
  a.group_slots = p.group_slots;
  a.act_slots = p.act_slots;
  a.group_bytes = p.group_bytes;
  a.stage_bytes = p.stage_bytes;
  a.scale_dtype = c.scale_dtype;
  a.y_dtype = c.y_dtype;
  a.wide_stores = is_aligned(c.y, c.y_dtype == TERSOR_FLOAT32 ? 16 : 8) && (c.m == 1 || c.ldy % 4 == 0);
  a.ranges = equal_ranges(p.units, c.ranges);
  a.row_cost = balanced ? c.row_cost : 0;
  a.total_cost = balanced ? c.row_cost * p.row_blocks : 0;
  return a;
}

int start(const Call& c) {
  Problem p;
  const Shape shape{c.m, c.n, c.k, c.bits, c.group_size, c.scale_dtype, c.zero_points != nullptr,
                    c.act_zero_points != nullptr, c.act_group, c.width, c.experts};
  if (int status = describe(shape, &p)) return status;
  if (c.m == 0 || c.n == 0) return TERSOR_OK;
  if (int status = check_call(c, p)) return status;
  const LowbitLinearArguments a = arguments_of(c, p);
  const dim3 grid(p.token_blocks, static_cast<unsigned>(c.ranges)), block(kStreamThreads);
  const auto stream = static_cast<cudaStream_t>(c.stream);
  LowbitExpertsKernel* grouped = nullptr;
  LowbitLinearKernel* kernel = nullptr;
  TwoLevelKernel* two_level = nullptr;
  if (shape.two_level()) {
    TwoLevelChooser* chooser = two_level_choosers[c.bits];
    two_level = chooser ? chooser(p.grouped, p.token_tiles) : nullptr;
  } else if (c.experts) {
    LowbitExpertsChooser* chooser = lowbit_experts_choosers[c.bits];
    grouped = chooser ? chooser(p.grouped, p.token_tiles) : nullptr;
  } else {
    LowbitLinearChooser* chooser =
        c.width == kLowbitBytes ? lowbit_linear_choosers[c.bits] : lowbit_linear_nibble_choosers[c.width];
    kernel = chooser ? chooser(p.grouped, p.token_tiles) : nullptr;
  }
  if (!kernel && !grouped && !two_level) {
    return fail(TERSOR_INVALID, "bits %d, width %d with %d tokens at once: not in this build", c.bits, c.width,
                8 * p.token_tiles);
  }
  int error = 0;
  if (two_level) {
    const TwoLevelScales scales{static_cast<const uint8_t*>(c.scales), c.zero_points, a.groups, a.group_blocks};
    LowbitLinearArguments weights = a;  // whose groups are none to the sums
    weights.scales = nullptr;
    weights.zero_points = nullptr;
    weights.sums = nullptr;
    weights.groups = 1;
    weights.group_blocks = a.blocks;
    error = launch(two_level, grid, block, p.shared_bytes, stream, weights, scales);
  } else if (c.experts) {
    error = launch(grouped, grid, block, p.shared_bytes, stream, a,
                   expert_weights(a, c.bits, c.ends, c.experts));
  } else {
    error = launch(kernel, grid, block, p.shared_bytes, stream, a);
  }
  if (error) return fail(TERSOR_CUDA_ERROR, "lowbit_linear: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_lowbit_linear_plan(int64_t m, int64_t n, int64_t k, int bits, int64_t group_size,
                                              int scale_dtype, int has_zero_points, int64_t act_group,
                                              int act_has_zero_points, int width, int multiprocessors,
                                              int64_t shared_memory_per_multiprocessor, int64_t* ranges,
                                              int64_t* partial_bytes, int64_t* counter_bytes) {
  return plan({m, n, k, bits, group_size, scale_dtype, has_zero_points != 0, act_has_zero_points != 0, act_group, width,
               /* experts */ 0},
              multiprocessors, shared_memory_per_multiprocessor, ranges, partial_bytes, counter_bytes);
}

extern "C" int tersor_cuda_lowbit_linear(
    const uint8_t* codes, int width, int64_t row_bytes, const float* act_scales, int64_t act_scale_stride,
    const int16_t* sums, const int16_t* act_zero_points, const int32_t* stage_starts, int64_t row_cost,
    int64_t act_group, int64_t m, int64_t k, const uint8_t* qweight, const void* scales, int scale_dtype,
    const uint8_t* zero_points, const void* bias, const void* residual, int64_t ldr, void* y, int y_dtype, int64_t n,
    int64_t ldy, int bits, int64_t group_size, int64_t ranges, uint32_t* partials, uint32_t* counters, void* stream) {
  return start({codes, width, row_bytes, act_scales, act_scale_stride, sums, act_zero_points, stage_starts, row_cost,
                act_group, m, k, qweight, scales, scale_dtype, zero_points, bias, residual, ldr, y, y_dtype, n, ldy,
                bits, group_size, ranges, partials, counters, stream, nullptr, 0});
}

extern "C" int tersor_cuda_lowbit_linear_grouped_plan(int64_t rows, int64_t n, int64_t k, int bits, int64_t group_size,
                                                      int scale_dtype, int has_zero_points, int64_t act_group,
                                                      int act_has_zero_points, int64_t experts, int multiprocessors,
                                                      int64_t shared_memory_per_multiprocessor, int64_t* ranges,
                                                      int64_t* partial_bytes, int64_t* counter_bytes) {
  if (int status = check_experts(experts, 1)) return status;
  return plan({rows, n, k, bits, group_size, scale_dtype, has_zero_points != 0, act_has_zero_points != 0, act_group,
               kLowbitBytes, experts},
              multiprocessors, shared_memory_per_multiprocessor, ranges, partial_bytes, counter_bytes);
}

extern "C" int tersor_cuda_lowbit_linear_grouped(
    const uint8_t* codes, int64_t row_bytes, const float* act_scales, int64_t act_scale_stride, const int16_t* sums,
    const int16_t* act_zero_points, int64_t act_group, int64_t rows, int64_t k, const int32_t* ends, int64_t experts,
    const uint8_t* qweight, const void* scales, int scale_dtype, const uint8_t* zero_points, const void* bias, void* y,
    int y_dtype, int64_t n, int64_t ldy, int bits, int64_t group_size, int64_t ranges, uint32_t* partials,
    uint32_t* counters, void* stream) {
  if (int status = check_experts(experts, 1)) return status;
  return start({codes, kLowbitBytes, row_bytes, act_scales, act_scale_stride, sums, act_zero_points, nullptr, 0,
                act_group, rows, k, qweight, scales, scale_dtype, zero_points, bias, nullptr, 0, y, y_dtype, n, ldy,
                bits, group_size, ranges, partials, counters, stream, ends, experts});
}
