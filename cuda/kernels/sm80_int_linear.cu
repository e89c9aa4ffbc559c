// y[m, n] = x[m, k] ((codes - zero_points) * scales)^T + bias: 16-bit activations, integer weights of 2 to 8 bits.
//
// LAYOUT. The stored layout (cpp/cpu/int_layout.h) is the fragment layout: weights are operand A of mma.m16n8k16,
// tokens are its n, and a lane's share of a 16-row x 32-k block is 16 contiguous bytes of each plane (int_tile.h):
//
//     lane = (g, c)      rows of a warp (two storage tiles)          tokens
//     g / 4  tile        quad g % 4: rows 0 1 | 2 3 of four          x[token g, 32 block + 8c .. + 7]: 16 bytes
//     c      k 8c..8c+7  product j = 0: rows 0, 1   j = 1: rows 2, 3 registers 0, 1: step 0    2, 3: step 1
//     result of product j: rows 2j, 2j + 1 for tokens 2c, 2c + 1: four consecutive features, one 8-byte store a token
//
// A block of 4 warps computes 128 rows x 8 * kTokenTiles tokens (tokens 8, 16, 32, 64: dispatch/int_linear_tiles.h) in
// stages of 128 k. Codes become integers code - zero_point without rounding (int_dequantize.h); the scale is applied
// to the fp32 sum of each group. STREAM-K: all (row block, stage) units, cut into equal ranges, one for each block that
// is resident (tile/stream_k.h). Sums are taken in a fixed order: results are the same to the bit in every launch.
//
// SHARED MEMORY, bytes: stages x (2048 bits + 2048 kTokenTiles + group slots x 128 x (scale + zero point)) + 16. With
// 16-bit scales and one slot (groups of 128, 256, .. or a whole row), for 2, 3, 4, 5, 6, 7, 8 bits:
//     kTokenTiles 1   4 stages: 25616  33808  42000  50192  58384  66576  74768
//                 2   4 stages: 33808  42000  50192  58384  66576  74768  82960
//                 4   4 stages: 50192  58384  66576  74768  82960  91152; 8 bits 3 stages: 74512
//                 8   4 stages: 82960  91152; 4 to 7 bits 3 stages: 74512  80656  86800  92944; 8 bits 2 stages: 66064
// The main loop reads and writes it without bank conflicts (int_tile.h and swizzle.h prove it, the tests count it).
// REGISTERS: 65536 / (128 x blocks that share a multiprocessor), no spills; what the gate asserts:
// gate: defines TERSOR_BITS=2,3,4,5,6,7,8
// gate: registers 128 where [2-6], 1>
// gate: registers 168 where [78], 1>|, 2>
// gate: registers 255
// gate: wants HMMA.16816.F32 where Float16
// gate: wants LDGSTS.E.BYPASS LDS.128
//
// FLOORS for 4 bits, bf16, groups of 128, up to 8 tokens, a stage (8192 bytes of codes, 256 of scales): a warp issues
// about 420 instructions on sm_90, 176 of them dequantization and 16 mma; four warps on four schedulers take 420 cycles
// at best, 20 bytes a cycle, where an H200 brings 20.8 a multiprocessor. With 64 tokens 512 mma at two cycles each make
// it 1024 cycles, 8 bytes a cycle. Predictions from counted instructions: nothing here was measured on hardware.
//
// EXPERTS. int_linear_grouped is the same for rows sorted by expert: a block finds its expert and rows from the ends.
//
// LIMITS. Instruction issue, not memory, is the tightest bound for few tokens; mma.sync keeps Hopper from its peak for
// many. Weights are read again for each 64 tokens. m to 2^30, n and k to 2^25; rows of x 16-byte aligned (ops_cuda.py
// copies others); with bf16 and fewer than 8 bits zero points are at most 2^bits. fp32 activations are not taken.
#include "kernels/sm80_int_linear.h"

#include "kernels/instances.h"
#include "ptx/ptx.h"
#include "tile/expert_rows.h"
#include "tile/int_dequantize.h"
#include "tile/int_stages.h"
#include "tile/number.h"
#include "tile/token_tile.h"

namespace tersor {
namespace {

using ptx::shared_t;

template <class Type, int kBits, int kTokenTiles>
struct IntLinear {
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kStages = int_linear_stages(kBits, kTokenTiles);
  static constexpr int kWeightBytes = int_linear_weight_bytes(kBits);
  static constexpr int kTokenBytes = int_linear_token_bytes(kTokenTiles);
  // With 64 tokens the sums fill the registers, and 16 products hide the loads of a block's codes.
  static constexpr bool kLoadAhead = kTokenTiles < 8;
  using Stages = IntStages<kBits>;

  // What is fetched: the group of the stage's first block, and where the lane's first piece of weights and the thread's
  // first piece of tokens lie. Kept up by additions: divisions and 64-bit products would cost as much as the copies.
  struct Source : StreamPosition {
    GroupPlace first;
    const uint8_t* weights;
    const char* tokens;
  };

  const IntLinearArguments& a;
  const int thread = threadIdx.x, lane = thread % 32, c = lane % 4;
  const int row = 32 * (thread / 32) + 4 * (lane / 4);  // the lane's first of four
  const int token0;                                     // the block's first row of x
  const uint32_t begin = a.ranges.first_unit(blockIdx.y), end = a.ranges.first_unit(blockIdx.y + 1);
  const shared_t shared = ptx::dynamic_shared();
  const int scale_bytes = a.scale_dtype == 0 ? 4 : 2;

  float total[2][kTokenTiles][4];  // finished groups, scaled
  float sum[2][kTokenTiles][4];    // the present group, unscaled
  float scale[4];
  IntDequantizer<Type, kBits> dequantizer;
  int group_left;  // blocks until the present group ends

  TERSOR_DEVICE IntLinear(const IntLinearArguments& arguments, int first_row) : a(arguments), token0(first_row) {}

  // ---- global to shared ---------------------------------------------------------------------------------------

  TERSOR_DEVICE Source source_at(const StreamPosition& at) const {
    const int64_t first_token = token0 + thread / kTokenRowPieces;
    return {at, group_of(at.stage * kStreamBlocks, a.group_blocks), Stages::source(a, at.row_block, at.stage),
            static_cast<const char*>(a.x) + 2 * (first_token * a.ldx + kStreamK * at.stage) +
                thread % kTokenRowPieces * kPieceBytes};
  }

  TERSOR_DEVICE void advance(Source& at) const {
    if (at.stage + 1 == a.stages) {
      at = source_at({at.row_block + 1, 0});
      return;
    }
    ++at.stage;
    at.weights += Stages::kTileBytes;
    at.tokens += kTokenRowBytes;
    at.first.advance_stage(a.group_blocks);
  }

  TERSOR_DEVICE void fetch(int slot, const Source& at, bool range_starts) const {
    const shared_t stage = shared + slot * a.stage_bytes, tokens = stage + kWeightBytes;
    Stages::template fetch<(kTokenTiles < 8)>(a, stage, at.weights, at.row_block, at.stage);
    fetch_tokens_16<kTokens>(tokens, at.tokens, a.ldx, token0, a.m, 2 * (a.k - at.stage * kStreamK));
    // The groups that begin in the stage; at the start of a range also the group that it begins in.
    const int left = a.blocks - at.stage * kStreamBlocks, blocks = left < kStreamBlocks ? left : kStreamBlocks;
    const int first_slot = at.first.in_group > 0 && !range_starts ? 1 : 0;
    fetch_groups_of_rows(a, tokens + kTokenBytes, at.row_block, at.first.group, [&](int group) {
      return group >= first_slot && group * a.group_blocks - at.first.in_group < blocks;
    });
  }

  // ---- shared to registers to tensor cores --------------------------------------------------------------------

  // The scales and zero points of the lane's four rows, from slot `slot` of the stage.
  TERSOR_DEVICE void begin_group(shared_t groups, int slot) {
    const shared_t at = groups + slot * a.group_bytes;
    const shared_t scales = at + row * scale_bytes;
    load_four(scale, a.scale_dtype, [&](auto type) { return ptx::load_shared<decltype(type)>(scales); });
    if (a.zero_points != nullptr) {
      dequantizer.set_zero_points(ptx::load_shared<uint32_t>(at + kStreamRows * scale_bytes + row));
    }
    group_left = a.group_blocks;
  }

  TERSOR_DEVICE void end_group() { promote(total, sum, scale); }

  TERSOR_DEVICE void multiply_block(shared_t tokens, const IntFragment<kBits>& codes, int block) {
    uint32_t weights[2][2][4];  // [product j][step s][fragment register]
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t upper[4], lower[4];
      dequantizer.pairs(upper, codes, 2 * j, c);
      dequantizer.pairs(lower, codes, 2 * j + 1, c);
      set_fragments(weights[j], upper, lower);
    }
    multiply_tokens_16<Type>(sum, weights, tokens, block);
  }

  TERSOR_DEVICE void multiply_stage(int slot, const StreamPosition& at, bool run_starts) {
    const shared_t stage = shared + slot * a.stage_bytes, tokens = stage + kWeightBytes, groups = tokens + kTokenBytes;
    const int first_block = at.stage * kStreamBlocks;
    if (run_starts) {
      clear_sums(total);
      clear_sums(sum);
      begin_group(groups, 0);
      group_left -= first_block % a.group_blocks;
    }
    int group_slot = 0;
    IntFragment<kBits> codes, next;
    if (kLoadAhead) next = Stages::load(stage, 0);
#pragma unroll(kLoadAhead ? kStreamBlocks : 1)
    for (int block = 0; block < kStreamBlocks; ++block) {
      codes = kLoadAhead ? next : Stages::load(stage, block);
      if (kLoadAhead && block + 1 < kStreamBlocks) next = Stages::load(stage, block + 1);
      if (block > 0 && group_left == 0) ++group_slot;
      if (group_left == 0 && first_block + block < a.blocks) {
        end_group();
        begin_group(groups, group_slot);
      }
      multiply_block(tokens, codes, block);
      --group_left;
    }
  }

  TERSOR_DEVICE void run() {
    dequantizer.set_zero_points((1u << (kBits - 1)) * 0x01010101u);
    Source ahead = source_at(position_of(begin, a.stages));
    const auto fetch_next = [&](int slot, uint32_t unit) {
      fetch(slot, ahead, unit == begin);
      advance(ahead);
    };
    const auto multiply = [&](int slot, const StreamPosition& at, uint32_t unit) {
      multiply_stage(slot, at, unit == begin || at.stage == 0);
    };
    const auto finish = [&](const StreamPosition& at) {
      constexpr int at_once = kTokenTiles < 4 ? 4 / kTokenTiles : 1;
      end_group();
      if (sum_ranges<at_once, kTokenTiles>(total, a, a.ranges, at.row_block, (a.tiles + 7) / 8,
                                           shared + kStages * a.stage_bytes)) {
        store_rows<Type>(total, a, at.row_block, token0, [](int) { return 1.0f; });
      }
    };
    run_stages<kStages>(begin, end, a.stages, fetch_next, multiply, finish);
  }
};

template <class Type, int kBits, int kTokenTiles>
__global__ void __launch_bounds__(kStreamThreads, int_linear_blocks_per_multiprocessor(kBits, kTokenTiles))
    int_linear(const IntLinearArguments arguments) {
  IntLinear<Type, kBits, kTokenTiles>(arguments, blockIdx.x * 8 * kTokenTiles).run();
}

// ---- a mixture of experts -----------------------------------------------------------------------------------------

template <class Type, int kBits, int kTokenTiles>
__global__ void __launch_bounds__(kStreamThreads, int_linear_blocks_per_multiprocessor(kBits, kTokenTiles))
    int_linear_grouped(const IntLinearArguments arguments, const ExpertWeights experts) {
  constexpr int tokens = 8 * kTokenTiles;
  const ExpertRows rows = rows_of_block(experts, blockIdx.x, tokens);
  if (rows.expert < 0) return;
  IntLinearArguments a = arguments;
  if (rows.expert == experts.count) {
    const int count = rows.end - rows.begin < tokens ? rows.end - rows.begin : tokens;
    for (int i = blockIdx.y * kStreamThreads + threadIdx.x; i < count * a.n; i += gridDim.y * kStreamThreads) {
      ptx::store_global(static_cast<uint16_t*>(a.y) + (rows.begin + i / a.n) * a.ldy + i % a.n, uint16_t(0));
    }
    return;
  }
  a.m = rows.end;
  choose_expert(a, experts, rows.expert, 2);
  IntLinear<Type, kBits, kTokenTiles>(a, rows.begin).run();
}

IntLinearKernel* choose_kernel(bool is_bfloat16, int token_tiles) {
  return instance_for<IntLinearKernel>(is_bfloat16, token_tiles, [](auto type, auto tiles) -> IntLinearKernel* {
    return int_linear<decltype(type), TERSOR_BITS, decltype(tiles)::value>;
  });
}
const bool entered = (int_linear_choosers[TERSOR_BITS] = choose_kernel, true);

template <int kBits>
IntLinearGroupedKernel* choose_grouped(bool is_bfloat16, int token_tiles) {
  switch (token_tiles) {
    case 1: return is_bfloat16 ? int_linear_grouped<BFloat16, kBits, 1> : int_linear_grouped<Float16, kBits, 1>;
    case 4: return is_bfloat16 ? int_linear_grouped<BFloat16, kBits, 4> : int_linear_grouped<Float16, kBits, 4>;
    default: return nullptr;
  }
}
const bool entered_grouped = (int_linear_grouped_choosers[TERSOR_BITS] = choose_grouped<TERSOR_BITS>, true);

}  // namespace
}  // namespace tersor
