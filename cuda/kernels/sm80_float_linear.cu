// y[m, n] = x[m, k] (values * scales)^T + bias: 16-bit activations, weights of FP8 (e4m3), MXFP8, MXFP6, MXFP4, NVFP4.
//
// LAYOUT. Weights are read as checkpoints store them, row by row: k lies in order, so a lane (g, c) finds its share of
// 32 k, k = 8c .. 8c + 7, as 8 (e4m3), 6 (e2m3) or 4 (e2m1) contiguous bytes of each of its four rows (stream_k.h), and
// the same 8 k of a token as 16 contiguous bytes of x. Weights are operand A of mma.m16n8k16, tokens its n.
//
//     shared memory of a stage     128 rows x 128 or 64 bytes of codes; tokens x 256 bytes; scales, as fp32 for each
//                                  row and 32 k (e8m0) or row (float types), or the 8 e4m3 of a row (NVFP4)
//
// DECODING is a move of bits: sign, exponent and mantissa of a code, put into the fields of a 16-bit float, are the
// value times 2^-8 (e4m3 in f16), 2^-14 (e2m1 and e2m3 in f16), 2^-120 or 2^-126 (in bf16), subnormals included. f16
// stays so, and the power is made up for with the results; bf16 is multiplied by the power, which is exact. Four
// instructions for a pair, five in bf16; e2m3, whose codes straddle bytes, takes two more (tile/six_bits.h). NVFP4's e4m3
// scale times a value has 6 bits and fits either type exactly: it is multiplied in (times 2^-8). Other scales are
// applied to the fp32 sums of a group, so nothing is rounded before the sums.
//
// A block of 4 warps computes 128 rows x 8 * kTokenTiles tokens (8, 16, 32, 64) in stages of 128 k, stream-K as in
// stream_k.h: results are the same to the bit in every launch.
//
// SHARED MEMORY, bytes: stages x (codes 16384, 12800 or 8192 + 2048 kTokenTiles + scales 2048 or 1024) + 16:
//     kTokenTiles 1    4 stages: e4m3 81936  e2m3 67600  e2m1 49168  NVFP4 45072
//                 2    4 stages: 90128  75792  57360  53264
//                 4    e4m3 3 stages: 79888; 4 stages: 92176  73744  69648
//                 8    e4m3 2 stages: 69648; 3 stages: 93712  79888  76816
// The main loop reads and writes it without bank conflicts (tile/swizzle.h, six_bits.h; the tests count it).
// gate: defines TERSOR_FLOAT=0,1,2,3
// gate: registers 168 where , [12]>
// gate: registers 255
// gate: wants HMMA.16816.F32 where Float16
// gate: wants LDGSTS.E.BYPASS
//
// FLOORS. e4m3, a stage of 128 rows: 16384 bytes, 788 cycles of an H200's memory for each multiprocessor. A lane
// unpacks 4 rows x 32 codes in 256 (f16) to 320 (bf16) instructions; with mma, loads and control some 450 for a warp,
// and four warps on four schedulers fit into the 788. e2m1 has half the bytes and the same instructions: issue, not
// memory, is its bound. Predictions from counted instructions: nothing here was measured on hardware.
//
// LIMITS. Rows of codes that do not start at multiples of 16 bytes (k no multiple of 16 or 32) are read a byte at a
// time. Weights are read again for each 64 tokens. Scale groups are 32 (e8m0), 16 (NVFP4), multiples of 128 or whole
// rows (float types). The NaN codes of e4m3 decode to 480, as on the CPU. fp32 activations are not taken.
#include "kernels/sm80_float_linear.h"

#include "kernels/instances.h"
#include "ptx/ptx.h"
#include "tile/int_dequantize.h"

namespace tersor {
namespace {

using ptx::shared_t;

// Where the 16-byte piece `piece` of a row lies in shared memory, counted from the first row.
__host__ __device__ constexpr int float_piece(int weight, int row, int piece) {
  return weight == kFloatE4m3   ? 8 * row + swizzled_byte_piece(row >> 2, piece)
         : weight == kFloatE2m3 ? six_piece(row, piece)
                                : swizzled_nibble_row(row, piece);
}

template <class Type, int kWeight>
struct FloatDecoder {
  static constexpr bool kWide = kWeight == kFloatE4m3, kSix = kWeight == kFloatE2m3;
  using Codes = ptx::Vec<uint32_t, kWide || kSix ? 2 : 1>;
  // From the code's fields at the top of a half to those of the 16-bit float, and the power of two that is missing.
  static constexpr int kShift = kWide ? (Type::kIsBFloat16 ? 4 : 1) : (Type::kIsBFloat16 ? 6 : 3);
  static constexpr uint32_t kFields = (kWide ? 0x7f00u : kSix ? 0x7c00u : 0x7000u) >> kShift, kSign = 0x80008000u;
  static constexpr uint32_t kLift = (kWide ? 0x7b80u : 0x7e80u) * 0x10001;  // bf16: 2^120, 2^126
  // What results are to be multiplied by.
  static constexpr float kFactor = kWeight == kFloatNv ? 256.0f : Type::kIsBFloat16 ? 1.0f : kWide ? 256.0f : 16384.0f;

  // Eight codes as pairs k, k + 1. scale: a pair of factors (NVFP4).
  static TERSOR_DEVICE void pairs(uint32_t (&out)[4], const Codes& codes, uint32_t scale) {
    const uint32_t shifted = codes[0] << 4;  // even nibbles at the top of their bytes
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      uint32_t tops;  // the codes of the pair at the top of its halves; what lies below is masked
      if constexpr (kWide) {
        tops = ptx::prmt(codes[p / 2], 0, p % 2 ? 0x3020 : 0x1000);
      } else if constexpr (kSix) {
        const uint32_t four = codes[p / 2], even = p % 2 ? four >> 2 : four << 10, odd = four << (p % 2 ? 8 : 20);
        tops = ptx::lop3<kSixChoose>(0x0000ffff, even, odd);
      } else {
        tops = ptx::prmt(shifted, codes[0], (4 + p) << 12 | p << 4);
      }
      out[p] = ptx::lop3<kMergeMasked>(tops, kSign, tops >> kShift & kFields * 0x10001);
      if constexpr (kWeight == kFloatNv) {
        out[p] = Type::kIsBFloat16 ? ptx::mul_bf16x2(out[p], scale) : ptx::mul_f16x2(out[p], scale);
      } else if constexpr (Type::kIsBFloat16) {
        out[p] = ptx::mul_bf16x2(out[p], kLift);
      }
    }
  }

  // NVFP4: the factor that makes a code's bits the value times 2^-8, from the e4m3 code in the low byte.
  static TERSOR_DEVICE uint32_t scale_pair(uint32_t code) {
    const float small = Float16::low((code << 8 & 0x8000) | (code << 7 & 0x3f80));  // times 2^-8
    const float factor = small * (Type::kIsBFloat16 ? 0x1p126f : 0x1p14f);
    return Type::pack(factor, factor);
  }
};

template <class Type, int kWeight, int kTokenTiles>
struct FloatLinear {
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kStages = stream_stages(float_stage_bytes(kWeight, kTokenTiles));
  // Pieces of a row of weights fetched at once: of six, two neighbours at a time.
  static constexpr int kPiecesAtOnce = kWeight == kFloatE2m3 ? 2 : float_row_bytes(kWeight) / kPieceBytes;
  static constexpr int kRowBytes = float_row_bytes(kWeight), kWeightBytes = float_weight_bytes(kWeight);
  static constexpr int kTokenBytes = float_token_bytes(kTokenTiles);
  static constexpr int kStageBytes = float_stage_bytes(kWeight, kTokenTiles);
  using Decoder = FloatDecoder<Type, kWeight>;
  using Codes = typename Decoder::Codes;

  const FloatRows& a;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, c = lane % 4;
  const int row = 32 * (thread / 32) + 4 * g;  // the lane's first
  const SixBits six;
  ptx::Vec<uint32_t, 4> scales = {};           // of row `thread`, on their way to shared memory

  TERSOR_DEVICE explicit FloatLinear(const FloatRows& arguments) : a(arguments), six(c) {}

  TERSOR_DEVICE void fetch(shared_t stage, int row_block, int index) {
    fetch_rows<kRowBytes, kPiecesAtOnce, kTokenTiles < 8>(
        stage, a.codes, a.row_bytes, a.aligned != 0, row_block, a.rows.n, index,
        [](int row_of_block, int piece) { return float_piece(kWeight, row_of_block, piece); });
    const int token0 = blockIdx.x * kTokens, first = token0 + thread / kTokenRowPieces;
    const char* tokens = static_cast<const char*>(a.x) + 2 * (int64_t(first) * a.ldx + index * kStreamK) +
                         thread % kTokenRowPieces * kPieceBytes;
    fetch_tokens_16<kTokens>(stage + kWeightBytes, tokens, a.ldx, token0, a.rows.m, 2 * (a.k - index * kStreamK));
    load_scales(row_block, index);
  }

  // A thread brings the scales of one row; they are stored when the next stage begins, so nobody waits for them here.
  TERSOR_DEVICE void load_scales(int row_block, int index) {
    const int n = row_block * kStreamRows + thread;
    for (int i = 0; i < 4; ++i) scales[i] = 0;
    if (n >= a.rows.n) return;
    const int64_t at = int64_t(n / a.scale_rows) * a.groups;
    if (kWeight == kFloatNv || a.scale_kind == kFloatScaleE8m0) {
      constexpr int count = kWeight == kFloatNv ? 8 : 4;
      const bool whole = a.groups % count == 0 && reinterpret_cast<uintptr_t>(a.scales) % count == 0;
      const uint8_t* codes = static_cast<const uint8_t*>(a.scales) + at;
      const auto words = load_scale_bytes<count>(codes, index * count, a.groups, whole);
      for (int i = 0; i < count / 4; ++i) scales[i] = words[i];
    } else {
      scales[0] = ptx::float_to_bits(load_number(a.scales, at + index / a.group_stages, a.scale_kind));
    }
  }

  // fp32 scales lie as [block of 32 k][row], those of NVFP4 as the row's 8 bytes.
  TERSOR_DEVICE void settle(shared_t stage) const {
    const shared_t to = stage + kWeightBytes + kTokenBytes;
    if constexpr (kWeight == kFloatNv) {
      ptx::store_shared(to + 8 * thread, ptx::Vec<uint32_t, 2>{{scales[0], scales[1]}});
    } else if (a.scale_kind == kFloatScaleE8m0) {
      // The exponent's field of a float: 2^(code - 127).
      for (int i = 0; i < 4; ++i) {
        ptx::store_shared<uint32_t>(to + 4 * (kStreamRows * i + thread), (scales[0] >> (8 * i) & 255) << 23);
      }
    } else {
      ptx::store_shared<uint32_t>(to + 4 * thread, scales[0]);
    }
  }

  TERSOR_DEVICE Codes load_codes(shared_t stage, int row_of_block, int block) const {
    if constexpr (kWeight == kFloatE2m3) {
      uint32_t four[2];
      six.load(four, stage, row_of_block, block);
      return {{four[0], four[1]}};
    }
    const int byte = (kWeight == kFloatE4m3 ? 8 : 4) * c;
    const int piece = kWeight == kFloatE4m3 ? 2 * block + c / 2 : block;
    return ptx::load_shared<Codes>(stage + float_piece(kWeight, row_of_block, piece) * kPieceBytes +
                                   byte % kPieceBytes);
  }

  TERSOR_DEVICE void multiply_block(float (&sum)[2][kTokenTiles][4], shared_t stage, int block,
                                    const uint32_t (&factors)[4]) const {
    uint32_t weights[2][2][4];  // [product j][step s][fragment register]
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t upper[4], lower[4];
      Decoder::pairs(upper, load_codes(stage, row + 2 * j, block), factors[2 * j]);
      Decoder::pairs(lower, load_codes(stage, row + 2 * j + 1, block), factors[2 * j + 1]);
      set_fragments(weights[j], upper, lower);
    }
    multiply_tokens_16<Type>(sum, weights, stage + kWeightBytes, block);
  }

  TERSOR_DEVICE void multiply(shared_t stage, float (&total)[2][kTokenTiles][4]) const {
    const shared_t scales_at = stage + kWeightBytes + kTokenBytes;
    uint32_t factors[4] = {};
    if constexpr (kWeight == kFloatNv) {
      // The lane's rows have 32 bytes of scales; in a block of 32 k lanes 0, 1 and 2, 3 are in one group each.
      const auto early = ptx::load_shared<ptx::Vec<uint32_t, 4>>(scales_at + 8 * row);
      const auto late = ptx::load_shared<ptx::Vec<uint32_t, 4>>(scales_at + 8 * row + 16);
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        const int shift = 16 * (block % 2) + 8 * (c / 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t word = i < 2 ? early[2 * i + block / 2] : late[2 * i - 4 + block / 2];
          factors[i] = Decoder::scale_pair(word >> shift);
        }
        multiply_block(total, stage, block, factors);
      }
    } else {
      const bool each_block = a.scale_kind == kFloatScaleE8m0;
      float sum[2][kTokenTiles][4] = {};
#pragma unroll(kTokenTiles < 8 ? 4 : 1)
      for (int block = 0; block < 4; ++block) {
        multiply_block(sum, stage, block, factors);
        if (each_block || block == 3) {
          const int scale_row = each_block ? kStreamRows * block + row : row;
          promote(total, sum, ptx::load_shared<ptx::Vec<float, 4>>(scales_at + 4 * scale_row));
        }
      }
    }
  }

  TERSOR_DEVICE float factor(int) const {
    return kWeight == kFloatNv ? Decoder::kFactor / ptx::load_global_constant(a.global) : Decoder::kFactor;
  }
};

template <class Type, int kWeight, int kTokenTiles>
__global__ void __launch_bounds__(kStreamThreads, stream_blocks_per_multiprocessor(kTokenTiles))
    float_linear(const FloatRows arguments) {
  FloatLinear<Type, kWeight, kTokenTiles> work(arguments);
  run_rows<Type, kTokenTiles>(arguments.rows, work);
}

FloatLinearKernel* choose_kernel(bool is_bfloat16, int token_tiles) {
  return instance_for<FloatLinearKernel>(is_bfloat16, token_tiles, [](auto type, auto tiles) -> FloatLinearKernel* {
    return float_linear<decltype(type), TERSOR_FLOAT, decltype(tiles)::value>;
  });
}
const bool entered = (float_linear_choosers[TERSOR_FLOAT] = choose_kernel, true);

}  // namespace
}  // namespace tersor
