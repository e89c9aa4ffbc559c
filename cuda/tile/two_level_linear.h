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
  using typename Base::Position;
  using typename Base::shared_t;
  using typename Base::Source;
  using Base::a, Base::begin, Base::c, Base::end, Base::lane, Base::quad, Base::shared, Base::sum, Base::thread,
      Base::token0, Base::total, Base::warp_tile, Base::weight_sum;
  using Base::kStages, Base::kTokenBytes, Base::kTokens, Base::kWeightBytes;

  // What is fetched, and the weight group of its first block.
  struct Ahead {
    Source source;
    int group, in_group;
  };

  const TwoLevelScales& w;
  uint32_t factor[4], offset[4];  // of the lane's rows: four codes * factor + offset are four bytes less 128
  int weights_left;               // blocks until the weights' group ends

  TERSOR_DEVICE TwoLevelLinear(const LowbitLinearArguments& arguments, const TwoLevelScales& scales)
      : Base(arguments), w(scales) {}

  // ---- global to shared ---------------------------------------------------------------------------------------

  TERSOR_DEVICE Ahead ahead_at(int row_block, int stage) const {
    const int block = stage * kLowbitStageBlocks, group = block / w.group_blocks;
    return {this->source_at(row_block, stage), group, block - group * w.group_blocks};
  }

  TERSOR_DEVICE void advance_ahead(Ahead& at) const {
    if (at.source.stage + 1 == a.stages) {
      at = ahead_at(at.source.row_block + 1, 0);
      return;
    }
    this->advance(at.source);
    at.in_group += kLowbitStageBlocks;
    for (; at.in_group >= w.group_blocks; ++at.group) at.in_group -= w.group_blocks;
  }

  TERSOR_DEVICE shared_t act_scales_of(shared_t stage) const {
    return this->groups_of(stage) + a.group_slots * a.group_bytes;
  }

  // Scales and zero points of the groups that the stage touches: a 16-byte piece for each tile and group, by a thread.
  TERSOR_DEVICE void fetch_weight_groups(shared_t groups, const Ahead& at, int blocks) const {
    const int index = thread & (kLowbitThreads / 2 - 1), tile = index % 8, slot = index / 8;
    const bool zeros = thread >= kLowbitThreads / 2;
    if (slot >= a.group_slots || (zeros && w.zero_points == nullptr) ||
        slot * w.group_blocks - at.in_group >= blocks) {
      return;
    }
    const int64_t row = at.source.row_block * 8 + tile;
    const int group = at.group + slot;
    const uint8_t* from = zeros ? w.zero_points + (row * w.groups + group) * kPieceBytes
                                : w.scales + (row * (w.groups + 4) + group) * kPieceBytes;
    ptx::cp_async_16(groups + slot * a.group_bytes + (zeros ? kLowbitRows : 0) + tile * kPieceBytes, from,
                     row < a.tiles ? kPieceBytes : 0);
  }
  static_assert(4 * 8 <= kLowbitThreads / 2, "four slots of a byte a row are one piece for a thread");

  // Where a sum ends in the stage: with a group of activations, a row of k, or the range.
  TERSOR_DEVICE void fetch_act_scales(shared_t scales, const Source& at, int blocks, bool range_ends) const {
    if (at.in_act_group + kLowbitStageBlocks < a.act_group_blocks && at.stage + 1 < a.stages && !range_ends) return;
    for (int i = thread; i < a.act_slots * kTokens; i += kLowbitThreads) {
      const int slot = i / kTokens, token = token0 + i % kTokens;
      if (slot * a.act_group_blocks - at.in_act_group < blocks) {
        ptx::cp_async_4(scales + 4 * i, a.act_scales + token * a.act_scale_stride + at.act_group + slot,
                        token < a.m ? 4 : 0);
      }
    }
  }

  TERSOR_DEVICE void fetch(int slot, const Ahead& at, bool range_ends) const {
    const shared_t stage = shared + slot * a.stage_bytes;
    const int left = a.blocks - at.source.stage * kLowbitStageBlocks;
    const int blocks = left < kLowbitStageBlocks ? left : kLowbitStageBlocks;
    this->fetch_weights(stage, at.source);
    this->template fetch_tokens<true>(stage + kWeightBytes, at.source.stage * kLowbitStageK);
    fetch_weight_groups(this->groups_of(stage), at, blocks);
    if constexpr (kGrouped) fetch_act_scales(act_scales_of(stage), at.source, blocks, range_ends);
  }

  // ---- shared to registers to tensor cores --------------------------------------------------------------------

  // A byte of four codes * factor + offset is 128 + (code - zero point) * scale: from 1 to 255, so that nothing is
  // carried from byte to byte, and less 128 once its highest bit is flipped.
  TERSOR_DEVICE void load_group(shared_t group) {
    const int row = 16 * warp_tile + 4 * quad;
    const uint32_t scales = ptx::load_shared<uint32_t>(group + row);
    const uint32_t zeros = w.zero_points == nullptr ? 0x01010101u << (kBits - 1)
                                                    : ptx::load_shared<uint32_t>(group + kLowbitRows + row);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      factor[r] = scales >> 8 * r & 0xff;
      offset[r] = (128 - factor[r] * (zeros >> 8 * r & 0xff)) * 0x01010101u;
    }
  }

  template <int kSecond>
  TERSOR_DEVICE uint32_t weight(const IntFragment<kBits>& codes, int row) const {
    return (TwoLevelCodes<kBits>::template bytes<kSecond>(codes, row, c) * factor[row] + offset[row]) ^ 0x80808080u;
  }

  TERSOR_DEVICE void multiply(shared_t stage, int block, int channels_left) {
    const IntFragment<kBits> codes = this->load_codes(stage, block);
    uint32_t weights[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      weights[j][0] = weight<0>(codes, 2 * j);
      weights[j][1] = weight<0>(codes, 2 * j + 1);
      weights[j][2] = weight<1>(codes, 2 * j);
      weights[j][3] = weight<1>(codes, 2 * j + 1);
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int token = 8 * t + lane / 4;
      const shared_t row = stage + kWeightBytes + token * kLowbitStageK + 8 * (c % 2);
      const auto x = ptx::load_shared<ptx::Vec<uint32_t, 2>>(
          row + swizzled_byte_piece(token, 2 * block + c / 2) * kPieceBytes);
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

  TERSOR_DEVICE void multiply_stage(shared_t stage, const Position& at, bool range_ends) {
    const int first_block = at.stage * kLowbitStageBlocks;
    const shared_t groups = this->groups_of(stage), act_scales = act_scales_of(stage);
    int slot = 0, act_slot = 0;
    load_group(groups);
#pragma unroll(kTokenTiles < 8 ? kLowbitStageBlocks : 1)
    for (int i = 0; i < kLowbitStageBlocks; ++i) {
      const int block = first_block + i;
      if (block >= a.blocks) break;
      if (weights_left == 0) {
        weights_left = w.group_blocks;
        if (i > 0) load_group(groups + ++slot * a.group_bytes);
      }
      --weights_left;
      multiply(stage, i, a.k - kBlockK * block);
      if constexpr (kGrouped) {
        const bool last = block + 1 >= a.blocks || (range_ends && i + 1 == kLowbitStageBlocks);
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

  // A lane holds four consecutive output features of two tokens in every token tile.
  TERSOR_DEVICE void store_rows(int row_block) {
    const int tile = row_block * 8 + warp_tile, row = 16 * tile + 4 * quad;
    const int rows = a.n - row;  // four are the lane's; none where this is not positive
    if (rows <= 0) return;
    const uint8_t* channels = w.scales + (int64_t(tile) * (w.groups + 4) + w.groups + quad) * kPieceBytes;
    const auto scale = ptx::load_global_constant(reinterpret_cast<const ptx::Vec<float, 4>*>(channels));
    float bias[4] = {0, 0, 0, 0};
    if (a.bias != nullptr) add_four(bias, a.y_dtype, a.bias, row, rows);
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
          const float value = static_cast<float>(this->result(r / 2, t, r % 2 * 2 + e));
          values[r] = (kGrouped ? value : value * act) * scale[r] + bias[r];
        }
        if (a.residual != nullptr) add_four(values, a.y_dtype, a.residual, token * a.ldr + row, rows);
        store_four(values, a.y_dtype, a.y, token * a.ldy + row, rows, a.wide_stores);
      }
  }

  // ---- the pipeline -------------------------------------------------------------------------------------------

  TERSOR_DEVICE void run() {
    Position at = {static_cast<int>(begin / a.stages), static_cast<int>(begin % a.stages)};
    Ahead ahead = ahead_at(at.row_block, at.stage);
    const auto fetch_next = [&](uint32_t unit, int slot) {
      if (unit < end) {
        fetch(slot, ahead, unit + 1 == end);
        advance_ahead(ahead);
      }
      ptx::cp_async_commit();  // also when empty: the wait below counts groups
    };
    ptx::region("start");
    for (int slot = 0; slot < kStages - 1; ++slot) fetch_next(begin + slot, slot);
    int slot = 0, free_slot = kStages - 1;
    for (uint32_t unit = begin; unit < end; ++unit) {
      ptx::region("main loop");
      ptx::cp_async_wait<kStages - 2>();  // this thread's part of the stage is there
      ptx::barrier();                     // everyone's part is, and nobody reads the stage before it any more
      fetch_next(unit + kStages - 1, free_slot);
      free_slot = slot;
      if (unit == begin || at.stage == 0) {
        const int block = at.stage * kLowbitStageBlocks;
        this->start_rows(block);
        weights_left = w.group_blocks - block % w.group_blocks;
      }
      multiply_stage(shared + slot * a.stage_bytes, at, unit + 1 == end);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      if (at.stage + 1 == a.stages || unit + 1 == end) {
        ptx::region("results");
        this->end_rows(at.row_block, (at.stage + 1) * kLowbitStageBlocks - 1);
        if (this->reduce(at.row_block)) store_rows(at.row_block);
      }
      this->advance(at);
    }
  }
};

}  // namespace tersor
