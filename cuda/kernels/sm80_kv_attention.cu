// softmax(cap(q k^T scale)) v over a paged cache whose pages hold 16, 8, 4, 3 or 2 bits, each page as its entry says.
//
// LAYOUT. Pages are stored in the order of fragments (tile/kv_layout.h): keys are B of q k^T, values B of p v. A warp
// takes whole pages of 64 tokens on its own: four warps take every fourth page of their split, with no barrier between
// them. A page's scores, 8 products of 8 tokens, stay in registers; one pass of the online softmax; as fragments A they
// meet the values. Query heads of a head of keys, and queries, are the rows of A:
//
//     kRows = 8    row g is a query, row g + 8 the remainder of what 16 bits rounded off it: one product has both,
//                  d[0] + d[2] the sum. Up to 8 rows, so most decoding.
//     kRows = 16   rows g and g + 8 are queries, a second product takes the remainders. More rows are more blocks.
//
// Packed pages. The scale of a key's channel is multiplied into q, once for the page's 64 tokens; that of a value's
// token and group into p: fp32 numbers, kept as two bf16 of 16 bits together. Codes become bf16 integers, exactly.
// Below 8 bits a key's is 128 + code: a product with a column of ones gives what the 128 add up to, which takes eight
// instructions for a page instead of one for each pair. Minima: q times them is the same for a page's tokens, one fp32
// sum for a row; p times them the same for a group's channels. Raw pages multiply q as it is, in its own type.
//
//     page, bits             k: for each record                      v: for each group, record
//     ring slot -> words -> pairs (kv_pair): B                       p x scales -> A; words -> pairs: B
//                 q x scales -> A                                    out += A B
//
// PIPELINE. A warp's pages come as units of about 2 KB through its own ring of 3 or 4 slots: cp.async, 16 bytes a lane,
// two or three units ahead, across pages (tile/kv_stream.h). Entries of the table are read 16 at once, and those that
// no row of the block sees are left out.
//
// SPLITS. Each sequence's pages are cut into `splits` equal ranges, one block each. The last block to finish adds all
// partial results in the order of the splits: results are the same to the bit in every launch of equal splits.
//
// The parts are tile/kv_scores.h, tile/kv_values.h and, around them, tile/kv_attention.h, which pages of formats
// (sm80_kv_attention_formats.cu) and attention mass (kv_mass.cu) share.
//
// SHARED MEMORY, bytes: 4 warps x (slots x unit + 512) + query + limits; 64, 80, 96, 128, 256 channels:
//     kRows 8   4 slots, 80 and 96: 3    40016  43344  45136  41040  43088
//     kRows 16                           41104  44688  46736  43152
// REGISTERS: what the gate asserts, no spills:
// gate: defines TERSOR_HEAD_DIM=64,80,96,128,256
// gate: registers 168 where <64, 8>
// gate: registers 255
// gate: wants HMMA.16816.F32 HMMA.16816.F32.BF16 LDGSTS.E.BYPASS LDS.128 MUFU.EX2
//
// LIMITS. Keys and values have one head dimension; values share scales over 64 channels (80, 96). Every 16 rows read
// the pages again, from L2 where blocks run together: made for decoding and for short prompts over long history. A
// split counts pages, also those outside a window. A mask is read a byte at a time, and never where none is given: with
// one no page counts as seen whole. A NaN that a causal mask hides from a query but not from its row
// tile reaches it through 0 times NaN.
#include "kernels/sm80_kv_attention.h"

#include "tile/kv_attention.h"

namespace tersor {
namespace {

template <int kDim, int kRows>
__global__ void __launch_bounds__(kKvThreads, kv_blocks_per_multiprocessor(kDim, kRows))
    kv_attention(const KvAttentionArguments a) {
  kv_attend<kDim, kRows, false>(a);
}

KvAttentionKernel* choose_kernel(int rows) {
  return rows == 8 ? kv_attention<TERSOR_HEAD_DIM, 8> : kv_attention<TERSOR_HEAD_DIM, kv_most_rows(TERSOR_HEAD_DIM)>;
}
const bool entered = (kv_attention_choosers[TERSOR_HEAD_DIM] = choose_kernel, true);

}  // namespace
}  // namespace tersor
