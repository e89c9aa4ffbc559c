// tersor_int_linear: checks what can be checked from sizes, then hands over to the instruction set.
#include <vector>

#include "common/status.h"
#include "cpu/int_layout.h"
#include "cpu/isa.h"

using namespace tersor;

extern "C" int tersor_int_linear(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx,
                                 const tersor_projection* projections, int count, int scale_dtype, int bits,
                                 int64_t group_size, int act_bits, int threads) {
  if (int status = check_int_arguments(0, k, bits, group_size, threads)) return status;
  if (x_dtype < 0 || x_dtype > 2 || scale_dtype < 0 || scale_dtype > 2) {
    return fail(TERSOR_INVALID, "dtype codes are %d (x) and %d (scales); accepted: 0 float32, 1 bfloat16, 2 float16",
                x_dtype, scale_dtype);
  }
  if (m < 0) return fail(TERSOR_INVALID, "m is %lld; accepted: 0 or more", (long long)m);
  if (m > 1 && ldx < k) {
    return fail(TERSOR_INVALID, "ldx is %lld; accepted: at least k = %lld", (long long)ldx, (long long)k);
  }
  if (act_bits != 16 && act_bits != 8) {
    return fail(TERSOR_INVALID, "act_bits is %d; accepted: 16 (exact) or 8 (dynamic int8)", act_bits);
  }
  if (count < 0) return fail(TERSOR_INVALID, "the number of projections is %d; accepted: 0 or more", count);
  std::vector<tersor_projection> used;
  used.reserve(count);
  for (int i = 0; i < count; ++i) {
    const tersor_projection& p = projections[i];
    if (int status = check_int_arguments(p.n, k, bits, group_size, threads)) return status;
    if (m == 0 || p.n == 0) continue;
    if (m > 1 && p.ldy < p.n) {
      return fail(TERSOR_INVALID, "ldy is %lld; accepted: at least n = %lld", (long long)p.ldy, (long long)p.n);
    }
    if (!p.qweight || !p.scales || !p.y) {
      return fail(TERSOR_INVALID, "projection %d: %s is absent", i,
                  !p.qweight ? "qweight" : !p.scales ? "scales" : "y");
    }
    used.push_back(p);
  }
  if (used.empty()) return TERSOR_OK;
  if (!x) return fail(TERSOR_INVALID, "x is absent");

  const IsaKernels& isa = current_isa();
  const IntLinearFunction kernel = act_bits == 16 ? isa.exact : isa.a8;
  if (!kernel) return fail(TERSOR_INVALID, "act_bits 8 has no kernel for %s in this build; accepted: 16", isa.name);
  return kernel({x, x_dtype, m, k, ldx, used.data(), static_cast<int>(used.size()), scale_dtype, bits, group_size,
                 threads});
}
