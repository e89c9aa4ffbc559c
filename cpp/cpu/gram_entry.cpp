// tersor_gram: checks what can be checked from sizes, then hands over to the instruction set.
#include "common/status.h"
#include "cpu/isa.h"

using namespace tersor;

extern "C" int tersor_gram(const void* x, int x_dtype, int64_t tokens, int64_t k, int64_t ldx, float* gram,
                           int threads) {
  if (x_dtype < 0 || x_dtype > 2) {
    return fail(TERSOR_INVALID, "x_dtype is %d; accepted: 0 float32, 1 bfloat16, 2 float16", x_dtype);
  }
  if (tokens < 0 || k < 0 || k > 1 << 24) {
    return fail(TERSOR_INVALID, "tokens is %lld and k is %lld; accepted: 0 or more, k to 2^24", (long long)tokens,
                (long long)k);
  }
  if (tokens > 1 && ldx < k) {
    return fail(TERSOR_INVALID, "ldx is %lld; accepted: at least k = %lld", (long long)ldx, (long long)k);
  }
  if (threads < 1) return fail(TERSOR_INVALID, "threads is %d; accepted: 1 or more", threads);
  if (tokens == 0 || k == 0) return TERSOR_OK;
  if (!x || !gram) return fail(TERSOR_INVALID, "x or gram is absent");
  return current_isa().gram({x, x_dtype, tokens, k, ldx, gram, threads});
}
