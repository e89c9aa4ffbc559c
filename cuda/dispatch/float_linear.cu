// Launcher of kernels/sm80_float_linear.cu: checks what can be checked from sizes and addresses, chooses the instance
// and cuts the work into ranges.
#include <cstdint>

#include "dispatch/stream_plan.h"
#include "kernels/sm80_float_linear.h"
#include "tersor_float.h"

namespace tersor {

FloatLinearChooser* float_linear_choosers[kFloatWeights] = {};

namespace {

constexpr char kOp[] = "float_linear";

int weight_of(int element, int scale_kind, int* weight) {
  const bool nv = scale_kind == kFloatScaleE4m3;
  if (element < 0 || element > 2 || scale_kind < 0 || scale_kind > 4 || (nv && element != 1)) {
    return fail(TERSOR_INVALID, "%s: element and kind of scales are %d and %d; accepted on CUDA: 0 to 2 with 0 to 3, "
                "1 with 4", kOp, element, scale_kind);
  }
  *weight = nv ? kFloatNv : element == 2 ? kFloatE2m3 : element;
  return TERSOR_OK;
}

int check_group(int64_t k, int scale_kind, int64_t group) {
  const bool right = scale_kind == kFloatScaleE8m0   ? group == 32
                     : scale_kind == kFloatScaleE4m3 ? group == 16
                                                     : group >= k || (group > 0 && group % kStreamK == 0);
  if (right) return TERSOR_OK;
  return fail(TERSOR_INVALID, "%s: group is %lld; accepted on CUDA: 32 with scales that are exponents, 16 with e4m3, "
              "multiples of 128 or all of k with floats", kOp, (long long)group);
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_float_linear_plan(int64_t m, int64_t n, int64_t k, int element, int scale_kind,
                                             int multiprocessors, int64_t shared_memory_per_multiprocessor,
                                             int64_t* ranges, int64_t* partial_bytes, int64_t* counter_bytes) {
  int weight;
  if (int status = check_stream(kOp, m, n, k)) return status;
  if (int status = weight_of(element, scale_kind, &weight)) return status;
  plan_stream(m, n, k, float_stage_bytes(weight, stream_token_tiles(m)), multiprocessors,
              shared_memory_per_multiprocessor, ranges, partial_bytes, counter_bytes);
  return TERSOR_OK;
}

extern "C" int tersor_cuda_float_linear(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx,
                                        const uint8_t* codes, int element, const void* scales, int scale_kind,
                                        int64_t scale_rows, int64_t group, const float* global, const void* bias,
                                        void* y, int64_t n, int64_t ldy, int64_t ranges, float* partials,
                                        uint32_t* counters, void* stream) {
  int weight;
  if (int status = check_stream(kOp, m, n, k)) return status;
  if (int status = weight_of(element, scale_kind, &weight)) return status;
  if (int status = check_group(k, scale_kind, group)) return status;
  if (int status = check_half(kOp, "x_dtype", x_dtype)) return status;
  if (scale_rows < 1 || scale_rows > INT32_MAX) {
    return fail(TERSOR_INVALID, "%s: scale_rows is %lld; accepted: 1 to 2^31 - 1", kOp, (long long)scale_rows);
  }
  if (m == 0 || n == 0) return TERSOR_OK;
  const bool nv = weight == kFloatNv;
  if (!x || !codes || !scales || (nv && !global)) {
    return fail(TERSOR_INVALID, "%s: %s is absent", kOp, !x ? "x" : !codes ? "codes" : !scales ? "scales" : "global");
  }
  if (!is_aligned(x, 16) || (m > 1 && (ldx % 8 != 0 || ldx < k))) {
    return fail(TERSOR_INVALID, "%s: x starts at %p with ldx %lld; accepted: 16-byte aligned rows of at least k = %lld",
                kOp, x, (long long)ldx, (long long)k);
  }
  FloatRows a{};
  if (int status = describe_stream(kOp, bias, y, m, n, k, ldy, ranges, partials, counters, &a.rows)) return status;
  const int tiles = stream_token_tiles(m);
  a.x = x;
  a.codes = codes;
  a.scales = scales;
  a.global = global;
  a.ldx = m > 1 ? ldx : 0;
  a.row_bytes = div_up(k * (element == 0 ? 8 : element == 1 ? 4 : 6), 8);
  a.k = static_cast<int>(k);
  a.groups = static_cast<int>(div_up(k, group));
  a.scale_kind = scale_kind;
  a.scale_rows = static_cast<int>(scale_rows);
  a.group_stages = static_cast<int>(a.groups == 1 ? a.rows.stages : div_up(group, kStreamK));
  a.aligned = is_aligned(codes, 16) && a.row_bytes % 16 == 0;
  FloatLinearChooser* chooser = float_linear_choosers[weight];
  FloatLinearKernel* kernel = chooser ? chooser(x_dtype == TERSOR_BFLOAT16, tiles) : nullptr;
  if (!kernel) return fail(TERSOR_INVALID, "%s: weights of kind %d: not in this build", kOp, weight);
  return launch_stream(kOp, kernel, float_stage_bytes(weight, tiles), ranges, stream, a);
}
