// Launcher of kernels/sm80_int_linear.cu: checks what can be checked from sizes and addresses, chooses the instance
// and cuts the work into ranges.
#include <cstdint>

#include "common/status.h"
#include "cpu/int_layout.h"
#include "dispatch/int_linear_tiles.h"
#include "dispatch/launch.h"
#include "tersor.h"

namespace tersor {

IntLinearChooser* int_linear_choosers[9] = {};

namespace {

constexpr int kRowTiles = kIntLinearRows / kTileRows;  // storage tiles of a row block

// What a launch needs to know about one problem; valid: sizes are in range.
struct Problem {
  int token_tiles, token_blocks, row_blocks, stages, group_blocks, groups, group_slots;
  int group_bytes, stage_bytes, shared_bytes;
  int64_t units;  // (row block, stage) pairs
};

int describe(int64_t m, int64_t n, int64_t k, int bits, int64_t group_size, int scale_dtype, bool zero_points,
             Problem* p) {
  if (int status = check_int_arguments(n, k, bits, group_size, 1)) return status;
  constexpr int64_t limit = int64_t(1) << 30;
  if (n > limit || k > limit || m < 0 || m > limit) {
    return fail(TERSOR_INVALID, "m, n, k are %lld, %lld, %lld; accepted on CUDA: 0 to 2^30", (long long)m, (long long)n,
                (long long)k);
  }
  if (scale_dtype < 0 || scale_dtype > 2) {
    return fail(TERSOR_INVALID, "scale_dtype is %d; accepted: 0 float32, 1 bfloat16, 2 float16", scale_dtype);
  }
  const IntShape shape = int_shape(n, k, bits, group_size);
  p->token_tiles = int_linear_token_tiles(m);
  p->token_blocks = static_cast<int>(div_up(m, 8 * p->token_tiles));
  p->row_blocks = static_cast<int>(div_up(shape.tiles, kRowTiles));
  p->stages = static_cast<int>(div_up(shape.blocks, kIntLinearStageBlocks));
  p->units = int64_t(p->row_blocks) * p->stages;
  if (p->units > INT32_MAX) {
    return fail(TERSOR_INVALID, "n x k is %lld x %lld; accepted on CUDA: up to 2^45 weights", (long long)n,
                (long long)k);
  }
  p->groups = static_cast<int>(shape.groups);
  p->group_blocks = static_cast<int>(shape.group_blocks);
  p->group_slots = p->group_blocks == 1 ? 4 : p->group_blocks % kIntLinearStageBlocks == 0 || p->groups == 1 ? 1 : 2;
  p->group_bytes = int_linear_group_bytes(scale_dtype == TERSOR_FLOAT32 ? 4 : 2, zero_points);
  p->stage_bytes = int_linear_weight_bytes(bits) + int_linear_token_bytes(p->token_tiles) +
                   p->group_slots * p->group_bytes;
  p->shared_bytes = int_linear_stages(bits, p->token_tiles) * p->stage_bytes + 16;
  return TERSOR_OK;
}

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_int_linear_plan(int64_t m, int64_t n, int64_t k, int bits, int64_t group_size,
                                           int scale_dtype, int has_zero_points, int multiprocessors,
                                           int64_t shared_memory_per_multiprocessor, int64_t* ranges) {
  Problem p;
  if (int status = describe(m, n, k, bits, group_size, scale_dtype, has_zero_points != 0, &p)) return status;
  if (multiprocessors < 1) return fail(TERSOR_INVALID, "multiprocessors is %d; accepted: 1 or more", multiprocessors);
  // The driver keeps 1 KB of each block's shared memory for itself.
  int64_t resident = shared_memory_per_multiprocessor / (p.shared_bytes + 1024);
  const int64_t by_registers = int_linear_blocks_per_multiprocessor(bits, p.token_tiles);
  if (resident > by_registers) resident = by_registers;
  if (resident < 1) resident = 1;
  int64_t count = multiprocessors * resident / (p.token_blocks > 0 ? p.token_blocks : 1);
  const int64_t most = p.units / kIntLinearMinStages;
  if (count > most) count = most;
  *ranges = count < 1 ? 1 : count;
  return TERSOR_OK;
}

extern "C" int tersor_cuda_int_linear_workspace(int64_t m, int64_t n, int64_t ranges, int64_t* partial_bytes,
                                                int64_t* counter_bytes) {
  if (m < 0 || n < 0 || ranges < 1) {
    return fail(TERSOR_INVALID, "m, n, ranges are %lld, %lld, %lld; accepted: m, n from 0 and ranges from 1",
                (long long)m, (long long)n, (long long)ranges);
  }
  const int64_t tokens = 8 * int_linear_token_tiles(m), token_blocks = div_up(m, tokens);
  *partial_bytes = token_blocks * ranges * 2 * kIntLinearRows * tokens * 4;
  *counter_bytes = token_blocks * div_up(n, kIntLinearRows) * 4;
  return TERSOR_OK;
}

extern "C" int tersor_cuda_int_linear(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx,
                                      const uint8_t* qweight, const void* scales, int scale_dtype,
                                      const uint8_t* zero_points, const void* bias, void* y, int64_t n, int64_t ldy,
                                      int bits, int64_t group_size, int64_t ranges, float* partials,
                                      uint32_t* counters, void* stream) {
  Problem p;
  if (int status = describe(m, n, k, bits, group_size, scale_dtype, zero_points != nullptr, &p)) return status;
  if (x_dtype != TERSOR_BFLOAT16 && x_dtype != TERSOR_FLOAT16) {
    return fail(TERSOR_INVALID, "x_dtype is %d; accepted by the CUDA kernel: 1 bfloat16, 2 float16", x_dtype);
  }
  if (m == 0 || n == 0) return TERSOR_OK;
  if (m > 1 && (ldx < k || ldy < n)) {
    return fail(TERSOR_INVALID, "ldx, ldy are %lld, %lld; accepted: at least k = %lld and n = %lld", (long long)ldx,
                (long long)ldy, (long long)k, (long long)n);
  }
  if (!x || !qweight || !scales || !y) {
    return fail(TERSOR_INVALID, "%s is absent", !x ? "x" : !qweight ? "qweight" : !scales ? "scales" : "y");
  }
  if (!aligned(x, 16) || (m > 1 && ldx % 8 != 0)) {
    return fail(TERSOR_INVALID, "x starts at %p with ldx %lld; accepted: 16-byte aligned rows", x, (long long)ldx);
  }
  if (!aligned(qweight, 16) || !aligned(scales, 16) || (zero_points && !aligned(zero_points, 16)) || !aligned(y, 2)) {
    return fail(TERSOR_INVALID, "qweight, scales, zero_points: accepted are 16-byte aligned addresses");
  }
  if (ranges < 1 || ranges > p.units || ranges > 65535) {
    return fail(TERSOR_INVALID, "ranges is %lld; accepted: 1 to %lld", (long long)ranges,
                (long long)(p.units < 65535 ? p.units : 65535));
  }
  if (ranges > 1 && (!partials || !counters || !aligned(partials, 16))) {
    return fail(TERSOR_INVALID, "partials and counters: accepted is the workspace, 16-byte aligned, for ranges "
                "above 1");
  }
  IntLinearChooser* chooser = int_linear_choosers[bits];
  IntLinearKernel* kernel = chooser ? chooser(x_dtype == TERSOR_BFLOAT16, p.token_tiles) : nullptr;
  if (!kernel) {
    return fail(TERSOR_INVALID, "bits %d with %d tokens at once: not in this build", bits, 8 * p.token_tiles);
  }

  const IntShape shape = int_shape(n, k, bits, group_size);
  IntLinearArguments a{};
  a.x = x;
  a.qweight = qweight;
  a.scales = scales;
  a.zero_points = zero_points;
  a.bias = bias;
  a.y = y;
  a.partials = partials;
  a.counters = counters;
  a.ldx = m > 1 ? ldx : 0;
  a.ldy = m > 1 ? ldy : 0;
  a.m = static_cast<int>(m);
  a.n = static_cast<int>(n);
  a.k = static_cast<int>(k);
  a.tiles = static_cast<int>(shape.tiles);
  a.blocks = static_cast<int>(shape.blocks);
  a.groups = p.groups;
  a.group_blocks = p.group_blocks;
  a.stages = p.stages;
  a.group_slots = p.group_slots;
  a.group_bytes = p.group_bytes;
  a.stage_bytes = p.stage_bytes;
  a.scale_dtype = scale_dtype;
  a.wide_stores = aligned(y, 8) && (m == 1 || ldy % 4 == 0);
  a.share = static_cast<uint32_t>(p.units / ranges);
  a.extra = static_cast<uint32_t>(p.units % ranges);
  const int error = launch(kernel, dim3(p.token_blocks, static_cast<unsigned>(ranges)), dim3(kIntLinearThreads),
                           p.shared_bytes, static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "int_linear: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}
