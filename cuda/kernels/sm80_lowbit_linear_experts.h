// What sm80_lowbit_linear_experts.cu and the launcher (dispatch/lowbit_linear.cu) agree on, beside the arguments of
// sm80_lowbit_linear.h, whose weights, scales, zero points and bias are the first expert's.
#pragma once

#include "kernels/sm80_lowbit_linear.h"
#include "tile/expert_rows.h"

namespace tersor {

constexpr int lowbit_experts_blocks_per_multiprocessor(int token_tiles) { return token_tiles == 1 ? 3 : 2; }
// By the rows of the average expert that has any.
constexpr int lowbit_experts_token_tiles(long long rows, long long experts) {
  return rows <= 8 * (rows < experts ? rows : experts) ? 1 : 2;
}

using LowbitExpertsKernel = void(LowbitLinearArguments, ExpertWeights);
using LowbitExpertsChooser = LowbitExpertsKernel*(bool grouped, int token_tiles);
extern LowbitExpertsChooser* lowbit_experts_choosers[9];

}  // namespace tersor
