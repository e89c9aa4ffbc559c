// Launchers of kernels/sm89_fp8_linear.cu and kernels/quantize_fp8_rows.cu: they check what can be checked from sizes
// and addresses, and choose instances.
#include <cstdint>

#include "dispatch/launch.h"
#include "dispatch/stream_plan.h"
#include "kernels/quantize_fp8_rows.h"
#include "kernels/sm89_fp8_linear.h"
#include "tersor_float.h"

namespace tersor {

Fp8LinearChooser* fp8_linear_choosers[2] = {};

namespace {

constexpr char kLinear[] = "fp8_linear", kRows[] = "quantize_fp8_rows";

int check_weight(int weight, int scale_dtype, int64_t k, int64_t group) {
  const bool bytes = weight == kFp8Int4 && scale_dtype == kFp8ScaleE4m3;
  if (weight < 0 || weight > 1 || ((scale_dtype < 0 || scale_dtype > 2) && !bytes)) {
    return fail(TERSOR_INVALID, "%s: weight and dtype of scales are %d and %d; accepted: 0 int4, 1 e4m3; 0 to 2, int4 "
                "also 4", kLinear, weight, scale_dtype);
  }
  const int64_t unit = weight == kFp8Int4 ? kBlockK : kStreamK;
  if (group < 0 || (weight == kFp8E4m3 && group == 0) || (group > 0 && group < k && group % unit != 0)) {
    return fail(TERSOR_INVALID, "%s: group is %lld; accepted: multiples of %lld, or all of k", kLinear,
                (long long)group, (long long)unit);
  }
  return TERSOR_OK;
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_fp8_rows(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx, const float* top,
                                    int64_t groups, int interleaved, uint8_t* codes, float* scales, void* values,
                                    void* stream) {
  if (int status = check_stream(kRows, m, 1, k)) return status;
  const int64_t padded = div_up(k, kStreamK) * kStreamK;
  if ((groups != 1 && groups != padded / kFp8Group) || (top && groups != 1)) {
    return fail(TERSOR_INVALID, "%s: groups is %lld; accepted: 1, or without a shared magnitude %lld", kRows,
                (long long)groups, (long long)(padded / kFp8Group));
  }
  if (int status = check_rows(kRows, x, x_dtype, m, k, ldx, values, codes, scales, 16)) return status;
  if (m == 0) return TERSOR_OK;
  Fp8Rows a{};
  describe_rows(x, x_dtype, m, k, ldx, codes, values, &a);
  a.scales = values ? nullptr : scales;
  a.top = top;
  a.groups = static_cast<int>(groups);
  a.interleaved = interleaved;
  const int error = launch(fp8_rows_kernel(x_dtype), dim3(static_cast<unsigned>(m)), dim3(kFp8RowThreads), 16,
                           static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "%s: the kernel did not start: CUDA error %d", kRows, error);
  return TERSOR_OK;
}

extern "C" int tersor_cuda_fp8_linear_plan(int64_t m, int64_t n, int64_t k, int weight, int multiprocessors,
                                           int64_t shared_memory_per_multiprocessor, int64_t* ranges,
                                           int64_t* partial_bytes, int64_t* counter_bytes) {
  if (int status = check_stream(kLinear, m, n, k)) return status;
  if (int status = check_weight(weight, 0, k, k)) return status;
  plan_stream(m, n, k, fp8_stage_bytes(weight, stream_token_tiles(m)), multiprocessors,
              shared_memory_per_multiprocessor, ranges, partial_bytes, counter_bytes);
  return TERSOR_OK;
}

extern "C" int tersor_cuda_fp8_linear(const uint8_t* x, const float* x_scales, int64_t x_groups, int64_t m, int64_t k,
                                      const uint8_t* codes, int weight, const void* scales, int scale_dtype,
                                      const float* scale_multiplier, int64_t scale_rows, int64_t group,
                                      const void* bias, int y_dtype, void* y, int64_t n, int64_t ldy, int64_t ranges,
                                      float* partials, uint32_t* counters, void* stream) {
  if (int status = check_stream(kLinear, m, n, k)) return status;
  if (int status = check_weight(weight, scale_dtype, k, group)) return status;
  const int64_t stages = div_up(k, kStreamK);
  if (int status = check_half(kLinear, "y_dtype", y_dtype)) return status;
  if ((x_groups != 1 && x_groups != stages) || scale_rows < 1 || scale_rows > INT32_MAX) {
    return fail(TERSOR_INVALID, "%s: x_groups and scale_rows are %lld and %lld; accepted: 1 or %lld, 1 to 2^31 - 1",
                kLinear, (long long)x_groups, (long long)scale_rows, (long long)stages);
  }
  if (m == 0 || n == 0) return TERSOR_OK;
  if (!x || !x_scales || !codes || !scales || !is_aligned(x, 16) || (weight == kFp8Int4 && !is_aligned(codes, 16))) {
    return fail(TERSOR_INVALID, "%s: x, x_scales, codes or scales is absent, or x or int4 codes no multiple of 16",
                kLinear);
  }
  if (scale_dtype == kFp8ScaleE4m3 && !scale_multiplier) {
    return fail(TERSOR_INVALID, "%s: scale_multiplier is absent; accepted with scales that are e4m3: one number",
                kLinear);
  }
  Fp8Arguments a{};
  if (int status = describe_stream(kLinear, bias, y, m, n, k, ldy, ranges, partials, counters, &a.rows)) return status;
  const int tiles = stream_token_tiles(m);
  const bool whole = group == 0 || group >= k;
  a.x = x;
  a.x_scales = x_scales;
  a.codes = codes;
  a.scales = scales;
  a.scale_multiplier = scale_multiplier;
  a.k = static_cast<int>(k);
  a.padded = static_cast<int>(stages * kStreamK);
  a.x_groups = static_cast<int>(x_groups);
  a.tiles = static_cast<int>(div_up(n, kTileRows));
  a.blocks = static_cast<int>(div_up(k, kBlockK));
  a.groups = whole ? 1 : static_cast<int>(div_up(k, group));
  a.group_blocks = whole ? a.blocks : static_cast<int>(group / kBlockK);
  a.scale_dtype = scale_dtype;
  a.scale_rows = static_cast<int>(scale_rows);
  a.aligned = is_aligned(codes, 16) && k % 16 == 0;
  Fp8LinearChooser* chooser = fp8_linear_choosers[weight];
  Fp8LinearKernel* kernel = chooser ? chooser(y_dtype == TERSOR_BFLOAT16, tiles) : nullptr;
  if (!kernel) return fail(TERSOR_INVALID, "%s: weights of kind %d: not in this build", kLinear, weight);
  return launch_stream(kLinear, kernel, fp8_stage_bytes(weight, tiles), ranges, stream, a);
}
