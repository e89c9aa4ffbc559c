// The attention of sm80_kv_attention.cu over caches with formats (KvFormat of tile/kv_layout.h), biases, or keys from
// before their rotary embedding: a kernel of its own, so that plain pages are never asked what they are. A page's entry
// names its format; plain and raw pages stand between them and take the plain kernel's path.
//
//   A warp's units of a page: keys; a tail with outliers of keys and biases; one with outliers of values; values.
//
//   levels           codes become signed bytes by prmt, a record at a time, and those bf16 as 8 bits do
//   E4M3             two masks and a product by 2^120 make bf16 of two
//   scales of tokens (keys)       multiply the scores; the query is multiplied as it is, in bf16 with its remainder
//   factors of channels (values)  multiply a record's sums over a page, which are in 8 registers first
//   outliers         a lane adds those of its own tokens to its scores, and those of its own channels to its sums, for
//                    which the probabilities of 8 rows lie in shared memory
//   biases           are added to logits, before what is hidden
//   scales of halves (keys)       make two queries of a record, one for each 32 tokens
//   groups of values              begin where the format says; units of the stream hold whole groups, or parts of one
//   residuals        rank by rank, from global memory: what the host made of the query, times the left factor, is added
//                    to scores; probabilities times the other left factor, summed over a quad, times the right one, to
//                    the sums: some 200 instructions for each page and rank at 128 channels
//   turned keys      a pair of channels is a pair of codes: codes to fp32, scaled, turned by the cosine and sine of
//                    slot and pair (L1), and multiplied as two bf16; about 16 instructions a pair instead of 3
//
// SHARED MEMORY, bytes: 4 warps x (3 x unit + 512 + 2048) + query + limits; 64, 80, 96, 128, 256 channels:
//     42064  42320  40272  43088  45136
// gate: defines TERSOR_HEAD_DIM=64,80,96,128,256
// gate: registers 255
// gate: wants HMMA.16816.F32 HMMA.16816.F32.BF16 LDGSTS.E.BYPASS LDS.128 MUFU.EX2 PRMT
//
// LIMITS. Those of sm80_kv_attention.cu, but tiles of 8 rows alone, to halve the code: more rows read the pages again.
// Outliers of a page and head are one unit: up to some 550 for keys and for values (kv_most_key_outliers). Keys of 256
// channels are not turned, have no residuals nor scales of 32 tokens, and their values' groups are of 64 channels at least:
// no registers are left. Residuals are read from L2 as they are needed, which nothing hides.
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
