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
// is resident; see reduce(). Sums are taken in a fixed order: results are the same to the bit in every launch.
//
// SHARED MEMORY, bytes: stages x (2048 bits + 2048 kTokenTiles + group slots x 128 x (scale + zero point)) + 16. With
// 16-bit scales and one slot (groups of 128, 256, .. or a whole row), for 2, 3, 4, 5, 6, 7, 8 bits:
//     kTokenTiles 1   4 stages: 25616  33808  42000  50192  58384  66576  74768
//                 2   4 stages: 33808  42000  50192  58384  66576  74768  82960
//                 4   4 stages: 50192  58384  66576  74768  82960  91152; 8 bits 3 stages: 74512
//                 8   4 stages: 82960  91152; 4 to 7 bits 3 stages: 74512  80656  86800  92944; 8 bits 2 stages: 66064
// The main loop reads and writes it without bank conflicts (int_tile.h proves it, the tests count it).
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

#include "ptx/ptx.h"
#include "tile/expert_rows.h"
#include "tile/int_dequantize.h"
#include "tile/int_tile.h"
#include "tile/number.h"

namespace tersor {
namespace {

using ptx::shared_t;

template <class Type, int kBits, int kTokenTiles>
struct IntLinear {
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kStages = int_linear_stages(kBits, kTokenTiles);
  static constexpr int kBlockBytes = 64 * kBits;
  static constexpr int kBlockPieces = kBlockBytes / kPieceBytes;
  static constexpr int kTilePieces = kIntLinearStageBlocks * kBlockPieces;  // one tile, one stage
  static constexpr int kTileBytes = kTilePieces * kPieceBytes;
  static constexpr int kWeightBytes = int_linear_weight_bytes(kBits);
  static constexpr int kTokenBytes = int_linear_token_bytes(kTokenTiles);
  // With 64 tokens the sums fill the registers, and 16 products hide the loads of a block's codes.
  static constexpr bool kLoadAhead = kTokenTiles < 8;
  static constexpr int kTokenRowBytes = 2 * kIntLinearStageK, kTokenRowPieces = kTokenRowBytes / kPieceBytes;
  static constexpr int kRowsAtOnce = kIntLinearThreads / kTokenRowPieces;  // of tokens, fetched by the block
  static_assert(kRowsAtOnce % 2 == 0, "the pieces that a thread fetches have one swizzle");
  static_assert(kTokenRowBytes % 128 == 0, "swizzled_token_piece is for rows of whole bank cycles");

  // Where in the sequence of units a range stands.
  struct Position {
    int row_block, stage;
  };
  // The same for what is fetched: the group of the stage's first block, that block's place in it, and where the lane's
  // first piece of weights and the thread's first piece of tokens lie. Kept up by additions: divisions and 64-bit
  // products would cost as much as the copies.
  struct Source : Position {
    int group, in_group;
    const uint8_t* weights;
    const char* tokens;
  };

  const IntLinearArguments& a;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, c = lane % 4, quad = g % 4;
  const int warp_tile = 2 * warp + g / 4;  // the lane's storage tile among the block's eight
  const int token0;  // the block's first row of x
  const int token = thread / kTokenRowPieces, token_piece = thread % kTokenRowPieces;  // the first that it fetches
  const int first_token = token0 + token;
  const uint32_t begin = first_unit(blockIdx.y), end = first_unit(blockIdx.y + 1);
  const shared_t shared = ptx::dynamic_shared();
  const int scale_bytes = a.scale_dtype == 0 ? 4 : 2;

  float total[2][kTokenTiles][4];  // finished groups, scaled
  float sum[2][kTokenTiles][4];    // the present group, unscaled
  float scale[4];
  IntDequantizer<Type, kBits> dequantizer;
  int group_left;  // blocks until the present group ends

  TERSOR_DEVICE IntLinear(const IntLinearArguments& arguments, int first_row) : a(arguments), token0(first_row) {}

  TERSOR_DEVICE uint32_t first_unit(uint32_t range) const {
    return range * a.share + (range < a.extra ? range : a.extra);
  }
  TERSOR_DEVICE uint32_t range_of(uint32_t unit) const {
    const uint32_t longer = a.extra * (a.share + 1);
    return unit < longer ? unit / (a.share + 1) : a.extra + (unit - longer) / a.share;
  }

  // ---- global to shared ---------------------------------------------------------------------------------------
  // A copy of 0 bytes fills its 16 with zeros and reads nothing, wherever its source points.

  TERSOR_DEVICE Source source_at(int row_block, int stage) const {
    const int first_block = stage * kIntLinearStageBlocks, group = first_block / a.group_blocks;
    const int64_t tile = row_block * 8 + 2 * warp;
    return {{row_block, stage}, group, first_block - group * a.group_blocks,
            a.qweight + tile * a.blocks * kBlockBytes + stage * kTileBytes + lane * kPieceBytes,
            static_cast<const char*>(a.x) + 2 * (int64_t(first_token) * a.ldx + kIntLinearStageK * stage) +
                token_piece * kPieceBytes};
  }

  TERSOR_DEVICE void advance(Source& at) const {
    if (at.stage + 1 == a.stages) {
      at = source_at(at.row_block + 1, 0);
      return;
    }
    ++at.stage;
    at.weights += kTileBytes;
    at.tokens += kTokenRowBytes;
    at.in_group += kIntLinearStageBlocks;
    while (at.in_group >= a.group_blocks) {
      at.in_group -= a.group_blocks;
      ++at.group;
    }
  }

  // A warp fetches the two storage tiles that it multiplies: whole 16-byte pieces, 512 contiguous bytes at a time.
  TERSOR_DEVICE void fetch_weights(shared_t stage, const Source& at) const {
    const int tiles_left = a.tiles - (at.row_block * 8 + 2 * warp);
    const int blocks_left = a.blocks - at.stage * kIntLinearStageBlocks;
    const int64_t next_tile = int64_t(a.blocks) * kBlockBytes - kTileBytes;
    const shared_t targets = stage + 2 * warp * kTileBytes;
#pragma unroll(kTokenTiles < 8 ? kBits : 1)  // with 64 tokens the addresses of all pieces would not fit
    for (int i = 0; i < kBits; ++i) {
      const int index = lane + 32 * i;  // of a piece in both tiles: shared memory has them in this order
      const int tile = index / kTilePieces, block = index % kTilePieces / kBlockPieces;
      const int piece = 32 % kBlockPieces == 0 ? lane % kBlockPieces : index % kBlockPieces;
      const bool inside = tile < tiles_left && block < blocks_left;
      const uint8_t* source = at.weights + 32 * i * kPieceBytes + (tile == 0 ? 0 : next_tile);
      const shared_t target = targets + (swizzled_piece(kBits, piece) - piece + lane) * kPieceBytes +
                              32 * i * kPieceBytes;
      ptx::cp_async_16_once(target, source, inside ? kPieceBytes : 0);
    }
  }

  // Rows past m and columns past k become zeros, so what the padding of the weights holds does not matter.
  TERSOR_DEVICE void fetch_tokens(shared_t stage, const Source& at) const {
    const int left = 2 * (a.k - at.stage * kIntLinearStageK) - token_piece * kPieceBytes;
    const int bytes = left <= 0 ? 0 : left < kPieceBytes ? left : kPieceBytes;
    const char* source = at.tokens;
    const shared_t target = stage + token * kTokenRowBytes + swizzled_token_piece(token, token_piece) * kPieceBytes;
#pragma unroll
    for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
      const bool inside = first_token + kRowsAtOnce * i < a.m;
      ptx::cp_async_16(target + kRowsAtOnce * i * kTokenRowBytes, source, inside ? bytes : 0);
      source += 2 * kRowsAtOnce * a.ldx;
    }
  }

  // Scales and zero points of the groups that begin in the stage; at the start of a range also of the group that
  // it begins in. A slot holds 16 scales (and zero points) of each of the eight tiles.
  TERSOR_DEVICE void fetch_groups(shared_t stage, const Source& at, bool range_starts) const {
    const int left = a.blocks - at.stage * kIntLinearStageBlocks;
    const int blocks = left < kIntLinearStageBlocks ? left : kIntLinearStageBlocks;
    const int first_slot = at.in_group > 0 && !range_starts ? 1 : 0;
    const auto begins = [&](int slot) { return slot >= first_slot && slot * a.group_blocks - at.in_group < blocks; };
    // One piece of scales at most for a thread, and one of zero points, from the other end of the block.
    const int shift = a.scale_dtype == 0 ? 2 : 1, pieces = 1 << shift;  // of 16 scales
    if (thread < a.group_slots * 8 * pieces) {
      const int piece = thread & (pieces - 1), tile = thread >> shift & 7, slot = thread >> (shift + 3);
      const int64_t group = int64_t(at.row_block * 8 + tile) * a.groups + at.group + slot;
      if (begins(slot)) {
        ptx::cp_async_16(stage + slot * a.group_bytes + (tile * pieces + piece) * kPieceBytes,
                         static_cast<const char*>(a.scales) + (group * pieces + piece) * kPieceBytes,
                         at.row_block * 8 + tile < a.tiles ? kPieceBytes : 0);
      }
    }
    const int index = kIntLinearThreads - 1 - thread;
    if (a.zero_points != nullptr && index < a.group_slots * 8) {
      const int tile = index % 8, slot = index / 8;
      const int64_t group = int64_t(at.row_block * 8 + tile) * a.groups + at.group + slot;
      if (begins(slot)) {
        ptx::cp_async_16(stage + slot * a.group_bytes + kIntLinearRows * scale_bytes + tile * kPieceBytes,
                         a.zero_points + group * kPieceBytes, at.row_block * 8 + tile < a.tiles ? kPieceBytes : 0);
      }
    }
  }
  static_assert(4 * 8 * 4 <= kIntLinearThreads, "four slots of fp32 scales are one piece for a thread");

  TERSOR_DEVICE void fetch(int slot, const Source& at, bool range_starts) const {
    const shared_t stage = shared + slot * a.stage_bytes;
    fetch_weights(stage, at);
    fetch_tokens(stage + kWeightBytes, at);
    fetch_groups(stage + kWeightBytes + kTokenBytes, at, range_starts);
  }

  TERSOR_DEVICE void advance(Position& at) const {
    if (++at.stage == a.stages) {
      at.stage = 0;
      ++at.row_block;
    }
  }

  // ---- shared to registers to tensor cores --------------------------------------------------------------------

  // The scales and zero points of the lane's four rows, from slot `slot` of the stage.
  TERSOR_DEVICE void begin_group(shared_t groups, int slot) {
    const shared_t at = groups + slot * a.group_bytes;
    const int row = 16 * warp_tile + 4 * quad;
    const shared_t scales = at + row * scale_bytes;
    load_four(scale, a.scale_dtype, [&](auto type) { return ptx::load_shared<decltype(type)>(scales); });
    if (a.zero_points != nullptr) {
      dequantizer.set_zero_points(ptx::load_shared<uint32_t>(at + kIntLinearRows * scale_bytes + row));
    }
    group_left = a.group_blocks;
  }

  // total += scale * sum, sum = 0. Fragment rows g and g + 8 of product j are the lane's rows 2j and 2j + 1.
  TERSOR_DEVICE void end_group() {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[j][t][i] += scale[2 * j + i / 2] * sum[j][t][i];
          sum[j][t][i] = 0;
        }
  }

  TERSOR_DEVICE IntFragment<kBits> load_codes(shared_t stage, int block) const {
    const shared_t at = stage + (warp_tile * kIntLinearStageBlocks + block) * kBlockBytes;
    IntFragment<kBits> codes;
    const auto load_piece = [&](int offset) { return ptx::load_shared<ptx::Vec<uint32_t, 4>>(at + offset); };
    codes.template load<true>(load_piece, c, quad);
    return codes;
  }

  TERSOR_DEVICE void multiply_block(shared_t tokens, const IntFragment<kBits>& codes, int block) {
    uint32_t weights[2][2][4];  // [product j][step s][fragment register]
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t upper[4], lower[4];
      dequantizer.pairs(upper, codes, 2 * j, c);
      dequantizer.pairs(lower, codes, 2 * j + 1, c);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        weights[j][s][0] = upper[2 * s];
        weights[j][s][1] = lower[2 * s];
        weights[j][s][2] = upper[2 * s + 1];
        weights[j][s][3] = lower[2 * s + 1];
      }
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int token = 8 * t + g;
      const auto x = ptx::load_shared<ptx::Vec<uint32_t, 4>>(tokens + token * kTokenRowBytes +
                                                             swizzled_token_piece(token, 4 * block + c) * kPieceBytes);
      const uint32_t steps[2][2] = {{x[0], x[1]}, {x[2], x[3]}};
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int j = 0; j < 2; ++j) Type::mma(sum[j][t], weights[j][s], steps[s]);
    }
  }

  TERSOR_DEVICE void multiply_stage(int slot, const Position& at, bool run_starts) {
    const shared_t stage = shared + slot * a.stage_bytes, tokens = stage + kWeightBytes, groups = tokens + kTokenBytes;
    const int first_block = at.stage * kIntLinearStageBlocks;
    if (run_starts) {
      clear();
      begin_group(groups, 0);
      group_left -= first_block % a.group_blocks;
    }
    int group_slot = 0;
    IntFragment<kBits> codes, next;
    if (kLoadAhead) next = load_codes(stage, 0);
#pragma unroll(kLoadAhead ? kIntLinearStageBlocks : 1)
    for (int block = 0; block < kIntLinearStageBlocks; ++block) {
      codes = kLoadAhead ? next : load_codes(stage, block);
      if (kLoadAhead && block + 1 < kIntLinearStageBlocks) next = load_codes(stage, block + 1);
      if (block > 0 && group_left == 0) ++group_slot;
      if (group_left == 0 && first_block + block < a.blocks) {
        end_group();
        begin_group(groups, group_slot);
      }
      multiply_block(tokens, codes, block);
      --group_left;
    }
  }

  TERSOR_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[j][t][i] = sum[j][t][i] = 0;
  }

  // ---- results ------------------------------------------------------------------------------------------------

  using Four = ptx::Vec<float, 4>;

  TERSOR_DEVICE Four* partial(uint32_t slot) const {
    constexpr int floats = kIntLinearRows * kTokens;
    const int64_t at = (int64_t(blockIdx.x) * gridDim.y * 2 + slot) * floats;
    return reinterpret_cast<Four*>(a.partials + at) + thread;
  }

  // Whether this block now holds the whole sum of the row block in `total`. A row block that several ranges share
  // is summed by the last of them to arrive, in the order of the ranges: nobody waits, and the result is the same
  // whoever is last. The counter wraps to zero, so it is ready for the next launch.
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
        for (int i = 0; i < 4; ++i) four[i] = total[j][t][i];
        ptx::store_global(mine + (2 * t + j) * kIntLinearThreads, four);
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

    clear();
    // A load takes half a microsecond to arrive: those of several ranges go at once, the last range's for none.
    constexpr int at_once = kTokenTiles < 4 ? 4 / kTokenTiles : 1;
    for (uint32_t range = first; range <= last; range += at_once) {
      Four theirs[at_once][kTokenTiles][2];
#pragma unroll
      for (int r = 0; r < at_once; ++r)
#pragma unroll
        for (int i = 0; i < 2 * kTokenTiles; ++i) {
          const Four* slot = partial(slot_of(range + r < last ? range + r : last));
          theirs[r][i / 2][i % 2] = ptx::load_global_volatile(slot + i * kIntLinearThreads);
        }
#pragma unroll
      for (int r = 0; r < at_once; ++r)
#pragma unroll
        for (int i = 0; i < 2 * kTokenTiles; ++i)
#pragma unroll
          for (int f = 0; f < 4; ++f) {
            if (range + r <= last) total[i % 2][i / 2][f] += theirs[r][i / 2][i % 2][f];
          }
    }
    return true;
  }

  // A lane holds four consecutive output features of two tokens in every token tile.
  TERSOR_DEVICE void store(int row_block) const {
    const int row = row_block * kIntLinearRows + 16 * warp_tile + 4 * quad;
    const int rows = a.n - row;  // four are the lane's; none where this is not positive
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t* source = static_cast<const uint16_t*>(a.bias) + row + i;
      bias[i] = a.bias != nullptr && i < rows ? Type::low(ptx::load_global_constant(source)) : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = token0 + 8 * t + 2 * c + e;
        if (token >= a.m) continue;
        uint16_t* y = static_cast<uint16_t*>(a.y) + token * a.ldy + row;
        const ptx::Vec<uint32_t, 2> pairs = {{Type::pack(total[0][t][e] + bias[0], total[0][t][e + 2] + bias[1]),
                                              Type::pack(total[1][t][e] + bias[2], total[1][t][e + 2] + bias[3])}};
        if (rows >= 4 && a.wide_stores) {
          ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(y), pairs);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (i < rows) ptx::store_global(y + i, static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2))));
          }
        }
      }
  }

  // ---- the pipeline -------------------------------------------------------------------------------------------

  TERSOR_DEVICE void run() {
    dequantizer.set_zero_points((1u << (kBits - 1)) * 0x01010101u);
    Position at = {static_cast<int>(begin / a.stages), static_cast<int>(begin % a.stages)};
    Source ahead = source_at(at.row_block, at.stage);
    const auto fetch_next = [&](uint32_t unit, int slot) {
      if (unit < end) {
        fetch(slot, ahead, unit == begin);
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
      multiply_stage(slot, at, unit == begin || at.stage == 0);
      slot = slot + 1 == kStages ? 0 : slot + 1;
      if (at.stage + 1 == a.stages || unit + 1 == end) {
        ptx::region("results");
        end_group();
        if (reduce(at.row_block)) store(at.row_block);
      }
      advance(at);
    }
  }
};

template <class Type, int kBits, int kTokenTiles>
__global__ void __launch_bounds__(kIntLinearThreads, int_linear_blocks_per_multiprocessor(kBits, kTokenTiles))
    int_linear(const IntLinearArguments arguments) {
  IntLinear<Type, kBits, kTokenTiles>(arguments, blockIdx.x * 8 * kTokenTiles).run();
}

// ---- a mixture of experts -----------------------------------------------------------------------------------------

template <class Type, int kBits, int kTokenTiles>
__global__ void __launch_bounds__(kIntLinearThreads, int_linear_blocks_per_multiprocessor(kBits, kTokenTiles))
    int_linear_grouped(const IntLinearArguments arguments, const IntLinearExperts experts) {
  constexpr int tokens = 8 * kTokenTiles;
  const ExpertRows rows = rows_of_block(experts.ends, experts.count, experts.rows, blockIdx.x, tokens);
  if (rows.expert < 0) return;
  IntLinearArguments a = arguments;
  if (rows.expert == experts.count) {
    const int count = rows.end - rows.begin < tokens ? rows.end - rows.begin : tokens;
    for (int i = blockIdx.y * kIntLinearThreads + threadIdx.x; i < count * a.n; i += gridDim.y * kIntLinearThreads) {
      ptx::store_global(static_cast<uint16_t*>(a.y) + (rows.begin + i / a.n) * a.ldy + i % a.n, uint16_t(0));
    }
    return;
  }
  a.m = rows.end;
  a.qweight += rows.expert * experts.weight_bytes;
  a.scales = static_cast<const char*>(a.scales) + rows.expert * experts.scale_bytes;
  if (a.zero_points != nullptr) a.zero_points += rows.expert * experts.zero_point_bytes;
  if (a.bias != nullptr) a.bias = static_cast<const uint16_t*>(a.bias) + int64_t(rows.expert) * a.n;
  IntLinear<Type, kBits, kTokenTiles>(a, rows.begin).run();
}

template <class Type>
IntLinearKernel* choose(int token_tiles) {
  switch (token_tiles) {
    case 1: return int_linear<Type, TERSOR_BITS, 1>;
    case 2: return int_linear<Type, TERSOR_BITS, 2>;
    case 4: return int_linear<Type, TERSOR_BITS, 4>;
    case 8: return int_linear<Type, TERSOR_BITS, 8>;
    default: return nullptr;
  }
}

IntLinearKernel* choose_kernel(bool is_bfloat16, int token_tiles) {
  return is_bfloat16 ? choose<BFloat16>(token_tiles) : choose<Float16>(token_tiles);
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
