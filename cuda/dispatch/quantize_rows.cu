// Launcher of kernels/quantize_rows.cu, producer_rows.cu and producer_products.cu.
#include <cstdint>

#include "common/status.h"
#include "dispatch/launch.h"
#include "kernels/quantize_rows.h"
#include "tersor.h"
#include "tersor_rows.h"
#include "tile/act_codes.h"

namespace tersor {

QuantizeRowsKernel *quantize_rows_kernel = nullptr, *producer_rows_kernel = nullptr;
QuantizeRowsKernel* producer_products_kernels[2] = {};

namespace {

constexpr int64_t kMostWidth = 1 << 24;  // channels

bool transforms(const tersor_cuda_rows& r) { return r.index || r.signs || r.left || r.right || r.butterflies > 1; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int64_t group_sums_of(int64_t k, int64_t group) {
  const int64_t all = act_padded(k) / kActSumK;
  return group == 0 || group / kActSumK > all ? all : group / kActSumK;
}
int64_t groups_of(int64_t k, int64_t group) { return group ? div_up(k, group) : 1; }

// Lines in shared memory and their bytes.
struct Lines {
  int64_t count, bytes;
};
Lines lines_of(const tersor_cuda_rows& r) {
  if (!transforms(r)) return {0, 0};
  if (!r.left) return {1, 4 * act_padded(r.k)};
  return {r.k / (r.rows * r.columns) * div_up(r.rows, 16) * 16, 4 * div_up(r.columns, 16) * 16 + 16};
}

int64_t shared_bytes(const tersor_cuda_rows& r, const tersor_cuda_codes& c) {
  const Lines lines = lines_of(r);
  return lines.count * lines.bytes + quantize_scratch_bytes(act_padded(r.k) / kActBlockK, groups_of(r.k, c.group),
                                                            static_cast<int>(group_sums_of(r.k, c.group)),
                                                            c.width == 0);
}

int check_steps(const tersor_cuda_rows& r) {
  const bool hadamard = r.butterflies > 1 || r.signs || (r.left && !r.right);
  if ((r.index != nullptr) + hadamard + (r.right != nullptr) > 1 || (r.right && !r.left)) {
    return fail(TERSOR_INVALID,
                "index, butterflies, right are several, or right without left; accepted is one of them");
  }
  if (r.norm_weight && r.other) return fail(TERSOR_INVALID, "norm_weight and other are there; accepted is one of them");
  if (r.butterflies < 1 || (r.butterflies & (r.butterflies - 1)) != 0) {
    return fail(TERSOR_INVALID, "butterflies is %lld; accepted are powers of two", (long long)r.butterflies);
  }
  // left alone: whole chunks of 8 channels a line
  const bool mixes_heads = r.left && r.butterflies == 1 && r.columns % 8 == 0;
  if (r.rows < 1 || r.columns < 1 || r.k % (r.rows * r.columns) != 0 || (!r.left && r.rows != 1) ||
      (!r.right && r.columns != r.butterflies && !mixes_heads)) {
    return fail(TERSOR_INVALID, "rows, columns are %lld, %lld; accepted are those whose product divides k = %lld; columns are those of right, "
                "or butterflies, or for left alone a multiple of 8",
                (long long)r.rows, (long long)r.columns, (long long)r.k);
  }
  if ((r.left && r.rows > kMostFactor) || (r.right && r.columns > kMostFactor)) {
    return fail(TERSOR_INVALID, "products with matrices of %lld and %lld; accepted are sizes up to %lld on CUDA",
                (long long)r.rows, (long long)r.columns, (long long)kMostFactor);
  }
  if (r.left && r.left_parts != 1 && r.left_parts != 2) {
    return fail(TERSOR_INVALID, "left_parts is %lld; accepted are 1 and 2", (long long)r.left_parts);
  }
  if (!aligned(r.norm_weight) || !aligned(r.index) || !aligned(r.signs) || !aligned(r.left) || !aligned(r.right)) {
    return fail(TERSOR_INVALID, "norm_weight, index, signs, left, right: accepted are 16-byte aligned addresses");
  }
  return TERSOR_OK;
}

int check_codes(const tersor_cuda_rows& r, const tersor_cuda_codes& c, float clip) {
  if (c.bits != 4 && c.bits != 6 && c.bits != 8) {
    return fail(TERSOR_INVALID, "bits is %lld; accepted: 4, 6, 8", (long long)c.bits);
  }
  if (c.group < 0 || c.group % kActSumK != 0) {
    return fail(TERSOR_INVALID, "group is %lld; accepted are multiples of 32, and 0 for a whole row",
                (long long)c.group);
  }
  if (!(clip > 0 && clip <= 1)) return fail(TERSOR_INVALID, "clip is %g; accepted: above 0 up to 1", clip);
  if (c.block_bits && ((c.group != 32 && c.group != 64 && c.group != 128) || c.asymmetric || c.static_scales)) {
    return fail(TERSOR_INVALID, "block_bits with groups of %lld; accepted are dynamic symmetric ones of 32, 64 or 128",
                (long long)c.group);
  }
  const bool fits = c.width == 8 || (c.width == 0 && c.block_bits) ||
                    (c.width == 4 && c.bits == 4 && !c.asymmetric && !c.block_bits);
  if (!fits) {
    return fail(TERSOR_INVALID,
                "width is %lld for %lld bits; accepted: 8, 4 for symmetric codes of 4 bits, 0 for mixed",
                (long long)c.width, (long long)c.bits);
  }
  if (c.asymmetric && c.static_scales) {
    return fail(TERSOR_INVALID, "static_scales with asymmetric codes; accepted are symmetric ones");
  }
  if ((c.asymmetric && c.bits == 8) != (c.zero_points != nullptr)) {
    return fail(TERSOR_INVALID, "zero_points: accepted with asymmetric codes of 8 bits, and there required");
  }
  const int64_t least = c.width == 0 ? act_padded(r.k) / 2 : act_row_bytes(r.k, static_cast<int>(c.width));
  if (c.row_bytes % 16 != 0 || c.row_bytes < least || !aligned(c.codes)) {
    return fail(TERSOR_INVALID, "row_bytes is %lld; accepted are multiples of 16 from %lld, at aligned codes",
                (long long)c.row_bytes, (long long)least);
  }
  return TERSOR_OK;
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int64_t tersor_cuda_round_rows_shared(const tersor_cuda_rows* rows, const tersor_cuda_codes* codes) {
  return check_steps(*rows) == TERSOR_OK ? shared_bytes(*rows, *codes) : -1;
}

extern "C" int tersor_cuda_round_rows(const tersor_cuda_rows* rows, const tersor_cuda_codes* codes, float clip,
                                      float epsilon, float factor, int64_t most_shared, void* stream) {
  const tersor_cuda_rows& r = *rows;
  const tersor_cuda_codes& c = *codes;
  if (r.dtype < 0 || r.dtype > 2) {
    return fail(TERSOR_INVALID, "dtype is %lld; accepted: 0 float32, 1 bfloat16, 2 float16", (long long)r.dtype);
  }
  if (r.m < 0 || r.m >= int64_t(1) << 31 || r.k < 1 || r.k > kMostWidth || r.ldx < (r.m > 1 ? r.k : 0)) {
    return fail(TERSOR_INVALID, "m, k, ldx are %lld, %lld, %lld; accepted: m below 2^31, k from 1 to 2^24, ldx from k",
                (long long)r.m, (long long)r.k, (long long)r.ldx);
  }
  if (int status = check_steps(r)) return status;
  if (int status = check_codes(r, c, clip)) return status;
  const int64_t shared = shared_bytes(r, c);
  if (shared > most_shared) {
    return fail(TERSOR_INVALID, "a row of %lld channels takes %lld bytes of shared memory; accepted are up to %lld",
                (long long)r.k, (long long)shared, (long long)most_shared);
  }
  if (r.m == 0) return TERSOR_OK;
  if (!r.x || !c.codes || !c.scales) {
    return fail(TERSOR_INVALID, "%s is absent", !r.x ? "x" : !c.codes ? "codes" : "scales");
  }

  const int size = r.dtype == 0 ? 4 : 2;
  const Lines lines = lines_of(r);
  QuantizeRowsArguments a{};
  a.x = r.x;
  a.other = r.other;
  a.norm_weight = r.norm_weight;
  a.static_scales = c.static_scales;
  a.block_bits = c.block_bits;
  a.index = r.index;
  a.signs = r.signs;
  a.left = r.left;
  a.right = r.right;
  a.codes = c.codes;
  a.scales = c.scales;
  a.sums = c.sums;
  a.zero_points = c.zero_points;
  a.ldx = r.ldx;
  a.ldother = r.ldother;
  a.row_bytes = c.row_bytes;
  a.k = static_cast<int>(r.k);
  a.blocks = static_cast<int>(act_padded(r.k) / kActBlockK);
  a.groups = static_cast<int>(groups_of(r.k, c.group));
  a.group_sums = static_cast<int>(group_sums_of(r.k, c.group));
  a.dtype = static_cast<int>(r.dtype);
  a.bits = static_cast<int>(c.bits);
  a.width = static_cast<int>(c.width);
  a.asymmetric = c.asymmetric != 0;
  a.wide = aligned(r.x) && (r.m == 1 || r.ldx * size % 16 == 0) &&
           (!r.other || (aligned(r.other) && (r.m == 1 || r.ldother * size % 16 == 0)));
  a.clip = clip;
  a.epsilon = epsilon;
  a.rows = static_cast<int>(r.rows);
  a.columns = static_cast<int>(r.left ? r.columns : act_padded(r.k));  // without products a row is one line
  a.lines = static_cast<int>(lines.count);
  a.line_bytes = static_cast<int>(lines.bytes);
  a.left_parts = static_cast<int>(r.left_parts);
  a.butterflies = static_cast<int>(r.butterflies);
  a.factor = factor;
  const bool large = r.rows > 128 || (r.right && r.columns > 128);
  QuantizeRowsKernel* const kernel = !transforms(r) ? quantize_rows_kernel
                                     : r.left       ? producer_products_kernels[large]
                                                    : producer_rows_kernel;
  if (!kernel) return fail(TERSOR_INVALID, "the kernel for these steps is not in this build");
  const int error = launch(kernel, dim3(static_cast<unsigned>(r.m)), dim3(kQuantizeThreads),
                           static_cast<size_t>(shared), static_cast<cudaStream_t>(stream), a);
  if (error) return fail(TERSOR_CUDA_ERROR, "quantize_rows: the kernel did not start: CUDA error %d", error);
  return TERSOR_OK;
}
