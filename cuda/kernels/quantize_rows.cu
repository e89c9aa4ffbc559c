// Rows of activations to integers and scales, as they are or through RMSNorm or SiLU(gate) * up.
//
//   codes = round(x / scale), scale = clip max|x| / top for each group of channels; layouts in tile/act_codes.h, how
//   threads share a row in tile/quantize_rows.h. No value goes to global memory but codes, scales and sums.
//
//   Shared memory: 32 bytes, + 4 for each 128 channels of mixed widths, + 8 for each 32 channels and each group that
//   no warp holds: 0.5 KB for a token of 14336 channels in groups, 3.6 KB as one group.
//
//   Floor: m k bytes-of-x read and m k width / 8 written; a group of a whole token reads x again, from L1. A norm reads
//   it once more before. Limits: rows that are not 16-byte aligned are loaded by elements; a token is one block's work,
//   so a single token uses one multiprocessor.
//
// gate: registers 64
// gate: wants LDG.E.128.CONSTANT STG.E.64
#include "kernels/quantize_rows.h"

#include "ptx/ptx.h"
#include "tile/quantize_rows.h"

namespace tersor {
namespace {

__global__ void __launch_bounds__(kQuantizeThreads) quantize_rows(const QuantizeRowsArguments a) {
  const ptx::shared_t scratch = ptx::dynamic_shared();
  InputRow row(a);
  row.find_norm(scratch);
  RowRounder(a, scratch).run([&](int chunk, float (&v)[8]) { row.values(chunk, v); });
}

const bool entered = (quantize_rows_kernel = quantize_rows, true);

}  // namespace
}  // namespace tersor
