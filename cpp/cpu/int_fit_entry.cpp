// tersor_int_fit: checks what can be checked from sizes, then hands over to the instruction set.
#include "common/status.h"
#include "cpu/int_layout.h"
#include "cpu/isa.h"

using namespace tersor;

extern "C" int tersor_int_fit(const float* w, int64_t n, int64_t k, int64_t ldw, const float* importance, int bits,
                              int64_t group_size, int symmetric, int steps, int scale_dtype, float* scales,
                              float* zero_points, int threads) {
  if (int status = check_int_arguments(n, k, bits, group_size, threads)) return status;
  if (n > 1 && ldw < k) {
    return fail(TERSOR_INVALID, "ldw is %lld; accepted: at least k = %lld", (long long)ldw, (long long)k);
  }
  if (steps < 1 || steps > 100) return fail(TERSOR_INVALID, "steps is %d; accepted: 1 to 100", steps);
  if (scale_dtype < 0 || scale_dtype > 2) {
    return fail(TERSOR_INVALID, "scale_dtype is %d; accepted: 0 float32, 1 bfloat16, 2 float16", scale_dtype);
  }
  if (n == 0) return TERSOR_OK;
  if (!w || !scales || !zero_points) return fail(TERSOR_INVALID, "w, scales or zero_points is absent");
  return current_isa().fit({w, n, k, ldw, importance, bits, group_size, symmetric != 0, steps, scale_dtype, scales,
                            zero_points, threads});
}
