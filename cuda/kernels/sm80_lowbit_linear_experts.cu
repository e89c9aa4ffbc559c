// sm80_lowbit_linear.cu for rows sorted by expert, each with its expert's weight: int_linear_grouped with activations
// of 4, 6 or 8 bits in bytes.
//
// A block finds its expert and its rows from the ends alone (tile/expert_rows.h), so that nothing comes back to the
// host, and runs the same code on them: addresses move so that the block's first token, which that code takes for
// number blockIdx.x * tokens, is the first of its rows. Rows of no expert become zeros. Layout, shared memory, floors
// and limits are as there, for 8 and 16 tokens at once. Arguments that differ from block to block lie in registers: one
// block less shares a multiprocessor, and more tokens at once would spill.
// gate: defines TERSOR_BITS=2,3,4,5,6,7,8
// gate: registers 168 where <\d, 1,
// gate: registers 255
// gate: wants IMMA.16832.S8.S8 LDGSTS.E.BYPASS LDS.128 LDS.64
// gate: lacks HMMA
#include "kernels/sm80_lowbit_linear.h"
#include "kernels/sm80_lowbit_linear_experts.h"

#include "tile/expert_rows.h"
#include "tile/lowbit_linear.h"

namespace tersor {
namespace {

TERSOR_DEVICE void clear_rows(const LowbitLinearArguments& a, int begin, int count) {
  for (int i = blockIdx.y * kStreamThreads + threadIdx.x; i < count * a.n; i += gridDim.y * kStreamThreads) {
    const int64_t at = (begin + i / a.n) * a.ldy + i % a.n;
    if (a.y_dtype == 0) {
      ptx::store_global(static_cast<float*>(a.y) + at, 0.0f);
    } else {
      ptx::store_global(static_cast<uint16_t*>(a.y) + at, uint16_t(0));
    }
  }
}

template <int kBits, int kTokenTiles, bool kGrouped>
__global__ void __launch_bounds__(kStreamThreads, lowbit_experts_blocks_per_multiprocessor(kTokenTiles))
    lowbit_linear_experts(const LowbitLinearArguments arguments, const ExpertWeights experts) {
  constexpr int tokens = 8 * kTokenTiles;
  const ExpertRows rows = rows_of_block(experts, blockIdx.x, tokens);
  if (rows.expert < 0) return;
  LowbitLinearArguments a = arguments;
  if (rows.expert == experts.count) {
    const int count = rows.end - rows.begin;
    clear_rows(a, rows.begin, count < tokens ? count : tokens);
    return;
  }
  const int64_t shift = rows.begin - int64_t(blockIdx.x) * tokens;
  a.m = static_cast<int>(rows.end - shift);
  a.codes += shift * a.row_bytes;
  a.act_scales += shift * a.act_scale_stride;
  if (a.sums != nullptr) a.sums += shift * 4 * a.stages;
  if (a.act_zero_points != nullptr) a.act_zero_points += shift * a.act_groups;
  const int size = a.y_dtype == 0 ? 4 : 2;
  a.y = static_cast<char*>(a.y) + shift * a.ldy * size;
  choose_expert(a, experts, rows.expert, size);
  LowbitLinear<kBits, kTokenTiles, kGrouped, kLowbitBytes>(a).run();
}

LowbitExpertsKernel* choose_kernel(bool grouped, int token_tiles) {
  constexpr int bits = TERSOR_BITS;
  switch (token_tiles) {
    case 1: return grouped ? lowbit_linear_experts<bits, 1, true> : lowbit_linear_experts<bits, 1, false>;
    case 2: return grouped ? lowbit_linear_experts<bits, 2, true> : lowbit_linear_experts<bits, 2, false>;
    default: return nullptr;
  }
}
const bool entered = (lowbit_experts_choosers[TERSOR_BITS] = choose_kernel, true);

}  // namespace
}  // namespace tersor
