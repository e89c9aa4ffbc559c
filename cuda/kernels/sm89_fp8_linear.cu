// y[m, n] = (x * x_scales)[m, k] (weights * scales)^T + bias: e4m3 activations, weights of 4-bit integers or e4m3.
//
// LAYOUT. Weights are operand A of mma.m16n8k32 e4m3, tokens its n. In a block of 32 k a lane (g, c) has k = 8c .. 8c +
// 7: of each of its four rows (stream_k.h) a dword of 4-bit codes in the stored layout of int_tile.h, or 8 bytes of
// e4m3 as checkpoints store them; of a token 8 bytes, stored in the same order of k (tile/fp8_codes.h).
//
//     int4 to e4m3, 10 instructions for 8 codes: e4m3 numbers below 2^-5 are their bits times 2^-9, so a code - 8 of
//     0 .. 7 is itself, a negative one 0x88 - (code & 7); a prmt spreads the bit that chooses. (A table of 8 entries
//     for each sign, looked up by prmt, takes 11.) 2^9 is made up for with the results.
//
// Products are exact; sums in fp32 are promoted at each group of weights, at the latest after 128 k, by the scale of
// the row times that of the token. Scales of int4 may be bytes of e4m3 under one multiplier (FireQ, arXiv 2505.20839),
// which scales the results. That paper's kernel turns a code into the e4m3 number nearest to code * scale, by a table
// of the group; here the scale stays with the sums, which rounds nothing. A block of 4 warps computes 128 rows x 8 *
// kTokenTiles tokens in stages of 128 k; stream-K as in stream_k.h: results are the same to the bit in every launch.
//
// SHARED MEMORY, bytes: stages x (codes 8192 or 16384 + 1056 kTokenTiles + 2048) + 16:
//     kTokenTiles 1, 2, 4, 8   4 stages: int4 45200  49424  57872  74768
//                              4 stages: e4m3 77968  82192  90640; 8: 3 stages: 80656
// gate: targets 89 90a 100a 120a
// gate: defines TERSOR_FP8=0,1
// gate: registers 168 where , [12]>
// gate: registers 255
// gate: wants LDGSTS.E.BYPASS
//
// TARGETS. QMMA on sm_89 and sm_120a. For sm_90a and sm_100a the compiler makes two HMMA and twelve conversions to f16
// of it: the same numbers, no faster than 16-bit inputs; their FP8 rates are those of wgmma and tcgen05.
// FLOORS. int4, a stage: 8192 bytes, 394 cycles of an H200's memory for a multiprocessor; a warp unpacks 16 dwords in
// 160 instructions beside some 120 for loads, 8 kTokenTiles mma and control: about 300 of the 394 cycles. Counted, not
// measured: nothing here has run on hardware.
// LIMITS. Zero points are not taken (symmetric int4 only). Weights are read again for each 64 tokens.
#include "kernels/sm89_fp8_linear.h"

#include "kernels/instances.h"
#include "ptx/matrix_float.h"
#include "ptx/ptx.h"
#include "tile/fp8_codes.h"
#include "tile/int_tile.h"

namespace tersor {
namespace {

using ptx::shared_t;

template <class Type, int kWeight, int kTokenTiles>
struct Fp8Linear {
  static constexpr bool kInt4 = kWeight == kFp8Int4;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kStageBytes = fp8_stage_bytes(kWeight, kTokenTiles), kStages = stream_stages(kStageBytes);
  static constexpr int kWeightBytes = fp8_weight_bytes(kWeight), kTokenBytes = kTokens * kStreamK;
  static constexpr int kScaleBytes = 16 * kStreamRows;
  static constexpr int kTileBytes = 4 * 256;              // of int4 in a stage
  using Eight = ptx::Vec<uint32_t, 2>;

  const Fp8Arguments& a;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, c = lane % 4;
  const bool each_block;  // groups begin within a stage
  float scales[4];        // of row `thread`, on their way to shared memory
  float x_scale = 0;      // of token `thread`

  TERSOR_DEVICE explicit Fp8Linear(const Fp8Arguments& arguments)
      : a(arguments), each_block(kInt4 && arguments.groups > 1 && arguments.group_blocks % 4 != 0) {}

  TERSOR_DEVICE void fetch(shared_t stage, int row_block, int index) {
    if constexpr (kInt4) {
      fetch_int4(stage, row_block, index);
    } else {
      fetch_rows<kStreamK, kStreamK / kPieceBytes, kTokenTiles < 8>(
          stage, a.codes, a.k, a.aligned != 0, row_block, a.rows.n, index,
          [](int row, int piece) { return 8 * row + swizzled_byte_piece(row / 4, piece); });
    }
    const int token0 = blockIdx.x * kTokens;
    fetch_token_bytes<kTokens, kStreamK, 4>(stage + kWeightBytes, a.x + int64_t(token0) * a.padded + index * kStreamK,
                                            a.padded, token0, a.rows.m, swizzled_byte_piece);
    load_scales(row_block, index);
  }

  // A warp fetches the two storage tiles that it multiplies.
  TERSOR_DEVICE void fetch_int4(shared_t stage, int row_block, int index) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int piece = lane % 16, block = 2 * (i % 2) + lane / 16, tile = 2 * warp + i / 2;
      const int64_t from = int64_t(row_block * 8 + tile) * a.blocks + index * 4 + block;
      const bool inside = row_block * 8 + tile < a.tiles && index * 4 + block < a.blocks;
      ptx::cp_async_16_once(stage + tile * kTileBytes + block * 256 + swizzled_piece(4, piece) * kPieceBytes,
                            a.codes + from * 256 + piece * kPieceBytes, inside ? kPieceBytes : 0);
    }
  }

  // A thread brings the scales of one row and of one token; they are stored when the next stage begins.
  TERSOR_DEVICE void load_scales(int row_block, int index) {
    const int row = row_block * kStreamRows + thread, token = blockIdx.x * kTokens + thread;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scales[i] = 0;
      const int block = 4 * index + i;
      if (row >= a.rows.n || (i > 0 && !each_block) || (each_block && block >= a.blocks)) continue;
      const int group = a.groups == 1 ? 0 : block / a.group_blocks;
      const int64_t at = kInt4 ? (int64_t(row / 16) * a.groups + group) * 16 + row % 16
                               : int64_t(row / a.scale_rows) * a.groups + group;
      if (kInt4 && a.scale_dtype == kFp8ScaleE4m3) {
        scales[i] = e4m3_value(ptx::load_global_constant(static_cast<const uint8_t*>(a.scales) + at));
      } else {
        scales[i] = load_number(a.scales, at, a.scale_dtype);
      }
    }
    if (thread < kTokens) {
      const int64_t at = int64_t(token) * a.x_groups + (a.x_groups == 1 ? 0 : index);
      x_scale = token < a.rows.m ? ptx::load_global_constant(a.x_scales + at) : 0.0f;
    }
  }

  TERSOR_DEVICE void settle(shared_t stage) const {
    const shared_t to = stage + kWeightBytes + kTokenBytes;
    ptx::store_shared(to + 4 * thread, scales[0]);
    if (each_block) {
      for (int i = 1; i < 4; ++i) ptx::store_shared(to + 4 * (kStreamRows * i + thread), scales[i]);
    }
    if (thread < kTokens) ptx::store_shared(to + kScaleBytes + 4 * thread, x_scale);
  }

  // The lane's fragments of product j: rows 2j and 2j + 1 of its four.
  TERSOR_DEVICE void load_weights(uint32_t (&weights)[2][4], shared_t stage, int block) const {
    if constexpr (kInt4) {
      const shared_t at = stage + (2 * warp + g / 4) * kTileBytes + block * 256;
      IntFragment<4> codes;
      codes.load<true>([&](int offset) { return ptx::load_shared<ptx::Vec<uint32_t, 4>>(at + offset); }, c, g % 4);
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        const uint32_t word = codes.rows[0][row];
        weights[row / 2][row % 2] = e4m3_of_int4(word, word << 4);
        weights[row / 2][row % 2 + 2] = e4m3_of_int4(word >> 4, word);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 32 * warp + 4 * g + i;
        const int piece = swizzled_byte_piece(g, 2 * block + c / 2);
        const auto codes = ptx::load_shared<Eight>(stage + row * kStreamK + piece * kPieceBytes + 8 * (c % 2));
        weights[i / 2][i % 2] = codes[0];
        weights[i / 2][i % 2 + 2] = codes[1];
      }
    }
  }

  // total += scale of the row * scale of the token * sum, sum = 0.
  TERSOR_DEVICE void promote_sums(float (&total)[2][kTokenTiles][4], float (&sum)[2][kTokenTiles][4], shared_t at,
                                  int block) const {
    const auto of_rows = ptx::load_shared<ptx::Vec<float, 4>>(at + 4 * (kStreamRows * block + 32 * warp + 4 * g));
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const auto of_tokens = ptx::load_shared<ptx::Vec<float, 2>>(at + kScaleBytes + 4 * (8 * t + 2 * c));
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[j][t][i] += of_rows[2 * j + i / 2] * of_tokens[i % 2] * sum[j][t][i];
          sum[j][t][i] = 0;
        }
    }
  }

  TERSOR_DEVICE void multiply(shared_t stage, float (&total)[2][kTokenTiles][4]) const {
    const shared_t tokens = stage + kWeightBytes, scales_at = tokens + kTokenBytes;
    float sum[2][kTokenTiles][4] = {};
#pragma unroll(kTokenTiles < 8 ? 4 : 1)
    for (int block = 0; block < 4; ++block) {
      uint32_t weights[2][4];
      load_weights(weights, stage, block);
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const auto x = load_token_bytes(tokens, 8 * t + g, block);
        const uint32_t pair[2] = {x[0], x[1]};
#pragma unroll
        for (int j = 0; j < 2; ++j) ptx::mma_m16n8k32_e4m3(sum[j][t], weights[j], pair);
      }
      if (each_block || block == 3) promote_sums(total, sum, scales_at, each_block ? block : 0);
    }
  }

  TERSOR_DEVICE float factor(int) const {
    if constexpr (!kInt4) return 1.0f;
    return 512.0f * (a.scale_dtype == kFp8ScaleE4m3 ? ptx::load_global_constant(a.scale_multiplier) : 1.0f);
  }
};

template <class Type, int kWeight, int kTokenTiles>
__global__ void __launch_bounds__(kStreamThreads, stream_blocks_per_multiprocessor(kTokenTiles))
    fp8_linear(const Fp8Arguments arguments) {
  Fp8Linear<Type, kWeight, kTokenTiles> work(arguments);
  run_rows<Type, kTokenTiles>(arguments.rows, work);
}

Fp8LinearKernel* choose_kernel(bool is_bfloat16, int token_tiles) {
  return instance_for<Fp8LinearKernel>(is_bfloat16, token_tiles, [](auto type, auto tiles) -> Fp8LinearKernel* {
    return fp8_linear<decltype(type), TERSOR_FP8, decltype(tiles)::value>;
  });
}
const bool entered = (fp8_linear_choosers[TERSOR_FP8] = choose_kernel, true);

}  // namespace
}  // namespace tersor
