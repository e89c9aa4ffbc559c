// Rows of activations through a permutation or a Hadamard transform of a power of two, then rounded.
//
//   x --norm or gate--> shared memory in fp32 --index, or butterflies--> codes, scales, sums
//
//   A block of threads has a row; x is read once (twice with a norm, the second time from L1), and of the transformed
//   row only codes, scales and sums are written (tile/quantize_rows.h, tile/producer_rows.h).
//
//   Hadamard of blocks of p channels: min(log2 p, 8) stages in registers and shuffles, 40 shuffles for 8 channels at
//   most; one pass over shared memory for each further four stages. A row of 4096 channels in its block: 640
//   warp-shuffles and 4 transactions of shared memory for each 32 channels, 1.2 thousand cycles of one multiprocessor;
//   4096 rows on 132 of them about 22 us at 1.7 GHz, of which memory needs 9. Not measured on hardware.
//
//   Shared memory: 4 bytes a channel of ceil(k / 128) 128, and what rounding needs (quantize_rows.cu): 16.0 KB for
//   4096 channels, 56.5 KB for 14336. Limits: widths beyond a GPU's shared memory are refused (99 KB: 25000 channels;
//   163 KB: 41000). A permutation reads 8 numbers a lane wherever they are, with the bank conflicts of its order.
//
// gate: registers 64
// gate: wants LDG.E.128.CONSTANT STG.E.64 LDS.128 STS.128 SHFL
#include "kernels/quantize_rows.h"

#include "ptx/ptx.h"
#include "tile/producer_rows.h"
#include "tile/quantize_rows.h"

namespace tersor {
namespace {

__global__ void __launch_bounds__(kQuantizeThreads, 4) producer_rows(const QuantizeRowsArguments a) {
  const ptx::shared_t memory = ptx::dynamic_shared(), scratch = memory + a.line_bytes;
  const RowBuffer buffer(a, memory);
  InputRow row(a);
  row.find_norm(scratch);

  const int lane = threadIdx.x % 32;
  for (int first = threadIdx.x - lane; 8 * first < a.k; first += kQuantizeThreads) {
    float v[8];
    row.values(first + lane, v);
    if (a.index == nullptr) {
      scale_input(a, first + lane, v);
      buffer.butterflies_in_warp(v);
    }
    buffer.store_floats(first + lane, v);
  }
  buffer.butterflies_in_block();
  ptx::barrier();

  const RowRounder rounder(a, scratch);
  if (a.index == nullptr) {
    rounder.run([&](int chunk, float (&v)[8]) { buffer.load_floats(chunk, v); });
    return;
  }
  rounder.run([&](int chunk, float (&v)[8]) {
    using Four = ptx::Vec<int32_t, 4>;
    Four from[2] = {{{0, 0, 0, 0}}, {{0, 0, 0, 0}}};
    if (8 * chunk + 8 <= a.k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        from[i] = ptx::load_global_constant(reinterpret_cast<const Four*>(a.index) + 2 * chunk + i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (8 * chunk + i < a.k) from[i / 4][i % 4] = ptx::load_global_constant(a.index + 8 * chunk + i);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = 8 * chunk + i < a.k ? ptx::load_shared<float>(buffer.address(from[i / 4][i % 4])) : 0.0f;
    }
  });
}

const bool entered = (producer_rows_kernel = producer_rows, true);

}  // namespace
}  // namespace tersor
