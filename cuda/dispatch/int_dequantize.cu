// Launcher of kernels/int_dequantize.cu.
#include <cstdint>

#include "common/status.h"
#include "cpu/int_layout.h"
#include "dispatch/launch.h"
#include "kernels/int_dequantize.h"
#include "tersor.h"

namespace tersor {

IntDequantizeKernel* int_dequantize_kernels[9] = {};

}  // namespace tersor

using namespace tersor;

extern "C" int tersor_cuda_int_dequantize(const uint8_t* qweight, const void* scales, int scale_dtype,
                                          const uint8_t* zero_points, int64_t n, int64_t k, int bits,
                                          int64_t group_size, void* out, int out_dtype, void* stream) {
  if (int status = check_int_arguments(n, k, bits, group_size, 1)) return status;
  if (n > int64_t(1) << 30 || k > int64_t(1) << 23) {
    return fail(TERSOR_INVALID, "n, k are %lld, %lld; accepted on CUDA: up to 2^30 and 2^23", (long long)n,
                (long long)k);
  }
  if (scale_dtype < 0 || scale_dtype > 2 || out_dtype < 0 || out_dtype > 2) {
    return fail(TERSOR_INVALID, "dtype codes are %d (scales) and %d (out); accepted: 0 float32, 1 bfloat16, 2 float16",
                scale_dtype, out_dtype);
  }
  if (n == 0) return TERSOR_OK;
  if (!qweight || !scales || !out) {
    return fail(TERSOR_INVALID, "%s is absent", !qweight ? "qweight" : !scales ? "scales" : "out");
  }
  const uintptr_t stored = reinterpret_cast<uintptr_t>(qweight) | reinterpret_cast<uintptr_t>(scales) |
                           reinterpret_cast<uintptr_t>(zero_points);
  if (stored % 16 != 0) {
    return fail(TERSOR_INVALID, "qweight, scales, zero_points: accepted are 16-byte aligned addresses");
  }
  if (!int_dequantize_kernels[bits]) return fail(TERSOR_INVALID, "bits %d: not in this build", bits);

  const IntShape shape = int_shape(n, k, bits, group_size);
  IntDequantizeArguments a{};
  a.qweight = qweight;
  a.scales = scales;
  a.zero_points = zero_points;
  a.out = out;
  a.n = static_cast<int>(n);
  a.k = static_cast<int>(k);
  a.blocks = static_cast<int>(shape.blocks);
  a.groups = static_cast<int>(shape.groups);
  a.group_blocks = static_cast<int>(shape.group_blocks);
  a.scale_dtype = scale_dtype;
  a.out_dtype = out_dtype;
  a.wide_stores = reinterpret_cast<uintptr_t>(out) % 16 == 0 && k % 8 == 0;
  const int64_t warps = kIntDequantizeThreads / 32;
  const dim3 grid(static_cast<unsigned>(shape.tiles), static_cast<unsigned>(div_up(div_up(shape.blocks, 2), warps)));
  const int error = launch(int_dequantize_kernels[bits], grid, dim3(kIntDequantizeThreads), 0,
                           static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "int_dequantize: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}
