// y[m, n] = x[m, k] weights^T + bias with both in MXFP4 or both in NVFP4: block-scaled products on sm_120a.
//
// LAYOUT. Weights, as checkpoints store them, are operand A of mma.m16n8k64, tokens its n; codes go from shared memory
// to the tensor cores as they are, scales as bytes beside them, and sums stay in the accumulators for all of k.
//
//     half h of a stage: k 64h .. 64h + 63, 32 bytes of a row
//     lane (g, c)   codes of its rows 4g .. 4g + 3 (stream_k.h), bytes 4c .. 4c + 3 of each 16; of a token likewise
//     scales        words [half][row], [half][token]: lanes with even c bring those of fragment row g, odd ones of
//                   g + 8, all those of their token; MXFP4 has two bytes in a half, NVFP4 four
//
// A block of 4 warps computes 128 rows x 8 * kTokenTiles tokens in stages of 128 k; stream-K as in stream_k.h.
//
// SHARED MEMORY, bytes: stages x (128 + 8 kTokenTiles) x (64 + 4 or 8) + 16: 4 stages, MXFP4 37008 39184 43536 52240,
// NVFP4 39184 41488 46096 55312 for kTokenTiles 1, 2, 4, 8.
// gate: targets 120a
// gate: defines TERSOR_FP4=0,1
// gate: registers 128 where , [12]>
// gate: registers 255
// gate: wants OMMA.SF.16864.F32.E2M1.E2M1 LDGSTS.E.BYPASS
//
// FLOORS. A stage with 8 tokens is 8704 bytes, and a warp issues about 120 instructions for it: memory is the bound for
// few tokens, the tensor cores for many. Counted, not measured: nothing here has run on hardware.
// LIMITS. Rows of codes that do not start at multiples of 16 bytes are read a byte at a time. Weights are read again
// for each 64 tokens.
#include "kernels/sm120_fp4_linear.h"

#include "kernels/instances.h"
#include "ptx/matrix_fp4.h"
#include "ptx/ptx.h"

namespace tersor {
namespace {

using ptx::shared_t;

template <class Type, bool kNv, int kTokenTiles>
struct Fp4Linear {
  static constexpr int kTokens = 8 * kTokenTiles, kRowBytes = kStreamK / 2;
  static constexpr int kStageBytes = fp4_stage_bytes(kNv, kTokenTiles), kStages = stream_stages(kStageBytes);
  static constexpr int kWeightBytes = kStreamRows * kRowBytes, kTokenBytes = kTokens * kRowBytes;
  static constexpr int kScaleWords = kNv ? 2 : 1, kStageScales = 4 * kScaleWords;  // of a row
  static constexpr int kRowScaleBytes = kStreamRows * fp4_scale_bytes(kNv);
  using Words = ptx::Vec<uint32_t, kScaleWords>;

  const Fp4Arguments& a;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, c = lane % 4;
  const int row = 32 * (thread / 32) + 4 * g;  // the lane's first
  Words row_scales = {}, token_scales = {};    // of row and token `thread`, on their way to shared memory

  TERSOR_DEVICE explicit Fp4Linear(const Fp4Arguments& arguments) : a(arguments) {}

  TERSOR_DEVICE void fetch(shared_t stage, int row_block, int index) {
    fetch_rows<kRowBytes, kRowBytes / kPieceBytes, true>(stage, a.codes, a.row_bytes, a.aligned != 0, row_block,
                                                         a.rows.n, index, swizzled_nibble_row);
    const int token0 = blockIdx.x * kTokens;
    const uint8_t* tokens = a.x + int64_t(token0) * (a.padded / 2) + index * kRowBytes;
    fetch_token_bytes<kTokens, kRowBytes, 4>(stage + kWeightBytes, tokens, a.padded / 2, token0, a.rows.m,
                                             swizzled_nibble_piece);
    load_scales(row_block * kStreamRows + thread, token0 + thread, index);
  }

  // A thread brings the scales of one row and of one token; they are stored when the next stage begins.
  TERSOR_DEVICE void load_scales(int n, int m, int index) {
    row_scales = token_scales = Words{};
    if (n < a.rows.n) {
      row_scales = load_scale_bytes<kStageScales>(a.scales + int64_t(n) * a.groups, index * kStageScales, a.groups,
                                                  a.aligned_scales != 0);
    }
    if (thread < kTokens && m < a.rows.m) {
      const uint8_t* from = a.x_scales + (int64_t(m) * a.rows.stages + index) * kStageScales;
      token_scales = ptx::load_global_constant(reinterpret_cast<const Words*>(from));
    }
  }

  TERSOR_DEVICE void settle(shared_t stage) const {
    const shared_t to = stage + kWeightBytes + kTokenBytes;
#pragma unroll
    for (int i = 0; i < kScaleWords; ++i) {
      ptx::store_shared(to + 4 * (kStreamRows * i + thread), row_scales[i]);
      if (thread < kTokens) ptx::store_shared(to + kRowScaleBytes + 4 * (kTokens * i + thread), token_scales[i]);
    }
  }

  // The word of scales of a row or token that half `half` of the stage takes.
  static TERSOR_DEVICE uint32_t scale_word(shared_t at, int rows, int index, int half) {
    if constexpr (kNv) return ptx::load_shared<uint32_t>(at + 4 * (rows * half + index));
    return ptx::load_shared<uint32_t>(at + 4 * index) >> (16 * half);
  }

  TERSOR_DEVICE void multiply(shared_t stage, float (&total)[2][kTokenTiles][4]) const {
    const shared_t tokens = stage + kWeightBytes, row_scales_at = tokens + kTokenBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t weights[2][4], scales[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = swizzled_nibble_row(row + 2 * j + i % 2, 2 * half + i / 2);
          weights[j][i] = ptx::load_shared<uint32_t>(stage + at * kPieceBytes + 4 * c);
        }
        scales[j] = scale_word(row_scales_at, kStreamRows, row + 2 * j + c % 2, half);
      }
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const int token = 8 * t + g;
        uint32_t x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = swizzled_nibble_piece(token, 2 * half + i) * kPieceBytes;
          x[i] = ptx::load_shared<uint32_t>(tokens + token * kRowBytes + at + 4 * c);
        }
        const uint32_t of_token = scale_word(row_scales_at + kRowScaleBytes, kTokens, token, half);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if constexpr (kNv) {
            ptx::mma_m16n8k64_nvf4(total[j][t], weights[j], x, scales[j], of_token);
          } else {
            ptx::mma_m16n8k64_mxf4(total[j][t], weights[j], x, scales[j], of_token);
          }
        }
      }
    }
  }

  TERSOR_DEVICE float factor(int) const {
    if constexpr (!kNv) return 1.0f;
    return 1.0f / ptx::load_global_constant(a.global) / ptx::load_global_constant(a.x_global);
  }
};

template <class Type, bool kNv, int kTokenTiles>
__global__ void __launch_bounds__(kStreamThreads, stream_blocks_per_multiprocessor(kTokenTiles))
    fp4_linear(const Fp4Arguments arguments) {
  Fp4Linear<Type, kNv, kTokenTiles> work(arguments);
  run_rows<Type, kTokenTiles>(arguments.rows, work);
}

Fp4LinearKernel* choose_kernel(bool is_bfloat16, int token_tiles) {
  return instance_for<Fp4LinearKernel>(is_bfloat16, token_tiles, [](auto type, auto tiles) -> Fp4LinearKernel* {
    return fp4_linear<decltype(type), TERSOR_FP4, decltype(tiles)::value>;
  });
}
const bool entered = (fp4_linear_choosers[TERSOR_FP4] = choose_kernel, true);

}  // namespace
}  // namespace tersor
