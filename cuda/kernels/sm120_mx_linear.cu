// y[m, n] = x[m, k] weights^T + bias: MXFP8 or MXFP6 activations, MXFP8, MXFP6 or MXFP4 weights, on sm_120a.
//
// LAYOUT. Weights, packed as checkpoints store them, are operand A of mma.m16n8k32 kind::mxf8f6f4, tokens its n. That
// product takes a byte for each element whatever its bits: activations are stored so, weights are spread in registers.
//
//     block b of a stage  k 32b .. 32b + 31; a lane (g, c) has k = 8c .. 8c + 7 of its rows 4g .. 4g + 3 (stream_k.h)
//                         and of its token: the first four are its share of k 0 .. 15 of the product, the others of 16
//                         .. 31. Both operands are read in this order, so that it does not matter.
//     e4m3                8 bytes as they lie
//     e2m3                48 bits of two words, 12 instructions (tile/six_bits.h)
//     e2m1                a word, even and odd codes moved to the middle of bytes and put in order: 6 instructions
//     scales              a word for each row and token, a byte for each block; lanes with even c bring those of
//                         fragment row g, odd ones of g + 8, all those of their token
//
// Scales are powers of two that the product applies, so sums stay in the accumulators for all of k. A block of 4 warps
// computes 128 rows x 8 * kTokenTiles tokens in stages of 128 k; stream-K as in stream_k.h.
//
// SHARED MEMORY, bytes: stages x (codes 16384, 12800 or 8192 + 1056 kTokenTiles + 512) + 16:
//     kTokenTiles 1, 2, 4, 8   4 stages: e4m3 71824  76048  84496; 8: 3 stages: 76048
//                              4 stages: e2m3 57488  61712  70160  87056
//                              4 stages: e2m1 39056  43280  51728  68624
// gate: targets 120a
// gate: defines TERSOR_MX=0,1,2,3,4,5
// gate: registers 168 where , [12]>
// gate: registers 255
// gate: wants QMMA.SF LDGSTS.E.BYPASS
//
// FLOORS. A stage with 8 tokens is 17920, 13824 or 9728 bytes, and a warp issues 8 products, 32 to 48 loads and up to
// 192 instructions that spread codes for it: memory is the bound for few tokens, the tensor cores for many. Counted,
// not measured: nothing here has run on hardware.
// LIMITS. Rows of codes that do not start at multiples of 16 bytes are read a byte at a time. Weights are read again
// for each 64 tokens.
#include "kernels/sm120_mx_linear.h"

#include "kernels/instances.h"
#include "ptx/ptx.h"

namespace tersor {
namespace {

using ptx::shared_t;

template <class Type, int kWeight, int kInput, int kTokenTiles>
struct MxLinear {
  static constexpr bool kWide = kWeight == ptx::kMxE4m3, kSix = kWeight == ptx::kMxE2m3;
  static constexpr int kTokens = 8 * kTokenTiles, kRowBytes = kWide ? 128 : kSix ? kSixRowBytes : 64;
  static constexpr int kStageBytes = mx_stage_bytes(kWeight, kTokenTiles), kStages = stream_stages(kStageBytes);
  static constexpr int kWeightBytes = mx_weight_bytes(kWeight), kTokenBytes = kTokens * kStreamK;
  static constexpr int kBlocks = kStreamK / 32;
  using Eight = ptx::Vec<uint32_t, 2>;

  const MxArguments& a;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, c = lane % 4;
  const int row = 32 * (thread / 32) + 4 * g;  // the lane's first
  const SixBits six;
  uint32_t row_scales = 0, token_scales = 0;  // of row and token `thread`, on their way to shared memory

  TERSOR_DEVICE explicit MxLinear(const MxArguments& arguments) : a(arguments), six(c) {}

  // Where a piece of a row lies, counted from the first row.
  static TERSOR_DEVICE int weight_piece(int row_of_block, int piece) {
    return kWide  ? 8 * row_of_block + swizzled_byte_piece(row_of_block / 4, piece)
           : kSix ? six_piece(row_of_block, piece)
                  : swizzled_nibble_row(row_of_block, piece);
  }

  TERSOR_DEVICE void fetch(shared_t stage, int row_block, int index) {
    // Of six pieces of a row two at a time.
    fetch_rows<kRowBytes, kSix ? 2 : kRowBytes / kPieceBytes, kTokenTiles < 8>(
        stage, a.codes, a.row_bytes, a.aligned != 0, row_block, a.rows.n, index, weight_piece);
    const int token0 = blockIdx.x * kTokens;
    const int64_t padded = int64_t(a.rows.stages) * kStreamK;
    fetch_token_bytes<kTokens, kStreamK, 4>(stage + kWeightBytes, a.x + token0 * padded + index * kStreamK, padded,
                                            token0, a.rows.m, swizzled_byte_piece);
    load_scales(row_block * kStreamRows + thread, token0 + thread, index);
  }

  // A thread brings the scales of one row and of one token; they are stored when the next stage begins.
  TERSOR_DEVICE void load_scales(int n, int m, int index) {
    row_scales = token_scales = 0;
    if (n < a.rows.n) {
      row_scales = load_scale_bytes<kBlocks>(a.scales + int64_t(n) * a.groups, index * kBlocks, a.groups,
                                             a.aligned_scales != 0)[0];
    }
    if (thread < kTokens && m < a.rows.m) {
      const uint8_t* from = a.x_scales + (int64_t(m) * a.rows.stages + index) * kBlocks;
      token_scales = ptx::load_global_constant(reinterpret_cast<const uint32_t*>(from));
    }
  }

  TERSOR_DEVICE void settle(shared_t stage) const {
    const shared_t to = stage + kWeightBytes + kTokenBytes;
    ptx::store_shared(to + 4 * thread, row_scales);
    if (thread < kTokens) ptx::store_shared(to + 4 * (kStreamRows + thread), token_scales);
  }

  // Eight codes of a row, a byte each.
  TERSOR_DEVICE Eight load_codes(shared_t stage, int row_of_block, int block) const {
    if constexpr (kWide) {
      return ptx::load_shared<Eight>(stage + weight_piece(row_of_block, 2 * block + c / 2) * kPieceBytes +
                                     8 * (c % 2));
    } else if constexpr (kSix) {
      uint32_t four[2];
      six.load(four, stage, row_of_block, block);
      return {{SixBits::bytes(four[0]), SixBits::bytes(four[1])}};
    } else {
      const shared_t at = stage + weight_piece(row_of_block, block) * kPieceBytes + 4 * c;
      const uint32_t codes = ptx::load_shared<uint32_t>(at);
      const uint32_t even = codes << 2 & 0x3c3c3c3c, odd = codes >> 2 & 0x3c3c3c3c;
      return {{ptx::prmt(even, odd, 0x5140), ptx::prmt(even, odd, 0x7362)}};
    }
  }

  template <int block>
  TERSOR_DEVICE void multiply_block(float (&total)[2][kTokenTiles][4], shared_t stage, const uint32_t (&scales)[2],
                                    const uint32_t (&of_tokens)[kTokenTiles]) const {
    uint32_t weights[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Eight codes = load_codes(stage, row + i, block);
      weights[i / 2][i % 2] = codes[0];
      weights[i / 2][i % 2 + 2] = codes[1];
    }
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const auto x = load_token_bytes(stage + kWeightBytes, 8 * t + g, block);
      const uint32_t pair[2] = {x[0], x[1]};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        ptx::mma_m16n8k32_mx<kWeight, kInput, block>(total[j][t], weights[j], pair, scales[j], of_tokens[t]);
      }
    }
  }

  TERSOR_DEVICE void multiply(shared_t stage, float (&total)[2][kTokenTiles][4]) const {
    const shared_t scales_at = stage + kWeightBytes + kTokenBytes;
    uint32_t scales[2], of_tokens[kTokenTiles];
#pragma unroll
    for (int j = 0; j < 2; ++j) scales[j] = ptx::load_shared<uint32_t>(scales_at + 4 * (row + 2 * j + c % 2));
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      of_tokens[t] = ptx::load_shared<uint32_t>(scales_at + 4 * (kStreamRows + 8 * t + g));
    }
    multiply_block<0>(total, stage, scales, of_tokens);
    multiply_block<1>(total, stage, scales, of_tokens);
    multiply_block<2>(total, stage, scales, of_tokens);
    multiply_block<3>(total, stage, scales, of_tokens);
  }

  TERSOR_DEVICE float factor(int) const { return 1.0f; }
};

template <class Type, int kKind, int kTokenTiles>
__global__ void __launch_bounds__(kStreamThreads, stream_blocks_per_multiprocessor(kTokenTiles))
    mx_linear(const MxArguments arguments) {
  MxLinear<Type, kKind % 3, kKind / 3, kTokenTiles> work(arguments);
  run_rows<Type, kTokenTiles>(arguments.rows, work);
}

MxLinearKernel* choose_kernel(bool is_bfloat16, int token_tiles) {
  return instance_for<MxLinearKernel>(is_bfloat16, token_tiles, [](auto type, auto tiles) -> MxLinearKernel* {
    return mx_linear<decltype(type), TERSOR_MX, decltype(tiles)::value>;
  });
}
const bool entered = (mx_linear_choosers[TERSOR_MX] = choose_kernel, true);

}  // namespace
}  // namespace tersor
