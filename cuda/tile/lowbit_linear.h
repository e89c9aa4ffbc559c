// The integer GEMM behind sm80_lowbit_linear.cu and sm80_lowbit_linear_s4.cu, which describe it.
#pragma once

#include "kernels/sm80_lowbit_linear.h"
#include "ptx/ptx.h"
#include "tile/act_codes.h"
#include "tile/four_results.h"
#include "tile/int_tile.h"
#include "tile/lowbit_codes.h"
#include "tile/number.h"

namespace tersor {

template <int kBits, int kTokenTiles, bool kGrouped, int kWidth>
struct LowbitLinear {
  using shared_t = ptx::shared_t;
  // What crosses blocks: sums of scaled groups, or where nothing changes along k the integers themselves.
  using Sum = std::conditional_t<kGrouped, float, int32_t>;
  using Four = ptx::Vec<Sum, 4>;

  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kStages = lowbit_stages(kBits, kTokenTiles, kWidth, kGrouped);
  static constexpr int kBlockBytes = 64 * kBits;
  static constexpr int kBlockPieces = kBlockBytes / kPieceBytes;
  static constexpr int kTilePieces = kLowbitStageBlocks * kBlockPieces;  // one tile, one stage
  static constexpr int kTileBytes = kTilePieces * kPieceBytes;
  static constexpr int kWeightBytes = lowbit_weight_bytes(kBits);
  static constexpr int kTokenBytes = lowbit_token_bytes(kTokenTiles, kWidth);
  static_assert(kWidth == kLowbitBytes || kBits == 4, "4-bit products take 4-bit weights");
  static_assert(kWidth != kLowbitMixed || kGrouped, "blocks of two widths have scales of their own");
  static_assert(kGrouped ? kTokenTiles <= 8 : kTokenTiles <= 16, "sums, and totals where there are, fit the registers");

  struct Position {
    int row_block, stage;
  };
  // What is fetched: the groups of the stage's first block, that block's place in them, and where the lane's first
  // piece of weights lies. Kept up by additions.
  struct Source : Position {
    int group, in_group, act_group, in_act_group;
    const uint8_t* weights;
  };

  const LowbitLinearArguments& a;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, c = lane % 4, quad = g % 4;
  const int warp_tile = 2 * warp + g / 4;         // the lane's storage tile among the block's eight
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
    if constexpr (kWidth != kLowbitMixed) return range * a.share + (range < a.extra ? range : a.extra);
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
    if constexpr (kWidth != kLowbitMixed) {
      const uint32_t longer = a.extra * (a.share + 1);
      return unit < longer ? unit / (a.share + 1) : a.extra + (unit - longer) / a.share;
    }
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
  // A copy of 0 bytes fills its 16 with zeros and reads nothing, wherever its source points.

  TERSOR_DEVICE Source source_at(int row_block, int stage) const {
    const int first_block = stage * kLowbitStageBlocks;
    const int group = kGrouped ? first_block / a.group_blocks : 0;
    const int act_group = kGrouped ? first_block / a.act_group_blocks : 0;
    const int64_t tile = row_block * 8 + 2 * warp;
    return {{row_block, stage}, group, first_block - group * a.group_blocks, act_group,
            first_block - act_group * a.act_group_blocks,
            a.qweight + tile * a.blocks * kBlockBytes + stage * kTileBytes + lane * kPieceBytes};
  }

  TERSOR_DEVICE void advance(Source& at) const {
    if (at.stage + 1 == a.stages) {
      at = source_at(at.row_block + 1, 0);
      return;
    }
    ++at.stage;
    at.weights += kTileBytes;
    if constexpr (kGrouped) {
      at.in_group += kLowbitStageBlocks;
      for (; at.in_group >= a.group_blocks; ++at.group) at.in_group -= a.group_blocks;
      at.in_act_group += kLowbitStageBlocks;
      for (; at.in_act_group >= a.act_group_blocks; ++at.act_group) at.in_act_group -= a.act_group_blocks;
    }
  }

  // A warp fetches the two storage tiles that it multiplies: whole 16-byte pieces, 512 contiguous bytes at a time.
  TERSOR_DEVICE void fetch_weights(shared_t stage, const Source& at) const {
    const int tiles_left = a.tiles - (at.row_block * 8 + 2 * warp);
    const int blocks_left = a.blocks - at.stage * kLowbitStageBlocks;
    const int64_t next_tile = int64_t(a.blocks) * kBlockBytes - kTileBytes;
    const shared_t targets = stage + 2 * warp * kTileBytes;
#pragma unroll(kTokenTiles < 8 ? kBits : 1)  // with many tokens the addresses of all pieces would not fit
    for (int i = 0; i < kBits; ++i) {
      const int index = lane + 32 * i;  // of a piece in both tiles: shared memory has them in this order
      const int tile = index / kTilePieces, block = index % kTilePieces / kBlockPieces;
      const int piece = 32 % kBlockPieces == 0 ? lane % kBlockPieces : index % kBlockPieces;
      const bool inside = tile < tiles_left && block < blocks_left;
      const uint8_t* source = at.weights + 32 * i * kPieceBytes + (tile == 0 ? 0 : next_tile);
      const shared_t target = targets + (swizzled_piece(kBits, piece) - piece + index) * kPieceBytes;
      ptx::cp_async_16_once(target, source, inside ? kPieceBytes : 0);
    }
  }

  // Rows past m become zeros; channels past k are zeros in memory.
  template <bool kBytes>
  TERSOR_DEVICE void fetch_tokens(shared_t tokens, int offset) const {
    constexpr int row_bytes = kBytes ? kLowbitStageK : kLowbitStageK / 2, pieces = row_bytes / kPieceBytes;
    constexpr int at_once = kLowbitThreads / pieces;
    const int piece = thread % pieces, first = thread / pieces;
    const uint8_t* source = a.codes + (token0 + first) * a.row_bytes + offset + piece * kPieceBytes;
#pragma unroll(kTokenTiles < 16 ? 4 : 1)
    for (int token = first; token < kTokens; token += at_once) {
      const int swizzled = kBytes ? swizzled_byte_piece(token, piece) : swizzled_nibble_piece(token, piece);
      ptx::cp_async_16(tokens + token * row_bytes + swizzled * kPieceBytes, source,
                       token0 + token < a.m ? kPieceBytes : 0);
      source += at_once * a.row_bytes;
    }
  }

  // Scales and zero points of all groups that the stage touches, where a segment ends in it: a group of either side,
  // a row of k, or the range.
  TERSOR_DEVICE void fetch_groups(shared_t groups, const Source& at, bool range_ends) const {
    if (at.in_group + kLowbitStageBlocks < a.group_blocks &&
        at.in_act_group + kLowbitStageBlocks < a.act_group_blocks && at.stage + 1 < a.stages && !range_ends) {
      return;
    }
    const int left = a.blocks - at.stage * kLowbitStageBlocks;
    const int blocks = left < kLowbitStageBlocks ? left : kLowbitStageBlocks;
    const auto touched = [&](int slot) { return slot * a.group_blocks - at.in_group < blocks; };
    // One piece of scales at most for a thread, and one of zero points, from the other end of the block.
    const int shift = a.scale_dtype == 0 ? 2 : 1, pieces = 1 << shift;  // of 16 scales
    if (thread < a.group_slots * 8 * pieces) {
      const int piece = thread & (pieces - 1), tile = thread >> shift & 7, slot = thread >> (shift + 3);
      const int64_t group = int64_t(at.row_block * 8 + tile) * a.groups + at.group + slot;
      if (touched(slot)) {
        ptx::cp_async_16(groups + slot * a.group_bytes + (tile * pieces + piece) * kPieceBytes,
                         static_cast<const char*>(a.scales) + (group * pieces + piece) * kPieceBytes,
                         at.row_block * 8 + tile < a.tiles ? kPieceBytes : 0);
      }
    }
    const int index = kLowbitThreads - 1 - thread;
    if (a.zero_points != nullptr && index < a.group_slots * 8) {
      const int tile = index % 8, slot = index / 8;
      const int64_t group = int64_t(at.row_block * 8 + tile) * a.groups + at.group + slot;
      if (touched(slot)) {
        ptx::cp_async_16(groups + slot * a.group_bytes + kLowbitRows * scale_bytes + tile * kPieceBytes,
                         a.zero_points + group * kPieceBytes, at.row_block * 8 + tile < a.tiles ? kPieceBytes : 0);
      }
    }
    const shared_t act_scales = groups + a.group_slots * a.group_bytes;
    for (int i = thread; i < a.act_slots * kTokens; i += kLowbitThreads) {
      const int slot = i / kTokens, token = token0 + i % kTokens;
      if (slot * a.act_group_blocks - at.in_act_group < blocks) {
        ptx::cp_async_4(act_scales + 4 * i, a.act_scales + token * a.act_scale_stride + at.act_group + slot,
                        token < a.m ? 4 : 0);
      }
    }
  }
  static_assert(4 * 8 * 4 <= kLowbitThreads, "four slots of fp32 scales are one piece for a thread");

  TERSOR_DEVICE shared_t groups_of(shared_t stage) const { return stage + kWeightBytes + kTokenBytes; }
  TERSOR_DEVICE shared_t sums_of(shared_t stage) const {
    return groups_of(stage) + (kGrouped ? a.group_slots * a.group_bytes + a.act_slots * kTokens * 4 : 0);
  }

  TERSOR_DEVICE void fetch(int slot, const Source& at, bool range_ends) const {
    const shared_t stage = shared + slot * a.stage_bytes, tokens = stage + kWeightBytes;
    fetch_weights(stage, at);
    if constexpr (kWidth == kLowbitMixed) {
      const int start = stage_table(at.stage);
      if (bytes_in(at.stage)) {
        fetch_tokens<true>(tokens, 64 * start);
      } else {
        fetch_tokens<false>(tokens, 64 * start);
      }
    } else {
      fetch_tokens<kWidth == kLowbitBytes>(tokens, at.stage * (kLowbitStageK >> kWidth));
    }
    if constexpr (kGrouped) fetch_groups(groups_of(stage), at, range_ends);
    if (a.zero_points != nullptr && thread < kTokens) {
      const int token = token0 + thread;
      ptx::cp_async_8(sums_of(stage) + 8 * thread, a.sums + (int64_t(token) * a.stages + at.stage) * 4,
                      token < a.m ? 8 : 0);
    }
  }

  TERSOR_DEVICE void advance(Position& at) const {
    if (++at.stage == a.stages) {
      at.stage = 0;
      ++at.row_block;
    }
  }

  // ---- shared to registers to tensor cores --------------------------------------------------------------------

  TERSOR_DEVICE IntFragment<kBits> load_codes(shared_t stage, int block) const {
    const shared_t at = stage + (warp_tile * kLowbitStageBlocks + block) * kBlockBytes;
    IntFragment<kBits> codes;
    const auto load_piece = [&](int offset) { return ptx::load_shared<ptx::Vec<uint32_t, 4>>(at + offset); };
    codes.template load<true>(load_piece, c, quad);
    return codes;
  }

  // Fragment rows g and g + 8 of product j are the lane's rows 2j and 2j + 1.
  TERSOR_DEVICE void multiply_bytes(shared_t stage, int block, int channels_left) {
    using Unpacker = LowbitUnpacker<kBits>;
    const IntFragment<kBits> codes = load_codes(stage, block);
    uint32_t weights[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      weights[j][0] = Unpacker::template bytes<0>(codes, 2 * j, c);
      weights[j][1] = Unpacker::template bytes<0>(codes, 2 * j + 1, c);
      weights[j][2] = Unpacker::template bytes<1>(codes, 2 * j, c);
      weights[j][3] = Unpacker::template bytes<1>(codes, 2 * j + 1, c);
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int token = 8 * t + g;
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

  // Blocks `block` and the next: 4-bit codes are multiplied as they are stored, the highest bit flipped.
  TERSOR_DEVICE void multiply_nibbles(shared_t stage, int block) {
    const IntFragment<kBits> first = load_codes(stage, block), second = load_codes(stage, block + 1);
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
      ptx::ldmatrix_x2(x, stage + kWeightBytes + token * (kLowbitStageK / 2) +
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
    const int row = 16 * warp_tile + 4 * quad;
    const shared_t group = groups + slot * a.group_bytes, scales = group + row * scale_bytes;
    const shared_t act_scales = groups + a.group_slots * a.group_bytes + act_slot * kTokens * 4;
    float scale[4];
    load_four(scale, a.scale_dtype, [&](auto type) { return ptx::load_shared<decltype(type)>(scales); });
#pragma unroll
    for (int r = 0; r < 4; ++r) scale[r] *= 1.0f / factor;
    if (a.zero_points != nullptr || a.act_zero_points != nullptr) {
      const shared_t zero_points = group + kLowbitRows * scale_bytes + row;
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
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight_sum[j][i] = 0;
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) sum[j][t][i] = 0;
      }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) code_sum[t][0] = code_sum[t][1] = 0;
  }

  // A row block, or the range, begins at block `block`.
  TERSOR_DEVICE void start_rows(int block) {
    clear_segment();
    segment_block = block;
    if constexpr (kGrouped) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) total[j][t][i] = 0;
      group_left = a.group_blocks - block % a.group_blocks;
      act_group_left = a.act_group_blocks - block % a.act_group_blocks;
    }
  }

  template <bool kBytes>
  TERSOR_DEVICE void multiply_stage(shared_t stage, const Position& at, bool range_ends) {
    constexpr int step = kBytes ? 1 : 2;  // blocks of a product
    const int first_block = at.stage * kLowbitStageBlocks;
    const shared_t groups = groups_of(stage), sums = sums_of(stage);
    int slot = 0, act_slot = 0;
#pragma unroll(kTokenTiles < 8 ? kLowbitStageBlocks : 1)
    for (int i = 0; i < kLowbitStageBlocks; i += step) {
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
        const bool last = block + step >= a.blocks || (range_ends && i + step == kLowbitStageBlocks);
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

  TERSOR_DEVICE Sum& result(int j, int t, int i) {
    if constexpr (kGrouped) {
      return total[j][t][i];
    } else {
      return sum[j][t][i];
    }
  }

  TERSOR_DEVICE Four* partial(uint32_t slot) const {
    constexpr int words = kLowbitRows * kTokens;
    const int64_t at = (int64_t(blockIdx.x) * gridDim.y * 2 + slot) * words;
    return reinterpret_cast<Four*>(a.partials + at) + thread;
  }

  // Whether this block now holds the whole sum of the row block. A row block that several ranges share is summed by
  // the last of them to arrive, in the order of the ranges: nobody waits, and the result is the same whoever is last.
  // The counter wraps to zero, so it is ready for the next launch.
  TERSOR_DEVICE bool reduce(int row_block) {
    const uint32_t first_unit_of_rows = uint32_t(row_block) * a.stages;
    const uint32_t first = range_of(first_unit_of_rows), last = range_of(first_unit_of_rows + a.stages - 1);
    if (first == last) return true;
    // A range's first row block goes to its even slot, its last one, if another, to the odd one.
    const auto slot_of = [&](uint32_t range) { return 2 * range + (first_unit(range) < first_unit_of_rows ? 1 : 0); };

    Four* mine = partial(slot_of(blockIdx.y));
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Four four;
        for (int i = 0; i < 4; ++i) four[i] = result(j, t, i);
        ptx::store_global(mine + (2 * t + j) * kLowbitThreads, four);
      }
    ptx::barrier();
    const shared_t flag = shared + kStages * a.stage_bytes;
    if (thread == 0) {
      ptx::fence();  // what the block stored before the barrier, before the arrival
      uint32_t* counter = a.counters + blockIdx.x * ((a.tiles + 7) / 8) + row_block;
      const uint32_t arrived = ptx::atomic_inc_wrap(counter, last - first);
      ptx::fence();  // the others' arrivals, before their sums are read
      ptx::store_shared<uint32_t>(flag, arrived);
    }
    ptx::barrier();
    if (ptx::load_shared<uint32_t>(flag) != last - first) return false;

#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) result(j, t, i) = 0;
    for (uint32_t range = first; range <= last; ++range) {
      const Four* slot = partial(slot_of(range));
      constexpr int at_once = kTokenTiles < 4 ? kTokenTiles : 4;  // loads under way; more would not fit the registers
#pragma unroll
      for (int t0 = 0; t0 < kTokenTiles; t0 += at_once) {
        Four theirs[at_once][2];
#pragma unroll
        for (int i = 0; i < 2 * at_once; ++i) {
          theirs[i / 2][i % 2] = ptx::load_global_volatile(slot + (2 * t0 + i) * kLowbitThreads);
        }
#pragma unroll
        for (int i = 0; i < 2 * at_once; ++i)
#pragma unroll
          for (int f = 0; f < 4; ++f) result(i % 2, t0 + i / 2, f) += theirs[i / 2][i % 2][f];
      }
    }
    return true;
  }

  // Integers of a whole row take their zero points before ranges are summed: both are exact.
  TERSOR_DEVICE void end_rows(int row_block, int last) {
    if constexpr (!kGrouped) {
      const int tile = row_block * 8 + warp_tile;
      if (a.zero_points == nullptr && a.act_zero_points == nullptr) return;
      const bool inside = a.zero_points != nullptr && tile < a.tiles;
      const uint32_t zero_points =
          inside ? ptx::load_global_constant(reinterpret_cast<const uint32_t*>(a.zero_points + tile * 16) + quad) : 0;
      add_zero_points(zero_points, kWidth == kLowbitBytes ? lowbit_factor(kBits) : 1, 0, last);
    }
  }

  // A lane holds four consecutive output features of two tokens in every token tile.
  TERSOR_DEVICE void store(int row_block) {
    const int tile = row_block * 8 + warp_tile, row = 16 * tile + 4 * quad;
    const int rows = a.n - row;  // four are the lane's; none where this is not positive
    if (rows <= 0) return;
    float scale[4] = {1, 1, 1, 1}, bias[4] = {0, 0, 0, 0};
    if constexpr (!kGrouped) {
      const char* scales = static_cast<const char*>(a.scales) + int64_t(row) * scale_bytes;
      load_four(scale, a.scale_dtype, [&](auto type) {
        return ptx::load_global_constant(reinterpret_cast<const decltype(type)*>(scales));
      });
#pragma unroll
      for (int r = 0; r < 4; ++r) scale[r] *= 1.0f / (kWidth == kLowbitBytes ? lowbit_factor(kBits) : 1);
    }
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
          const float value = static_cast<float>(result(r / 2, t, r % 2 * 2 + e));
          values[r] = (kGrouped ? value : scale[r] * act * value) + bias[r];
        }
        if (a.residual != nullptr) add_four(values, a.y_dtype, a.residual, token * a.ldr + row, rows);
        store_four(values, a.y_dtype, a.y, token * a.ldy + row, rows, a.wide_stores);
      }
  }

  // ---- the pipeline -------------------------------------------------------------------------------------------

  TERSOR_DEVICE void run() {
    Position at = {static_cast<int>(begin / a.stages), static_cast<int>(begin % a.stages)};
    Source ahead = source_at(at.row_block, at.stage);
    const auto fetch_next = [&](uint32_t unit, int slot) {
      if (unit < end) {
        fetch(slot, ahead, unit + 1 == end);
        advance(ahead);
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
      if (unit == begin || at.stage == 0) start_rows(at.stage * kLowbitStageBlocks);
      const shared_t stage = shared + slot * a.stage_bytes;
      if (bytes_in(at.stage)) {
        if constexpr (kWidth != kLowbitNibbles) multiply_stage<true>(stage, at, unit + 1 == end);
      } else {
        if constexpr (kWidth != kLowbitBytes) multiply_stage<false>(stage, at, unit + 1 == end);
      }
      slot = slot + 1 == kStages ? 0 : slot + 1;
      if (at.stage + 1 == a.stages || unit + 1 == end) {
        ptx::region("results");
        end_rows(at.row_block, (at.stage + 1) * kLowbitStageBlocks - 1);
        if (reduce(at.row_block)) store(at.row_block);
      }
      advance(at);
    }
  }
};

}  // namespace tersor
