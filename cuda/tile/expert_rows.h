// Which rows of a mixture of experts a block takes, and the weights that go with them.
#pragma once

#include <cstdint>

#include "ptx/ptx.h"

namespace tersor {

// Beside the arguments of a kernel, whose weights, scales, zero points and bias are the first expert's.
struct ExpertWeights {
  const int32_t* ends;  // [count] the row after each expert's last
  int count, rows;
  int64_t weight_bytes, scale_bytes, zero_point_bytes;  // from one expert to the next
};

// The arguments of `expert`. number_bytes: of an element of the bias.
template <class Arguments>
TERSOR_DEVICE void choose_expert(Arguments& a, const ExpertWeights& experts, int expert, int number_bytes) {
  a.qweight += expert * experts.weight_bytes;
  a.scales = static_cast<const char*>(a.scales) + expert * experts.scale_bytes;
  if (a.zero_points != nullptr) a.zero_points += expert * experts.zero_point_bytes;
  if (a.bias != nullptr) a.bias = static_cast<const char*>(a.bias) + int64_t(expert) * a.n * number_bytes;
}

struct ExpertRows {
  int expert, begin, end;  // rows of x that the block takes; expert -1: none, `count`: rows of no expert
};

// Rows are cut into blocks of `tokens` expert by expert; which are block `index`'s is found by each warp for itself
// from the ends alone, so that nothing has to come back to the host. An end out of order counts as the highest before
// it, one out of range as the last row's: no row belongs to two.
TERSOR_DEVICE ExpertRows rows_of_block(const ExpertWeights& experts, int index, int tokens) {
  const int count = experts.count;
  const int lane = threadIdx.x % 32;
  int before = 0, row = 0;  // blocks and rows of the experts before the present 32
  for (int first = 0; first <= count; first += 32) {
    const int expert = first + lane;
    int end = expert < count ? ptx::load_global_constant(experts.ends + expert) : experts.rows;
    end = end < row ? row : end < experts.rows ? end : experts.rows;
    for (int step = 1; step < 32; step *= 2) {
      const int below = ptx::shuffle(end, lane - step);
      if (lane >= step && below > end) end = below;
    }
    const int last = ptx::shuffle(end, lane - 1), begin = lane == 0 ? row : last;
    const int blocks = (end - begin + tokens - 1) / tokens;
    int through = blocks;  // of this expert and the lanes below
    for (int step = 1; step < 32; step *= 2) {
      const int below = ptx::shuffle(through, lane - step);
      if (lane >= step) through += below;
    }
    const int mine = index - before - (through - blocks);
    const bool found = mine >= 0 && mine < blocks;
    if (ptx::any(found)) {
      // One lane has it; the others hold zeros in the sums.
      ExpertRows rows = {found ? expert : 0, found ? begin + mine * tokens : 0, found ? end : 0};
      for (int mask = 16; mask > 0; mask /= 2) {
        rows.expert += ptx::shuffle_xor(rows.expert, mask);
        rows.begin += ptx::shuffle_xor(rows.begin, mask);
        rows.end += ptx::shuffle_xor(rows.end, mask);
      }
      return rows;
    }
    before += ptx::shuffle(through, 31);
    row = ptx::shuffle(end, 31);
  }
  return {-1, 0, 0};
}

}  // namespace tersor
