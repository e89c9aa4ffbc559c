// The integer GEMM behind sm80_lowbit_linear.cu and sm80_lowbit_linear_s4.cu, which describe it.
#pragma once

#include "kernels/sm80_lowbit_linear.h"
#include "ptx/ptx.h"
#include "tile/act_codes.h"
#include "tile/four_results.h"
#include "tile/int_stages.h"
#include "tile/lowbit_codes.h"
#include "tile/number.h"
#include "tile/token_tile.h"

namespace tersor {

template <int kBits, int kTokenTiles, bool kGrouped, int kWidth>
struct LowbitLinear {
  using shared_t = ptx::shared_t;
  using Stages = IntStages<kBits>;

  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kStages = lowbit_stages(kBits, kTokenTiles, kWidth, kGrouped);
  static constexpr int kWeightBytes = lowbit_weight_bytes(kBits);
  static constexpr int kTokenBytes = lowbit_token_bytes(kTokenTiles, kWidth);
  static_assert(kWidth == kLowbitBytes || kBits == 4, "4-bit products take 4-bit weights");
  static_assert(kWidth != kLowbitMixed || kGrouped, "blocks of two widths have scales of their own");
  static_assert(kGrouped ? kTokenTiles <= 8 : kTokenTiles <= 16, "sums, and totals where there are, fit the registers");

  // What is fetched: the groups of the stage's first block, and where the lane's first piece of weights lies.
  struct Source : StreamPosition {
    GroupPlace first, act_first;
    const uint8_t* weights;
  };

  const LowbitLinearArguments& a;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, c = lane % 4;
  const int row = 32 * (thread / 32) + 4 * g;     // the lane's first of four
  const int token0 = blockIdx.x * kTokens;        // the block's first token
  const uint32_t begin = first_unit(blockIdx.y), end = first_unit(blockIdx.y + 1);
  const shared_t shared = ptx::dynamic_shared();
  const int scale_bytes = a.scale_dtype == 0 ? 4 : 2;

  int32_t sum[2][kTokenTiles][4];                  // [product][token tile][fragment register] of the present segment
  float total[2][kGrouped ? kTokenTiles : 1][4];   // finished segments, scaled
  int32_t code_sum[kTokenTiles][2];                // of the activations, where weights have zero points
  int32_t weight_sum[2][4];                        // of the weights, where activations have them
  int group_left, act_group_left, segment_block;   // blocks until the groups end; where the segment began

  TERSOR_DEVICE explicit LowbitLinear(const LowbitLinearArguments& arguments) : a(arguments) {}

  // ---- ranges of units (row block, stage) ---------------------------------------------------------------------
  // Of equal number; with blocks of two widths of equal cost. A range is never empty: the launcher sees to it.

  TERSOR_DEVICE int stage_table(int index) const { return ptx::load_global_constant(a.stage_starts + index); }

  TERSOR_DEVICE uint32_t first_unit(uint32_t range) const {
    if constexpr (kWidth != kLowbitMixed) return a.ranges.first_unit(range);
    // The first unit that starts at or after the range's share of the cost.
    const int64_t cost = range * a.total_cost / gridDim.y;
    const int64_t row_block = cost / a.row_cost;
    const int rest = static_cast<int>(cost - row_block * a.row_cost);
    int low = 0, high = a.stages;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (stage_table(a.stages + 1 + middle) < rest) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return static_cast<uint32_t>(row_block * a.stages + low);
  }
  TERSOR_DEVICE uint32_t range_of(uint32_t unit) const {
    if constexpr (kWidth != kLowbitMixed) return a.ranges.range_of(unit);
    const int row_block = unit / a.stages, stage = unit - row_block * a.stages;
    const int64_t cost = row_block * a.row_cost + stage_table(a.stages + 1 + stage);
    uint32_t range = static_cast<uint32_t>(cost * gridDim.y / a.total_cost);
    while (range > 0 && first_unit(range) > unit) --range;
    while (range + 1 < gridDim.y && first_unit(range + 1) <= unit) ++range;
    return range;
  }

  TERSOR_DEVICE bool bytes_in(int stage) const {
    return kWidth == kLowbitBytes || (kWidth == kLowbitMixed && stage_table(stage + 1) - stage_table(stage) == 2);
  }

  // ---- global to shared ---------------------------------------------------------------------------------------

  TERSOR_DEVICE Source source_at(const StreamPosition& at) const {
    const int block = kGrouped ? at.stage * kStreamBlocks : 0;
    return {at, group_of(block, a.group_blocks), group_of(block, a.act_group_blocks),
            Stages::source(a, at.row_block, at.stage)};
  }

  TERSOR_DEVICE void advance(Source& at) const {
    if (at.stage + 1 == a.stages) {
      at = source_at({at.row_block + 1, 0});
      return;
    }
    ++at.stage;
    at.weights += Stages::kTileBytes;
    if constexpr (kGrouped) {
      at.first.advance_stage(a.group_blocks);
      at.act_first.advance_stage(a.act_group_blocks);
    }
  }

  template <bool kBytes>
  TERSOR_DEVICE void fetch_tokens(shared_t tokens, int offset) const {
    constexpr int unroll = kTokenTiles < 16 ? 4 : 1;
    const uint8_t* source = a.codes + token0 * a.row_bytes + offset;
    if constexpr (kBytes) {
      fetch_token_bytes<kTokens, kStreamK, unroll>(tokens, source, a.row_bytes, token0, a.m, swizzled_byte_piece);
    } else {
      fetch_token_bytes<kTokens, kStreamK / 2, unroll>(tokens, source, a.row_bytes, token0, a.m, swizzled_nibble_piece);
    }
  }

  TERSOR_DEVICE int blocks_of(int stage) const {
    const int left = a.blocks - stage * kStreamBlocks;
    return left < kStreamBlocks ? left : kStreamBlocks;
  }

  TERSOR_DEVICE void fetch_act_scales(shared_t scales, const Source& at) const {
    const int blocks = blocks_of(at.stage);
    for (int i = thread; i < a.act_slots * kTokens; i += kStreamThreads) {
      const int slot = i / kTokens, token = token0 + i % kTokens;
      if (slot * a.act_group_blocks - at.act_first.in_group < blocks) {
        ptx::cp_async_4(scales + 4 * i, a.act_scales + token * a.act_scale_stride + at.act_first.group + slot,
                        token < a.m ? 4 : 0);
      }
    }
  }

  // Scales and zero points of all groups that the stage touches, where a segment ends in it: a group of either side,
  // a row of k, or the range.
  TERSOR_DEVICE void fetch_groups(shared_t groups, const Source& at, bool range_ends) const {
    if (at.first.in_group + kStreamBlocks < a.group_blocks &&
        at.act_first.in_group + kStreamBlocks < a.act_group_blocks && at.stage + 1 < a.stages && !range_ends) {
      return;
    }
    const int blocks = blocks_of(at.stage);
    fetch_groups_of_rows(a, groups, at.row_block, at.first.group,
                         [&](int slot) { return slot * a.group_blocks - at.first.in_group < blocks; });
    fetch_act_scales(groups + a.group_slots * a.group_bytes, at);
  }

  TERSOR_DEVICE shared_t groups_of(shared_t stage) const { return stage + kWeightBytes + kTokenBytes; }
  TERSOR_DEVICE shared_t sums_of(shared_t stage) const {
    return groups_of(stage) + (kGrouped ? a.group_slots * a.group_bytes + a.act_slots * kTokens * 4 : 0);
  }

  TERSOR_DEVICE void fetch(int slot, const Source& at, bool range_ends) const {
    const shared_t stage = shared + slot * a.stage_bytes, tokens = stage + kWeightBytes;
    Stages::template fetch<(kTokenTiles < 8)>(a, stage, at.weights, at.row_block, at.stage);
    if constexpr (kWidth == kLowbitMixed) {
      const int start = stage_table(at.stage);
      if (bytes_in(at.stage)) {
        fetch_tokens<true>(tokens, 64 * start);
      } else {
        fetch_tokens<false>(tokens, 64 * start);
      }
    } else {
      fetch_tokens<kWidth == kLowbitBytes>(tokens, at.stage * (kStreamK >> kWidth));
    }
    if constexpr (kGrouped) fetch_groups(groups_of(stage), at, range_ends);
    if (a.zero_points != nullptr && thread < kTokens) {
      const int token = token0 + thread;
      ptx::cp_async_8(sums_of(stage) + 8 * thread, a.sums + (int64_t(token) * a.stages + at.stage) * 4,
                      token < a.m ? 8 : 0);
    }
  }

  // ---- shared to registers to tensor cores --------------------------------------------------------------------

  // Fragment rows g and g + 8 of product j are the lane's rows 2j and 2j + 1.
  TERSOR_DEVICE void multiply_bytes(shared_t stage, int block, int channels_left) {
    using Unpacker = LowbitUnpacker<kBits>;
    const IntFragment<kBits> codes = Stages::load(stage, block);
    uint32_t weights[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i / 2][i % 2] = Unpacker::template bytes<0>(codes, i, c);
      weights[i / 2][i % 2 + 2] = Unpacker::template bytes<1>(codes, i, c);
    }
    multiply_tokens(weights, stage + kWeightBytes, block, channels_left);
  }

  TERSOR_DEVICE void multiply_tokens(const uint32_t (&weights)[2][4], shared_t tokens, int block, int channels_left) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const auto x = load_token_bytes(tokens, 8 * t + g, block);
      const uint32_t both[2] = {x[0], x[1]};
#pragma unroll
      for (int j = 0; j < 2; ++j) ptx::mma_m16n8k32_s8(sum[j][t], weights[j], both);
    }
    if (a.act_zero_points != nullptr) {  // times ones: sums of the weights of channels that there are
      uint32_t ones[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (act_channel_of_byte(i) + 8 * c < channels_left) ones[i / 4] |= 1u << 8 * (i % 4);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) ptx::mma_m16n8k32_s8(weight_sum[j], weights[j], ones);
    }
  }

  // Blocks `block` and the next: 4-bit codes are multiplied as they are stored, the highest bit flipped.
  TERSOR_DEVICE void multiply_nibbles(shared_t stage, int block) {
    const IntFragment<kBits> first = Stages::load(stage, block), second = Stages::load(stage, block + 1);
    uint32_t weights[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i / 2][i % 2] = first.rows[0][i] ^ 0x88888888u;
      weights[i / 2][2 + i % 2] = second.rows[0][i] ^ 0x88888888u;
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int token = 8 * t + lane % 8, piece = block + lane / 8 % 2;
      uint32_t x[2];
      ptx::ldmatrix_x2(x, stage + kWeightBytes + token * (kStreamK / 2) +
                              swizzled_nibble_piece(token, piece) * kPieceBytes);
#pragma unroll
      for (int j = 0; j < 2; ++j) ptx::mma_m16n8k64_s4(sum[j][t], weights[j], x);
    }
  }

  TERSOR_DEVICE void add_code_sums(shared_t sums, int block) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        code_sum[t][e] += ptx::load_shared<int16_t>(sums + 8 * (8 * t + 2 * c + e) + 2 * block);
      }
  }

  // How many channels the segment that ends with block `last` has.
  TERSOR_DEVICE int segment_channels(int last) const {
    const int stop = kBlockK * (last + 1);
    return (stop < a.k ? stop : a.k) - kBlockK * segment_block;
  }

  // What zero points add to a sum: that of the weights (less the middle, scaled), then that of the activations.
  TERSOR_DEVICE void add_zero_points(uint32_t zero_points, int factor, int act_group, int last) {
    const int channels = segment_channels(last);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = token0 + 8 * t + 2 * c + e;
        const bool offset = a.act_zero_points != nullptr && token < a.m;
        const int act_zero =
            offset ? ptx::load_global_constant(a.act_zero_points + int64_t(token) * a.act_groups + act_group) : 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int zero = a.zero_points == nullptr ? 1 << (kBits - 1) : zero_points >> (8 * r) & 0xff;
          const int middle = ((1 << (kBits - 1)) - zero) * factor;
          int32_t& value = sum[r / 2][t][r % 2 * 2 + e];
          if (a.zero_points != nullptr) value += middle * code_sum[t][e];
          if (a.act_zero_points != nullptr) value -= act_zero * (weight_sum[r / 2][r % 2 * 2] + middle * channels);
        }
      }
  }

  // total += weight scale * activation scale * sum, sum = 0. factor: by how much weights in registers are larger.
  TERSOR_DEVICE void end_segment(shared_t groups, int slot, int act_slot, int act_group, int last, int factor) {
    const shared_t group = groups + slot * a.group_bytes, scales = group + row * scale_bytes;
    const shared_t act_scales = groups + a.group_slots * a.group_bytes + act_slot * kTokens * 4;
    float scale[4];
    load_four(scale, a.scale_dtype, [&](auto type) { return ptx::load_shared<decltype(type)>(scales); });
#pragma unroll
    for (int r = 0; r < 4; ++r) scale[r] *= 1.0f / factor;
    if (a.zero_points != nullptr || a.act_zero_points != nullptr) {
      const shared_t zero_points = group + kStreamRows * scale_bytes + row;
      add_zero_points(a.zero_points == nullptr ? 0 : ptx::load_shared<uint32_t>(zero_points), factor, act_group, last);
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const auto act = ptx::load_shared<ptx::Vec<float, 2>>(act_scales + 4 * (8 * t + 2 * c));
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[j][t][i] += scale[2 * j + i / 2] * act[i % 2] * static_cast<float>(sum[j][t][i]);
        }
    }
    clear_segment();
    segment_block = last + 1;
  }

  TERSOR_DEVICE void clear_segment() {
    clear_sums(sum);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) weight_sum[j][i] = 0;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) code_sum[t][0] = code_sum[t][1] = 0;
  }

  // A row block, or the range, begins at block `block`.
  TERSOR_DEVICE void start_rows(int block) {
    clear_segment();
    segment_block = block;
    if constexpr (kGrouped) {
      clear_sums(total);
      group_left = a.group_blocks - block % a.group_blocks;
      act_group_left = a.act_group_blocks - block % a.act_group_blocks;
    }
  }

  template <bool kBytes>
  TERSOR_DEVICE void multiply_stage(shared_t stage, const StreamPosition& at, bool range_ends) {
    constexpr int step = kBytes ? 1 : 2;  // blocks of a product
    const int first_block = at.stage * kStreamBlocks;
    const shared_t groups = groups_of(stage), sums = sums_of(stage);
    int slot = 0, act_slot = 0;
#pragma unroll(kTokenTiles < 8 ? kStreamBlocks : 1)
    for (int i = 0; i < kStreamBlocks; i += step) {
      const int block = first_block + i;
      if (block >= a.blocks) break;
      if constexpr (kBytes) {
        multiply_bytes(stage, i, a.k - kBlockK * block);
      } else {
        multiply_nibbles(stage, i);
      }
      if (a.zero_points != nullptr) {
        for (int b = 0; b < step; ++b) add_code_sums(sums, i + b);
      }
      if constexpr (kGrouped) {
        group_left -= step;
        act_group_left -= step;
        const bool last = block + step >= a.blocks || (range_ends && i + step == kStreamBlocks);
        if (group_left <= 0 || act_group_left <= 0 || last) {
          const int act_group = a.act_zero_points == nullptr ? 0 : block / a.act_group_blocks;
          end_segment(groups, slot, act_slot, act_group, block + step - 1, kBytes ? lowbit_factor(kBits) : 1);
        }
        if (group_left <= 0) {
          group_left = a.group_blocks;
          ++slot;
        }
        if (act_group_left <= 0) {
          act_group_left = a.act_group_blocks;
          ++act_slot;
        }
      }
    }
  }

  // ---- results ------------------------------------------------------------------------------------------------

  // What crosses blocks: sums of scaled groups, or where nothing changes along k the integers themselves.
  TERSOR_DEVICE auto& results() {
    if constexpr (kGrouped) {
      return total;
    } else {
      return sum;
    }
  }

  TERSOR_DEVICE bool reduce(int row_block) {
    constexpr int at_once = kTokenTiles < 4 ? kTokenTiles : 4;
    return sum_ranges<1, at_once>(results(), a, *this, row_block, (a.tiles + 7) / 8, shared + kStages * a.stage_bytes);
  }

  // Integers of a whole row take their zero points before ranges are summed: both are exact.
  TERSOR_DEVICE void end_rows(int row_block, int last) {
    if constexpr (!kGrouped) {
      if (a.zero_points == nullptr && a.act_zero_points == nullptr) return;
      const int n = row_block * kStreamRows + row;
      const bool inside = a.zero_points != nullptr && n < 16 * a.tiles;
      const uint32_t zero_points =
          inside ? ptx::load_global_constant(reinterpret_cast<const uint32_t*>(a.zero_points + n)) : 0;
      add_zero_points(zero_points, kWidth == kLowbitBytes ? lowbit_factor(kBits) : 1, 0, last);
    }
  }

  TERSOR_DEVICE void store(int row_block) {
    const int n = row_block * kStreamRows + row, rows = a.n - n;
    if (rows <= 0) return;
    float scale[4] = {1, 1, 1, 1};
    if constexpr (!kGrouped) {
      const char* scales = static_cast<const char*>(a.scales) + int64_t(n) * scale_bytes;
      load_four(scale, a.scale_dtype, [&](auto type) {
        return ptx::load_global_constant(reinterpret_cast<const decltype(type)*>(scales));
      });
#pragma unroll
      for (int r = 0; r < 4; ++r) scale[r] *= 1.0f / (kWidth == kLowbitBytes ? lowbit_factor(kBits) : 1);
    }
    store_scaled(n, rows, [&](float value, float act, int r) { return kGrouped ? value : scale[r] * act * value; });
  }

  // The lane's output features from n on, at most four of `rows`, of two tokens in every token tile. scaled(value,
  // scale of the token where there is one for all of k, r): the result for feature n + r.
  template <class Scaled>
  TERSOR_DEVICE void store_scaled(int n, int rows, const Scaled& scaled) {
    float bias[4] = {0, 0, 0, 0};
    if (a.bias != nullptr) add_four(bias, a.y_dtype, a.bias, n, rows);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = token0 + 8 * t + 2 * c + e;
        if (token >= a.m) continue;
        const float act = kGrouped ? 1.0f : ptx::load_global_constant(a.act_scales + token * a.act_scale_stride);
        float values[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          values[r] = scaled(static_cast<float>(results()[r / 2][t][r % 2 * 2 + e]), act, r) + bias[r];
        }
        if (a.residual != nullptr) add_four(values, a.y_dtype, a.residual, token * a.ldr + n, rows);
        store_four(values, a.y_dtype, a.y, token * a.ldy + n, rows, a.wide_stores);
      }
  }

  // ---- the pipeline -------------------------------------------------------------------------------------------

  TERSOR_DEVICE void run() {
    Source ahead = source_at(position_of(begin, a.stages));
    const auto fetch_next = [&](int slot, uint32_t unit) {
      fetch(slot, ahead, unit + 1 == end);
      advance(ahead);
    };
    const auto multiply = [&](int slot, const StreamPosition& at, uint32_t unit) {
      if (unit == begin || at.stage == 0) start_rows(at.stage * kStreamBlocks);
      const shared_t stage = shared + slot * a.stage_bytes;
      if (bytes_in(at.stage)) {
        if constexpr (kWidth != kLowbitNibbles) multiply_stage<true>(stage, at, unit + 1 == end);
      } else {
        if constexpr (kWidth != kLowbitBytes) multiply_stage<false>(stage, at, unit + 1 == end);
      }
    };
    const auto finish = [&](const StreamPosition& at) {
      end_rows(at.row_block, (at.stage + 1) * kStreamBlocks - 1);
      if (reduce(at.row_block)) store(at.row_block);
    };
    run_stages<kStages>(begin, end, a.stages, fetch_next, multiply, finish);
  }
};

}  // namespace tersor
