// Rows of activations through small matrices, then rounded: the Kronecker product of FlatQuant (arXiv 2410.09426), and
// Hadamard transforms of a power of two times 12, 20, 28, ...
//
//   x --norm or gate, signs--> [k / (n1 n2)][n1][n2] --left--> --right, or butterflies--> codes, scales, sums
//
//   A block of threads has a row in shared memory, as two bf16 for each number (tile/producer_rows.h); products on
//   tensor cores (tile/producer_products.h), butterflies in fp32. Only codes, scales and sums are written to global
//   memory. Error against float64: 2^-15 of the row's largest number (bf16 alone 2^-7, tf32 2^-10).
//
//   Work of a row of n1 x n2: 3 n1 n2 (n1 + n2) multiply-adds, and 2 n1 n2 n1 in front of butterflies. 8192 channels
//   as 64 x 128: 4.7 M, 2304 mma, 384 KB of fragments from L1: about 4000 cycles of a multiprocessor of sm_90, and
//   4096 rows 75 us on 132 of them at 1.7 GHz; 4 % of a layer of 8192 x 28672 that takes 1.9 ms. A single row waits for
//   its fragments: 64 bytes a cycle from L2 are 4 us for 64 x 128, 8 us for 112 x 128. Not measured on hardware.
//
//   Shared memory: lines = k / (n1 n2) ceil16(n1) of 4 ceil16(n2) + 16 bytes, and what rounding needs
//   (quantize_rows.cu): 33 KB for 64 x 128, 59 KB for 112 x 128, 66 KB for 28 x 512.
//   Limits: n1 and n2 up to 256 (beyond 128 by an instance of one block a multiprocessor); widths beyond the shared
//   memory are refused; columns that are no multiple of 8 are moved one by one between registers and shared memory.
//
// gate: registers 128 where <8>
// gate: registers 168 where <16>
// gate: wants HMMA.16816.F32.BF16 LDSM.16.M88.4 LDSM.16.MT88.4 LDG.E.128.CONSTANT STG.E.64
#include "kernels/quantize_rows.h"

#include "ptx/ptx.h"
#include "tile/producer_products.h"
#include "tile/producer_rows.h"
#include "tile/quantize_rows.h"

namespace tersor {
namespace {

// kTiles: tiles of the larger matrix that there is room for.
template <int kTiles>
__global__ void __launch_bounds__(kQuantizeThreads, kTiles > 8 ? 1 : 2)
    producer_products(const QuantizeRowsArguments a) {
  const ptx::shared_t memory = ptx::dynamic_shared(), scratch = memory + a.lines * a.line_bytes;
  const RowBuffer buffer(a, memory);
  const int chunks = (a.k + 7) / 8;

  if (a.rows % 16 != 0 || a.columns % 16 != 0) {  // padding of tiles
    const ptx::Vec<uint32_t, 4> zeros{{0, 0, 0, 0}};
    for (int at = 16 * threadIdx.x; at < a.lines * a.line_bytes; at += 16 * kQuantizeThreads) {
      ptx::store_shared(memory + at, zeros);
    }
    ptx::barrier();
  }
  InputRow row(a);
  row.find_norm(scratch);
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kQuantizeThreads) {
    float v[8];
    row.values(chunk, v);
    if (a.right == nullptr) scale_input(a, chunk, v);
    buffer.store_parts(chunk, v);
  }
  ptx::barrier();

  ptx::region("left");
  multiply_row<true, kTiles>(a, buffer);
  ptx::barrier();
  ptx::region("right");
  if (a.right != nullptr) {
    multiply_row<false, kTiles>(a, buffer);
  } else if (a.columns < 8) {
    buffer.narrow_butterflies();
  } else {
    const int lane = threadIdx.x % 32;
    for (int first = threadIdx.x - lane; first < chunks; first += kQuantizeThreads) {
      float v[8];
      buffer.load_parts(first + lane, v);
      buffer.butterflies_in_warp(v);
      buffer.store_floats(first + lane, v);
    }
    buffer.butterflies_in_block();
  }
  ptx::barrier();
  ptx::region("rounding");
  RowRounder(a, scratch).run([&](int chunk, float (&v)[8]) { buffer.load_floats(chunk, v); });
}

const bool entered = (producer_products_kernels[0] = producer_products<8>,
                      producer_products_kernels[1] = producer_products<16>, true);

}  // namespace
}  // namespace tersor
