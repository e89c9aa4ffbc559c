// Launcher of kernels/sm120_mx_linear.cu: checks what can be checked from sizes and addresses, chooses the instance.
#include <cstdint>

#include "dispatch/stream_plan.h"
#include "kernels/sm120_mx_linear.h"
#include "tersor_float.h"

namespace tersor {

MxLinearChooser* mx_linear_choosers[6] = {};

namespace {

constexpr char kOp[] = "mx_linear";

int check_elements(int weight, int input) {
  if (weight >= ptx::kMxE4m3 && weight <= ptx::kMxE2m1 && input >= ptx::kMxE4m3 && input <= ptx::kMxE2m3) {
    return TERSOR_OK;
  }
  return fail(TERSOR_INVALID, "%s: weight and input are %d and %d; accepted: 0 e4m3, 1 e2m3, 2 e2m1 (weights alone)",
              kOp, weight, input);
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_mx_linear_plan(int64_t m, int64_t n, int64_t k, int weight, int multiprocessors,
                                          int64_t shared_memory_per_multiprocessor, int64_t* ranges,
                                          int64_t* partial_bytes, int64_t* counter_bytes) {
  if (int status = check_stream(kOp, m, n, k)) return status;
  if (int status = check_elements(weight, 0)) return status;
  plan_stream(m, n, k, mx_stage_bytes(weight, stream_token_tiles(m)), multiprocessors,
              shared_memory_per_multiprocessor, ranges, partial_bytes, counter_bytes);
  return TERSOR_OK;
}

extern "C" int tersor_cuda_mx_linear(const uint8_t* x, const uint8_t* x_scales, int input, int64_t m, int64_t k,
                                     const uint8_t* codes, int weight, const uint8_t* scales, const void* bias,
                                     int y_dtype, void* y, int64_t n, int64_t ldy, int64_t ranges, float* partials,
                                     uint32_t* counters, void* stream) {
  if (int status = check_stream(kOp, m, n, k)) return status;
  if (int status = check_elements(weight, input)) return status;
  if (int status = check_half(kOp, "y_dtype", y_dtype)) return status;
  if (m == 0 || n == 0) return TERSOR_OK;
  if (!x || !x_scales || !codes || !scales) {
    return fail(TERSOR_INVALID, "%s: x, codes or their scales are absent", kOp);
  }
  if (!is_aligned(x, 16) || !is_aligned(x_scales, 4)) {
    return fail(TERSOR_INVALID, "%s: x and x_scales are %p and %p; accepted: multiples of 16 and 4", kOp, x, x_scales);
  }
  MxArguments a{};
  if (int status = describe_stream(kOp, bias, y, m, n, k, ldy, ranges, partials, counters, &a.rows)) return status;
  const int tiles = stream_token_tiles(m), bits = weight == ptx::kMxE4m3 ? 8 : weight == ptx::kMxE2m3 ? 6 : 4;
  a.x = x;
  a.x_scales = x_scales;
  a.codes = codes;
  a.scales = scales;
  a.row_bytes = div_up(k * bits, 8);
  a.groups = static_cast<int>(div_up(k, 32));
  a.aligned = is_aligned(codes, 16) && a.row_bytes % 16 == 0;
  a.aligned_scales = is_aligned(scales, 4) && a.groups % 4 == 0;
  MxLinearChooser* chooser = mx_linear_choosers[weight + 3 * input];
  MxLinearKernel* kernel = chooser ? chooser(y_dtype == TERSOR_BFLOAT16, tiles) : nullptr;
  if (!kernel) return fail(TERSOR_INVALID, "%s: weight %d, input %d: not in this build", kOp, weight, input);
  return launch_stream(kOp, kernel, mx_stage_bytes(weight, tiles), ranges, stream, a);
}
