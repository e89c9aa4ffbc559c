// The integer GEMM behind sm80_two_level_linear.cu: tile/lowbit_linear.h with weights that take their group's integer
// scale and zero point in registers.
#pragma once

#include "kernels/sm80_two_level_linear.h"
#include "tile/lowbit_linear.h"

namespace tersor {

// Codes as unsigned bytes, in the order in which LowbitUnpacker gives signed ones.
template <int kBits>
struct TwoLevelCodes {
  using Fragment = IntFragment<kBits>;

  template <int kSecond>
  static TERSOR_DEVICE uint32_t bytes(const Fragment& codes, int row, int c) {
    uint32_t value = plane<Fragment::kWidth0, 0, kSecond>(codes.rows[0][row], c);
    if constexpr (Fragment::kPlanes > 1) {
      value |= plane<Fragment::kWidth1, Fragment::kLow1, kSecond>(codes.rows[1][row], c);
    }
    return value;
  }

 private:
  template <int kWidth, int kLow, int kSecond>
  static TERSOR_DEVICE uint32_t plane(uint32_t word, int c) {
    constexpr int shift = kWidth * kSecond - kLow;
    constexpr uint32_t mask = (((1u << kWidth) - 1) << kLow) * 0x01010101u;
    if constexpr (kWidth < 4) word >>= lane_shift(kWidth, c);
    if constexpr (shift > 0) word >>= shift;
    if constexpr (shift < 0) word <<= -shift;
    return word & mask;
  }
};

// kGrouped: scales of activations change along k; weights never end a sum.
template <int kBits, int kTokenTiles, bool kGrouped>
struct TwoLevelLinear : LowbitLinear<kBits, kTokenTiles, kGrouped, kLowbitBytes> {
  using Base = LowbitLinear<kBits, kTokenTiles, kGrouped, kLowbitBytes>;
  using typename Base::shared_t;
  using typename Base::Source;
  using typename Base::Stages;
  using Base::a, Base::begin, Base::c, Base::end, Base::row, Base::shared, Base::sum, Base::thread, Base::total;
  using Base::kStages, Base::kTokenBytes, Base::kTokens, Base::kWeightBytes;

  // What is fetched, and the weight group of its first block.
  struct Ahead {
    Source source;
    GroupPlace first;
  };

  const TwoLevelScales& w;
  uint32_t factor[4], offset[4];  // of the lane's rows: four codes * factor + offset are four bytes less 128
  int weights_left;               // blocks until the weights' group ends

  TERSOR_DEVICE TwoLevelLinear(const LowbitLinearArguments& arguments, const TwoLevelScales& scales)
      : Base(arguments), w(scales) {}

  // ---- global to shared ---------------------------------------------------------------------------------------

  TERSOR_DEVICE Ahead ahead_at(const StreamPosition& at) const {
    return {this->source_at(at), group_of(at.stage * kStreamBlocks, w.group_blocks)};
  }

  TERSOR_DEVICE void advance_ahead(Ahead& at) const {
    if (at.source.stage + 1 == a.stages) {
      at = ahead_at({at.source.row_block + 1, 0});
      return;
    }
    this->advance(at.source);
    at.first.advance_stage(w.group_blocks);
  }

  TERSOR_DEVICE shared_t act_scales_of(shared_t stage) const {
    return this->groups_of(stage) + a.group_slots * a.group_bytes;
  }

  // Scales and zero points of the groups that the stage touches: a 16-byte piece for each tile and group, by a thread.
  TERSOR_DEVICE void fetch_weight_groups(shared_t groups, const Ahead& at, int blocks) const {
    const int index = thread & (kStreamThreads / 2 - 1), tile = index % 8, slot = index / 8;
    const bool zeros = thread >= kStreamThreads / 2;
    if (slot >= a.group_slots || (zeros && w.zero_points == nullptr) ||
        slot * w.group_blocks - at.first.in_group >= blocks) {
      return;
    }
    const int64_t row = at.source.row_block * 8 + tile;
    const int group = at.first.group + slot;
    const uint8_t* from = zeros ? w.zero_points + (row * w.groups + group) * kPieceBytes
                                : w.scales + (row * (w.groups + 4) + group) * kPieceBytes;
    ptx::cp_async_16(groups + slot * a.group_bytes + (zeros ? kStreamRows : 0) + tile * kPieceBytes, from,
                     row < a.tiles ? kPieceBytes : 0);
  }
  static_assert(4 * 8 <= kStreamThreads / 2, "four slots of a byte a row are one piece for a thread");

  TERSOR_DEVICE void fetch(int slot, const Ahead& at, bool range_ends) const {
    const shared_t stage = shared + slot * a.stage_bytes;
    const Source& from = at.source;
    Stages::template fetch<(kTokenTiles < 8)>(a, stage, from.weights, from.row_block, from.stage);
    this->template fetch_tokens<true>(stage + kWeightBytes, from.stage * kStreamK);
    fetch_weight_groups(this->groups_of(stage), at, this->blocks_of(from.stage));
    if constexpr (kGrouped) {  // where a sum ends in the stage: with a group of activations, a row of k, or the range
      const bool goes_on = from.act_first.in_group + kStreamBlocks < a.act_group_blocks && from.stage + 1 < a.stages;
      if (!goes_on || range_ends) this->fetch_act_scales(act_scales_of(stage), from);
    }
  }

  // ---- shared to registers to tensor cores --------------------------------------------------------------------

  // A byte of four codes * factor + offset is 128 + (code - zero point) * scale: from 1 to 255, so that nothing is
  // carried from byte to byte, and less 128 once its highest bit is flipped.
  TERSOR_DEVICE void load_group(shared_t group) {
    const uint32_t scales = ptx::load_shared<uint32_t>(group + row);
    const uint32_t zeros = w.zero_points == nullptr ? 0x01010101u << (kBits - 1)
                                                    : ptx::load_shared<uint32_t>(group + kStreamRows + row);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      factor[r] = scales >> 8 * r & 0xff;
      offset[r] = (128 - factor[r] * (zeros >> 8 * r & 0xff)) * 0x01010101u;
    }
  }

  template <int kSecond>
  TERSOR_DEVICE uint32_t weight(const IntFragment<kBits>& codes, int i) const {
    return (TwoLevelCodes<kBits>::template bytes<kSecond>(codes, i, c) * factor[i] + offset[i]) ^ 0x80808080u;
  }

  TERSOR_DEVICE void multiply(shared_t stage, int block, int channels_left) {
    const IntFragment<kBits> codes = Stages::load(stage, block);
    uint32_t weights[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i / 2][i % 2] = weight<0>(codes, i);
      weights[i / 2][i % 2 + 2] = weight<1>(codes, i);
    }
    this->multiply_tokens(weights, stage + kWeightBytes, block, channels_left);
  }

  // total += activation scale * sum, sum = 0.
  TERSOR_DEVICE void end_act_group(shared_t scales, int act_group, int last) {
    if (a.act_zero_points != nullptr) this->add_zero_points(0, 1, act_group, last);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const auto act = ptx::load_shared<ptx::Vec<float, 2>>(scales + 4 * (8 * t + 2 * c));
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[j][t][i] += act[i % 2] * static_cast<float>(sum[j][t][i]);
    }
    this->clear_segment();
    this->segment_block = last + 1;
  }

  TERSOR_DEVICE void multiply_stage(shared_t stage, const StreamPosition& at, bool range_ends) {
    const int first_block = at.stage * kStreamBlocks;
    const shared_t groups = this->groups_of(stage), act_scales = act_scales_of(stage);
    int slot = 0, act_slot = 0;
    load_group(groups);
#pragma unroll(kTokenTiles < 8 ? kStreamBlocks : 1)
    for (int i = 0; i < kStreamBlocks; ++i) {
      const int block = first_block + i;
      if (block >= a.blocks) break;
      if (weights_left == 0) {
        weights_left = w.group_blocks;
        if (i > 0) load_group(groups + ++slot * a.group_bytes);
      }
      --weights_left;
      multiply(stage, i, a.k - kBlockK * block);
      if constexpr (kGrouped) {
        const bool last = block + 1 >= a.blocks || (range_ends && i + 1 == kStreamBlocks);
        if (--this->act_group_left == 0 || last) {
          const int act_group = a.act_zero_points == nullptr ? 0 : block / a.act_group_blocks;
          end_act_group(act_scales + act_slot * kTokens * 4, act_group, block);
        }
        if (this->act_group_left == 0) {
          this->act_group_left = a.act_group_blocks;
          ++act_slot;
        }
      }
    }
  }

  // ---- results ------------------------------------------------------------------------------------------------

  TERSOR_DEVICE void store_rows(int row_block) {
    const int n = row_block * kStreamRows + row, rows = a.n - n;
    if (rows <= 0) return;
    const uint8_t* channels = w.scales + (int64_t(n / 16) * (w.groups + 4) + w.groups + n % 16 / 4) * kPieceBytes;
    const auto scale = ptx::load_global_constant(reinterpret_cast<const ptx::Vec<float, 4>*>(channels));
    const auto scaled = [&](float value, float act, int r) { return (kGrouped ? value : value * act) * scale[r]; };
    this->store_scaled(n, rows, scaled);
  }

  // ---- the pipeline -------------------------------------------------------------------------------------------

  TERSOR_DEVICE void run() {
    Ahead ahead = ahead_at(position_of(begin, a.stages));
    const auto fetch_next = [&](int slot, uint32_t unit) {
      fetch(slot, ahead, unit + 1 == end);
      advance_ahead(ahead);
    };
    const auto multiply = [&](int slot, const StreamPosition& at, uint32_t unit) {
      if (unit == begin || at.stage == 0) {
        const int block = at.stage * kStreamBlocks;
        this->start_rows(block);
        weights_left = w.group_blocks - block % w.group_blocks;
      }
      multiply_stage(shared + slot * a.stage_bytes, at, unit + 1 == end);
    };
    const auto finish = [&](const StreamPosition& at) {
      this->end_rows(at.row_block, (at.stage + 1) * kStreamBlocks - 1);
      if (this->reduce(at.row_block)) store_rows(at.row_block);
    };
    run_stages<kStages>(begin, end, a.stages, fetch_next, multiply, finish);
  }
};

}  // namespace tersor
