// The attention of sm80_kv_attention.cu over pages of which some are in a format (KvFormat of tile/kv_layout.h), or all
// have a bias: what every page is asked for as it comes, in a kernel of its own, so that plain pages never are.
//
//   A warp's units of a page: keys; a tail with outliers of keys and biases; one with outliers of values; values.
//
//   levels         codes become signed bytes by prmt, a record at a time, then bf16 as 8 bits do
//   E4M3           two masks and a product by 2^120 make bf16 of two
//   scales of tokens (keys)    multiply the scores; the query then is as it is, in bf16 and its remainder
//   factors of channels (values)   multiply a record's sums over a page, which go to 8 registers first
//   outliers       a lane adds those of its own tokens to its scores, those of its own channels to its sums, for which
//                  the probabilities of 8 rows lie in 2 KB of shared memory for each warp
//   biases         are added to logits, before what is hidden
//
// SHARED MEMORY, bytes: 4 warps x (slots x unit + 64 + 2048) + query; 64, 80, 96, 128, 256 channels:
// gate: defines TERSOR_HEAD_DIM=64,80,96,128,256
// gate: registers 255
// gate: wants HMMA.16816.F32 HMMA.16816.F32.BF16 LDGSTS.E.BYPASS LDS.128 MUFU.EX2 PRMT
//
// LIMITS. Those of sm80_kv_attention.cu. Outliers of a page and head are one unit: up to some 500 for keys and for
// values (kv_most_key_outliers). Values share scales over 64 channels or over all.
#include "kernels/sm80_kv_attention.h"

#include "tile/kv_attention.h"

namespace tersor {
namespace {

constexpr int kRows = 8;

template <int kDim>
__global__ void __launch_bounds__(kKvThreads, kv_blocks_per_multiprocessor(kDim, kRows, true))
    kv_attention_formats(const KvAttentionArguments a) {
  kv_attend<kDim, kRows, true>(a);
}

KvAttentionKernel* choose_kernel(int rows) {
  return rows == kRows ? kv_attention_formats<TERSOR_HEAD_DIM> : nullptr;
}
const bool entered = (kv_format_choosers[TERSOR_HEAD_DIM] = choose_kernel, true);

}  // namespace
}  // namespace tersor
