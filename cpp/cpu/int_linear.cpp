// tersor_int_linear: checks what can be checked from sizes, then hands over to the instruction set.
#include <cstring>
#include <vector>

#include "common/float16.h"
#include "common/status.h"
#include "cpu/input_steps.h"
#include "cpu/int_scales.h"
#include "cpu/isa.h"

using namespace tersor;

namespace {

// The first field that is out of range, in words.
int check_input(const tersor_input& in, int64_t k) {
  if (in.bits != 16 && in.bits != 8 && in.bits != 6 && in.bits != 4) {
    return fail(TERSOR_INVALID, "act_bits is %lld; accepted: 16 (exact), 8, 6 or 4", (long long)in.bits);
  }
  const bool steps = in.norm_weight || in.other || in.index || in.signs || in.left || in.right || in.butterflies;
  if (in.bits == 16) {
    if (steps) return fail(TERSOR_INVALID, "act_bits is 16 with steps before it; accepted: 8, 6 or 4");
    return TERSOR_OK;
  }
  if (in.group < 0 || in.group % kBlockK) {
    return fail(TERSOR_INVALID, "act_group is %lld; accepted: a multiple of 32, or 0 for one scale per row",
                (long long)in.group);
  }
  if (!(in.clip > 0 && in.clip <= 1)) {
    return fail(TERSOR_INVALID, "act_clip is %g; accepted: above 0 up to 1", static_cast<double>(in.clip));
  }
  if (in.asymmetric && (in.scales || in.block_bits)) {
    return fail(TERSOR_INVALID, "input scales or bits of blocks without symmetry; accepted: symmetric codes");
  }
  if (in.block_bits && in.group != 32 && in.group != 64 && in.group != 128) {
    return fail(TERSOR_INVALID, "act_group is %lld with bits of blocks; accepted: 32, 64 and 128", (long long)in.group);
  }
  for (int64_t i = 0; in.block_bits && i < div_up(k, 128); ++i) {
    if (in.block_bits[i] != 4 && in.block_bits[i] != 8) {
      return fail(TERSOR_INVALID, "block_bits[%lld] is %d; accepted: 4 and 8", (long long)i, in.block_bits[i]);
    }
  }
  return check_steps(in, k);
}

}  // namespace

extern "C" int tersor_int_linear(const void* x, int x_dtype, int64_t m, int64_t k, int64_t ldx,
                                 const tersor_projection* projections, int count, int scale_dtype, int bits,
                                 int64_t group_size, const tersor_input* input, int threads) {
  if (int status = check_int_arguments(0, k, bits, group_size, threads)) return status;
  if (x_dtype < 0 || x_dtype > 2 || scale_dtype < 0 || scale_dtype > kTwoLevelScales) {
    return fail(TERSOR_INVALID,
                "dtype codes are %d (x) and %d (scales); accepted: 0 float32, 1 bfloat16, 2 float16; 3 two levels of "
                "scales",
                x_dtype, scale_dtype);
  }
  if (m < 0) return fail(TERSOR_INVALID, "m is %lld; accepted: 0 or more", (long long)m);
  if (m > 1 && ldx < k) {
    return fail(TERSOR_INVALID, "ldx is %lld; accepted: at least k = %lld", (long long)ldx, (long long)k);
  }
  if (int status = check_input(*input, k)) return status;
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
  const IntLinearFunction kernel = input->bits == 16 ? isa.exact : isa.a8;
  if (!kernel) {
    return fail(TERSOR_INVALID, "act_bits %lld has no kernel for %s in this build; accepted: 16",
                (long long)input->bits, isa.name);
  }
  return kernel({x, x_dtype, m, k, ldx, used.data(), static_cast<int>(used.size()), scale_dtype, bits, group_size,
                 threads, input});
}

extern "C" int tersor_int_linear_grouped(const void* x, int x_dtype, int64_t rows, int64_t k, int64_t ldx,
                                         const int32_t* ends, int64_t experts, const tersor_projection* weights,
                                         int scale_dtype, int bits, int64_t group_size, const tersor_input* input,
                                         int threads) {
  const int64_t n = weights->n;
  if (int status = check_int_arguments(n, k, bits, group_size, threads)) return status;
  if (x_dtype < 0 || x_dtype > 2 || scale_dtype < 0 || scale_dtype > kTwoLevelScales) {
    return fail(TERSOR_INVALID,
                "dtype codes are %d (x) and %d (scales); accepted: 0 float32, 1 bfloat16, 2 float16; 3 two levels of "
                "scales",
                x_dtype, scale_dtype);
  }
  if (rows < 0 || experts < 0 || (rows > 1 && (ldx < k || weights->ldy < n))) {
    return fail(TERSOR_INVALID,
                "rows, experts, ldx, ldy are %lld, %lld, %lld, %lld; accepted: 0 or more, at least k and n",
                (long long)rows, (long long)experts, (long long)ldx, (long long)weights->ldy);
  }
  if (rows == 0 || n == 0) return TERSOR_OK;
  if (!x || !ends || !weights->qweight || !weights->scales || !weights->y) {
    return fail(TERSOR_INVALID, "x, ends, qweight, scales or y is absent");
  }
  // All are looked at before anything is written.
  for (int64_t e = 0, last = 0; e < experts; last = ends[e++]) {
    if (ends[e] < last || ends[e] > rows) {
      return fail(TERSOR_INVALID, "ends[%lld] is %d after %lld; accepted: ascending, up to %lld rows", (long long)e,
                  ends[e], (long long)last, (long long)rows);
    }
  }
  const IntShape shape = int_shape(n, k, bits, group_size);
  const int64_t size = dtype_size(x_dtype), entries = shape.tiles * shape.groups * kTileRows;
  tersor_input taken = *input;
  if (int status = check_input(taken, k)) return status;
  const int64_t input_groups = taken.group ? div_up(k, taken.group) : 1;
  int64_t begin = 0;
  for (int64_t e = 0; e < experts; begin = ends[e++]) {
    if (ends[e] == begin) continue;
    tersor_projection p = *weights;
    p.qweight += e * shape.tiles * shape.tile_bytes();
    p.scales = static_cast<const char*>(p.scales) + e * shape.tiles * scale_tile_bytes(scale_dtype, shape.groups);
    if (p.zero_points) p.zero_points += e * entries;
    if (p.bias) p.bias = static_cast<const char*>(p.bias) + e * n * size;
    p.y = static_cast<char*>(p.y) + begin * p.ldy * size;
    if (input->scales) taken.scales = input->scales + e * input_groups;
    if (int status = tersor_int_linear(static_cast<const char*>(x) + begin * ldx * size, x_dtype, ends[e] - begin, k,
                                       ldx, &p, 1, scale_dtype, bits, group_size, &taken, threads)) {
      return status;
    }
  }
  for (int64_t row = begin; row < rows; ++row) {
    std::memset(static_cast<char*>(weights->y) + row * weights->ldy * size, 0, n * size);
  }
  return TERSOR_OK;
}
