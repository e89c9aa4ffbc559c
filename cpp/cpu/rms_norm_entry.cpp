// tersor_rms_norm: checks what can be checked from sizes, then hands over to the instruction set.
#include "common/status.h"
#include "cpu/isa.h"

using namespace tersor;

extern "C" int tersor_rms_norm(const void* x, const void* weight, void* y, int dtype, int64_t rows, int64_t k,
                               int64_t ldx, float epsilon, int threads) {
  if (dtype < 0 || dtype > 2) {
    return fail(TERSOR_INVALID, "dtype is %d; accepted: 0 float32, 1 bfloat16, 2 float16", dtype);
  }
  if (rows < 0 || k < 0) {
    return fail(TERSOR_INVALID, "rows is %lld and k is %lld; accepted: 0 or more", (long long)rows, (long long)k);
  }
  if (rows > 1 && ldx < k) {
    return fail(TERSOR_INVALID, "ldx is %lld; accepted: at least k = %lld", (long long)ldx, (long long)k);
  }
  if (threads < 1) return fail(TERSOR_INVALID, "threads is %d; accepted: 1 or more", threads);
  if (rows == 0 || k == 0) return TERSOR_OK;
  if (!x || !weight || !y) return fail(TERSOR_INVALID, "x, weight or y is absent");
  current_isa().rms_norm({x, weight, y, dtype, rows, k, ldx, epsilon, threads});
  return TERSOR_OK;
}
