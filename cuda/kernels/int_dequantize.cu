// w[n, k] = (code - zero_point) * scale as a plain matrix, for the products that int_linear is not made for.
//
//   A warp takes 16 rows x 64 k (two blocks): lane (quad, column) = (lane / 8, lane % 8) reads what an mma lane
//   reads, the codes of rows 4*quad .. 4*quad + 3 and k = 8*column .. + 7, 16 bytes of a plane at a time: 512
//   contiguous bytes of a 4-bit plane by a warp. Of each row, eight lanes write 128 contiguous bytes of 16 bits.
//   code - zero_point is exact (tile/int_dequantize.h); times scale in fp32, which is exact for 16-bit scales; then
//   one rounding.
//
//   No shared memory. Limits: k up to 2^23 (grid); rows of `out` that are not 16-byte aligned are stored by elements.
//
// gate: defines TERSOR_BITS=2,3,4,5,6,7,8
// gate: registers 64
// gate: wants LDG.E.128.CONSTANT
#include "kernels/int_dequantize.h"

#include "ptx/ptx.h"
#include "tile/int_dequantize.h"
#include "tile/int_tile.h"
#include "tile/number.h"

namespace tersor {
namespace {

// Eight numbers at out[0 ..]; `count` of them when they may not be stored as a whole.
template <class Pack>
TERSOR_DEVICE void store_16(uint16_t* out, const float (&w)[8], bool wide, int count, const Pack& pack) {
  ptx::Vec<uint32_t, 4> pairs;
#pragma unroll
  for (int p = 0; p < 4; ++p) pairs[p] = pack(w[2 * p], w[2 * p + 1]);
  if (wide) return ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 4>*>(out), pairs);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) ptx::store_global(out + i, static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2))));
  }
}

TERSOR_DEVICE void store_32(float* out, const float (&w)[8], bool wide, int count) {
  if (wide) {
    ptx::store_global(reinterpret_cast<ptx::Vec<float, 4>*>(out), ptx::Vec<float, 4>{{w[0], w[1], w[2], w[3]}});
    ptx::store_global(reinterpret_cast<ptx::Vec<float, 4>*>(out) + 1, ptx::Vec<float, 4>{{w[4], w[5], w[6], w[7]}});
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) ptx::store_global(out + i, w[i]);
  }
}

__global__ void __launch_bounds__(kIntDequantizeThreads) int_dequantize(const IntDequantizeArguments a) {
  constexpr int bits = TERSOR_BITS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quad = lane / 8, c = lane % 4;
  const int tile = blockIdx.x;
  const int block = 2 * (blockIdx.y * (kIntDequantizeThreads / 32) + warp) + lane / 4 % 2;
  if (block >= a.blocks) return;

  ptx::region("main loop");
  const uint8_t* at = a.qweight + (int64_t(tile) * a.blocks + block) * 64 * bits;
  const auto load_piece = [&](int offset) {
    return ptx::load_global_constant(reinterpret_cast<const ptx::Vec<uint32_t, 4>*>(at + offset));
  };
  IntFragment<bits> codes;
  codes.template load<false>(load_piece, c, quad);

  const int64_t group = int64_t(tile) * a.groups + block / a.group_blocks;
  const int64_t first = group * kTileRows + 4 * quad;
  float scale[4];
  load_four(scale, a.scale_dtype, [&](auto type) {
    const int bytes = a.scale_dtype == 0 ? 4 : 2;
    return ptx::load_global_constant(
        reinterpret_cast<const decltype(type)*>(static_cast<const char*>(a.scales) + first * bytes));
  });
  IntDequantizer<Float16, bits> dequantizer;
  dequantizer.set_zero_points((1u << (bits - 1)) * 0x01010101u);
  if (a.zero_points != nullptr) {
    const auto* zeros = reinterpret_cast<const uint32_t*>(a.zero_points + first);
    dequantizer.set_zero_points(ptx::load_global_constant(zeros));
  }

  const int column = 32 * block + 8 * c, count = a.k - column;
  const bool wide = a.wide_stores && count >= 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = kTileRows * tile + 4 * quad + i;
    if (row >= a.n) break;
    uint32_t pairs[4];
    dequantizer.pairs(pairs, codes, i, c);
    float w[8];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      w[2 * p] = Float16::low(pairs[p]) * scale[i];
      w[2 * p + 1] = Float16::high(pairs[p]) * scale[i];
    }
    const int64_t to = int64_t(row) * a.k + column;
    if (a.out_dtype == 0) {
      store_32(static_cast<float*>(a.out) + to, w, wide, count);
    } else if (a.out_dtype == 1) {
      store_16(static_cast<uint16_t*>(a.out) + to, w, wide, count, BFloat16::pack);
    } else {
      store_16(static_cast<uint16_t*>(a.out) + to, w, wide, count, Float16::pack);
    }
  }
}

const bool entered = (int_dequantize_kernels[TERSOR_BITS] = int_dequantize, true);

}  // namespace
}  // namespace tersor
