// Launchers of kernels/sm120_fp4_linear.cu and kernels/quantize_fp4_rows.cu: they check what can be checked from sizes
// and addresses, and choose instances.
#include <cstdint>

#include "dispatch/launch.h"
#include "dispatch/stream_plan.h"
#include "kernels/quantize_fp4_rows.h"
#include "kernels/sm120_fp4_linear.h"
#include "tersor_float.h"

namespace tersor {

Fp4LinearChooser* fp4_linear_choosers[2] = {};

namespace {

constexpr char kLinear[] = "fp4_linear", kRows[] = "quantize_fp4_rows";

int check_kind(int kind) {
  if (kind == kMxfp4 || kind == kNvfp4) return TERSOR_OK;
  return fail(TERSOR_INVALID, "%s: kind is %d; accepted: 0 MXFP4, 1 NVFP4", kLinear, kind);
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_block_rows(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx, int kind,
                                      const float* global, uint8_t* codes, uint8_t* scales, void* values,
                                      void* stream) {
  if (int status = check_stream(kRows, m, 1, k)) return status;
  if (kind < 0 || kind > 3) {
    return fail(TERSOR_INVALID, "%s: kind is %d; accepted: 0 MXFP4, 1 NVFP4, 2 MXFP8, 3 MXFP6", kRows, kind);
  }
  if (int status = check_rows(kRows, x, x_dtype, m, k, ldx, values, codes, scales, 8)) return status;
  if (m == 0) return TERSOR_OK;
  if (kind == kNvfp4 && !global) return fail(TERSOR_INVALID, "%s: global is absent", kRows);
  BlockRows a{};
  describe_rows(x, x_dtype, m, k, ldx, codes, values, &a);
  a.scales = scales;
  a.global = global;
  const int error = launch(block_rows_kernel(kind, x_dtype), dim3(static_cast<unsigned>(m)), dim3(kFp4RowThreads), 0,
                           static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "%s: the kernel did not start: CUDA error %d", kRows, error);
  return TERSOR_OK;
}

extern "C" int tersor_cuda_fp4_linear_plan(int64_t m, int64_t n, int64_t k, int kind, int multiprocessors,
                                           int64_t shared_memory_per_multiprocessor, int64_t* ranges,
                                           int64_t* partial_bytes, int64_t* counter_bytes) {
  if (int status = check_stream(kLinear, m, n, k)) return status;
  if (int status = check_kind(kind)) return status;
  plan_stream(m, n, k, fp4_stage_bytes(kind == kNvfp4, stream_token_tiles(m)), multiprocessors,
              shared_memory_per_multiprocessor, ranges, partial_bytes, counter_bytes);
  return TERSOR_OK;
}

extern "C" int tersor_cuda_fp4_linear(const uint8_t* x, const uint8_t* x_scales, const float* x_global, int64_t m,
                                      int64_t k, const uint8_t* codes, const uint8_t* scales, const float* global,
                                      int kind, const void* bias, int y_dtype, void* y, int64_t n, int64_t ldy,
                                      int64_t ranges, float* partials, uint32_t* counters, void* stream) {
  if (int status = check_stream(kLinear, m, n, k)) return status;
  if (int status = check_kind(kind)) return status;
  if (int status = check_half(kLinear, "y_dtype", y_dtype)) return status;
  if (m == 0 || n == 0) return TERSOR_OK;
  const bool nv = kind == kNvfp4;
  if (!x || !x_scales || !codes || !scales || (nv && (!global || !x_global))) {
    return fail(TERSOR_INVALID, "%s: x, codes, their scales or their global scales are absent", kLinear);
  }
  if (!is_aligned(x, 16) || !is_aligned(x_scales, 8)) {
    return fail(TERSOR_INVALID, "%s: x and x_scales are %p and %p; accepted: multiples of 16 and 8", kLinear, x,
                x_scales);
  }
  Fp4Arguments a{};
  if (int status = describe_stream(kLinear, bias, y, m, n, k, ldy, ranges, partials, counters, &a.rows)) return status;
  const int tiles = stream_token_tiles(m), stage_scales = nv ? 8 : 4;
  a.x = x;
  a.x_scales = x_scales;
  a.codes = codes;
  a.scales = scales;
  a.x_global = x_global;
  a.global = global;
  a.row_bytes = div_up(k, 2);
  a.padded = a.rows.stages * kStreamK;
  a.groups = static_cast<int>(div_up(k, nv ? 16 : 32));
  a.aligned = is_aligned(codes, 16) && a.row_bytes % 16 == 0;
  a.aligned_scales = is_aligned(scales, stage_scales) && a.groups % stage_scales == 0;
  Fp4LinearChooser* chooser = fp4_linear_choosers[kind];
  Fp4LinearKernel* kernel = chooser ? chooser(y_dtype == TERSOR_BFLOAT16, tiles) : nullptr;
  if (!kernel) return fail(TERSOR_INVALID, "%s: kind %d: not in this build", kLinear, kind);
  return launch_stream(kLinear, kernel, fp4_stage_bytes(nv, tiles), ranges, stream, a);
}
