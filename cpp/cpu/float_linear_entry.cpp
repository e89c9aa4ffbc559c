// tersor_float_linear and tersor_float_round: checks what can be checked from sizes, then hands
// over to the instruction set.
#include "common/float16.h"
#include "common/status.h"
#include "cpu/float_linear.h"
#include "cpu/float_round.h"
#include "cpu/input_steps.h"

using namespace tersor;

namespace {

constexpr int64_t kTokensAtOnce = 256;  // their floats of a chunk are a megabyte

using Linear = int (*)(const FloatLinearArgs&);
using Dequantize = int (*)(const FloatLinearArgs&, float*);
using Round = int (*)(const FloatRoundArgs&);

struct Functions {
  Linear linear;
  Dequantize dequantize;
  Round round;
};

Functions functions() {
  const IsaKernels* const isa = &current_isa();
#if defined(TERSOR_HAVE_AVX512)
  if (isa == &avx512::kernels) return {avx512::float_linear, avx512::float_dequantize, avx512::float_round};
#endif
#if defined(TERSOR_HAVE_AVX2)
  if (isa == &avx2::kernels) return {avx2::float_linear, avx2::float_dequantize, avx2::float_round};
#endif
#if defined(TERSOR_HAVE_AVX512_EMULATED)
  if (isa == &avx512_emulated::kernels) {
    return {avx512_emulated::float_linear, avx512_emulated::float_dequantize, avx512_emulated::float_round};
  }
#endif
  (void)isa;
  return {generic::float_linear, generic::float_dequantize, generic::float_round};
}

int check(const FloatLinearArgs& a) {
  if (a.n < 0 || a.k < 1 || a.m < 0 || a.threads < 1) {
    return fail(TERSOR_INVALID, "n, k, m, threads are %lld, %lld, %lld, %d; accepted: at least 0, 1, 0, 1",
                (long long)a.n, (long long)a.k, (long long)a.m, a.threads);
  }
  if (a.x_dtype < 0 || a.x_dtype > 2 || a.element < 0 || a.element > 2 || a.scale_kind < 0 || a.scale_kind > 4) {
    return fail(TERSOR_INVALID, "x's dtype, element, kind of scales are %d, %d, %d; accepted: up to 2, 2, 4", a.x_dtype,
                a.element, a.scale_kind);
  }
  if (a.group < 16 || (a.group % 16 && a.group < a.k) || a.scale_rows < 1) {
    return fail(TERSOR_INVALID, "group and rows of a scale are %lld and %lld; accepted: multiples of 16, at least 1",
                (long long)a.group, (long long)a.scale_rows);
  }
  return TERSOR_OK;
}

}  // namespace

extern "C" int tersor_float_linear(const FloatLinearArgs* arguments) {
  const FloatLinearArgs& a = *arguments;
  if (int status = check(a)) return status;
  if (a.m > 1 && (a.ldx < a.k || a.ldy < a.n)) {
    return fail(TERSOR_INVALID, "ldx and ldy are %lld and %lld; accepted: at least %lld and %lld", (long long)a.ldx,
                (long long)a.ldy, (long long)a.k, (long long)a.n);
  }
  if (a.m == 0 || a.n == 0) return TERSOR_OK;
  if (!a.x || !a.codes || !a.scales || !a.y) return fail(TERSOR_INVALID, "x, codes, scales or y is absent");
  const Linear linear = functions().linear;
  const int64_t parts = (a.m + kTokensAtOnce - 1) / kTokensAtOnce;  // alike: a few tokens are summed in another order
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t row = a.m * i / parts;
    FloatLinearArgs part = a;
    part.m = a.m * (i + 1) / parts - row;
    part.x = static_cast<const char*>(a.x) + row * a.ldx * dtype_size(a.x_dtype);
    part.y = static_cast<char*>(a.y) + row * a.ldy * dtype_size(a.x_dtype);
    if (int status = linear(part)) return status;
  }
  return TERSOR_OK;
}

extern "C" int tersor_float_dequantize(const FloatLinearArgs* arguments, float* out) {
  if (int status = check(*arguments)) return status;
  if (arguments->n == 0) return TERSOR_OK;
  if (!arguments->codes || !arguments->scales || !out) return fail(TERSOR_INVALID, "codes, scales or out is absent");
  return functions().dequantize(*arguments, out);
}

extern "C" int tersor_float_round(const FloatRoundArgs* arguments) {
  const FloatRoundArgs& a = *arguments;
  if (a.rows < 0 || a.k < 0 || a.threads < 1 || (a.rows > 1 && a.ldx < a.k)) {
    return fail(TERSOR_INVALID, "rows, k, ldx, threads are %lld, %lld, %lld, %d; accepted: at least 0, 0, k, 1",
                (long long)a.rows, (long long)a.k, (long long)a.ldx, a.threads);
  }
  if (a.dtype < 0 || a.dtype > 2 || a.element < 0 || a.element > 2 || a.scale < 0 || a.scale > 3) {
    return fail(TERSOR_INVALID, "dtype, element, kind of scale are %d, %d, %d; accepted: up to 2, 2, 3", a.dtype,
                a.element, a.scale);
  }
  if (a.group < 16 || (a.group % 16 && a.group < a.k)) {
    return fail(TERSOR_INVALID, "group is %lld; accepted: a multiple of 16, or k and more", (long long)a.group);
  }
  if (a.rows == 0 || a.k == 0) return TERSOR_OK;
  if (!a.x || !a.y) return fail(TERSOR_INVALID, "x or y is absent");
  if (a.steps) {
    if (int status = check_steps(*a.steps, a.k)) return status;
    if (a.steps->other && a.rows > 1 && a.steps->ldother < a.k) {
      return fail(TERSOR_INVALID, "ldother is %lld; accepted: at least k = %lld", (long long)a.steps->ldother,
                  (long long)a.k);
    }
  }
  return functions().round(a);
}
