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
// SHARED MEMORY, bytes: 4 warps x (slots x unit + 64) + query; 64, 80, 96, 128, 256 channels:
//     kRows 8   4 slots, 80 and 96: 3    38144  41472  43264  39168  41216
//     kRows 16                           39168  42752  44800  41216  45312
// REGISTERS: what the gate asserts, no spills:
// gate: defines TERSOR_HEAD_DIM=64,80,96,128,256
// gate: registers 168 where <64, 8>
// gate: registers 255
// gate: wants HMMA.16816.F32 HMMA.16816.F32.BF16 LDGSTS.E.BYPASS LDS.128 MUFU.EX2
//
// LIMITS. Keys and values have one head dimension; values share scales over 64 channels (80, 96). Every 16 rows read
// the pages again, from L2 where blocks run together: made for decoding and for short prompts over long history. A
// split counts pages, also those outside a window. A NaN that a causal mask hides from a query but not from its row
// tile reaches it through 0 times NaN.
#include "kernels/sm80_kv_attention.h"

#include "ptx/math.h"
#include "ptx/ptx.h"
#include "tile/kv_results.h"
#include "tile/kv_stream.h"
#include "tile/number.h"

namespace tersor {
namespace {

using ptx::shared_t;

constexpr uint32_t kOnes = 0x3f803f80;  // bf16

// Two numbers as 16 bits each, and what that rounded off.
template <class Type>
TERSOR_DEVICE uint32_t split_pair(float low, float high, uint32_t& remainder) {
  const uint32_t pair = Type::pack(low, high);
  remainder = Type::pack(low - Type::low(pair), high - Type::high(pair));
  return pair;
}

// Positions that rows of a block see: each of them, and any of them.
struct Limits {
  int all_from, all_to, any_from, any_to;
};

template <int kDim, int kRows>
struct KvAttention : KvRows<kDim, kRows> {
  using Rows = KvRows<kDim, kRows>;
  using Rows::a;
  using Results = KvResults<kDim, kRows>;
  static constexpr int kRecords = kDim / kKvRecordChannels, kGroupRecords = kv_group_records(kDim);
  static constexpr int kGroups = kRecords / kGroupRecords;
  static constexpr bool kPaired = kRows == 8;   // rows 8 to 15 of a product are remainders of rows 0 to 7
  static constexpr int kOwn = kPaired ? 1 : 2;  // query rows of a lane
  static constexpr int kSlots = kv_slots(kDim, kRows);
  static constexpr int kStreamBytes = kv_stream_bytes(kDim, kSlots);
  static_assert(kRows == 8 || kRows == 16, "a fragment has 16 rows");
  static_assert(kRecords == kGroups * kGroupRecords, "groups are whole");
  static_assert(Results::kBytes <= kKvWarps * kStreamBytes, "what warps merge fits where the units were");

  // A fragment A, with the remainders in it (kPaired) or beside it.
  struct Operand {
    uint32_t first[4], second[4];
    // Columns 2t, 2t + 1 of half `half` and row g + 8 row.
    TERSOR_DEVICE void set(int half, int row, uint32_t pair, uint32_t remainder) {
      if (kPaired) {
        first[2 * half] = pair;
        first[2 * half + 1] = remainder;
      } else {
        first[2 * half + row] = pair;
        second[2 * half + row] = remainder;
      }
    }
    template <class Type, bool kBoth = true>
    TERSOR_DEVICE void multiply(float (&d)[4], const uint32_t (&b)[2]) const {
      Type::mma(d, first, b);
      if (kBoth && !kPaired) Type::mma(d, second, b);
    }
  };

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const shared_t shared = ptx::dynamic_shared();
  const shared_t query = shared + kKvWarps * kStreamBytes, limits_at = query + kv_query_bytes(kDim, kRows);
  KvStream<kDim, kSlots> stream;

  float out[2 * kRecords][4];
  float minima[kGroups][kOwn];  // p times minima, this lane's tokens
  float peak[kOwn], total[kOwn];

  TERSOR_DEVICE KvAttention(const KvAttentionArguments& arguments, const KvPage* table, int scan, int end)
      : Rows{arguments},
        stream(ptx::dynamic_shared() + threadIdx.x / 32 * kStreamBytes, table, Rows::head(), scan, end) {}

  TERSOR_DEVICE Limits limits() const { return ptx::load_shared<Limits>(limits_at); }
  TERSOR_DEVICE shared_t next_unit() {
    const Limits seen = limits();
    return stream.next(seen.any_from, seen.any_to);
  }

  // Words for the eighth kPart of a record's pairs: pairs are used in order, and their words loaded a chunk ahead.
  template <int kBits, int kPart>
  TERSOR_DEVICE void load_ahead(KvWords<kBits>& codes, shared_t record) const {
    constexpr int chunks = KvWords<kBits>::kChunks, each = 8 / chunks;  // parts that a chunk has
    if constexpr (kPart % each == 0) {
      const auto load_piece = [&](auto piece, int at) { return ptx::load_shared<decltype(piece)>(record + at); };
      if (kPart == 0) codes.load_chunk(0, lane, load_piece);
      if (kPart / each + 1 < chunks) codes.load_chunk(kPart / each + 1, lane, load_piece);
    }
  }

  // ---- keys ---------------------------------------------------------------------------------------------------

  TERSOR_DEVICE ptx::Vec<float, 2> unpack_query(uint32_t pair) const {
    return a.is_bfloat16 ? ptx::unpack_bf16x2(pair) : ptx::unpack_f16x2(pair);
  }

  // The queries' channels of record `index` as A: as they are, or times the scales of a packed record.
  template <int kBits>
  TERSOR_DEVICE void load_query(Operand& q, float (&constant)[kOwn], shared_t record, int index) const {
    const auto pairs = ptx::load_shared<ptx::Vec<uint32_t, 2 * kOwn>>(query + (index * 32 + lane) * 8 * kOwn);
    if constexpr (kBits == 16) {
#pragma unroll
      for (int i = 0; i < 2 * kOwn; ++i) q.set(i % 2, i / 2, pairs[i], 0);
    } else {
      const auto parameters = ptx::load_shared<ptx::Vec<uint32_t, 4>>(record + 16 * t);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto scales = ptx::unpack_f16x2(parameters[half]), lowest = ptx::unpack_f16x2(parameters[2 + half]);
#pragma unroll
        for (int row = 0; row < kOwn; ++row) {
          const auto x = unpack_query(pairs[2 * row + half]);
          const float low_scaled = x[0] * scales[0], high_scaled = x[1] * scales[1];
          constant[row] += x[0] * lowest[0] + x[1] * lowest[1];
          if (kBits == 8) constant[row] += 128.0f * (low_scaled + high_scaled);
          uint32_t remainder;
          const uint32_t pair = split_pair<BFloat16>(low_scaled, high_scaled, remainder);
          q.set(half, row, pair, remainder);
        }
      }
    }
  }

  template <int kBits, class Type, int kTile = 0>
  TERSOR_DEVICE void multiply_keys(float (&sum)[8][4], const Operand& q, KvWords<kBits>& codes, shared_t record) const {
    load_ahead<kBits, kTile>(codes, record);
    const uint32_t b[2] = {kv_pair<kBits, 2 * kTile>(codes), kv_pair<kBits, 2 * kTile + 1>(codes)};
    q.template multiply<Type, kBits != 16>(sum[kTile], b);
    if constexpr (kTile < 7) multiply_keys<kBits, Type, kTile + 1>(sum, q, codes, record);
  }

  // q k^T: score[j][2 row + column] of tokens 8j + 2t and + 1.
  template <int kBits>
  TERSOR_DEVICE void score_keys(float (&score)[8][2 * kOwn]) {
    constexpr int unit = kv_unit_records(kDim, kBits);
    float sum[8][4] = {}, ones[4] = {}, constant[kOwn] = {};
#pragma unroll 1
    for (int first = 0; first < kRecords; first += unit) {
      shared_t record = next_unit();
#pragma unroll
      for (int i = 0; i < unit; ++i) {
        if (kRecords % unit != 0 && first + i >= kRecords) break;
        Operand q;
        load_query<kBits>(q, constant, record, first + i);
        if constexpr (kBits < 16) record += kKvKeyParameters;
        KvWords<kBits> codes;
        if constexpr (kBits < 16) {
          const uint32_t column[2] = {kOnes, kOnes};
          if (kBits < 8) q.template multiply<BFloat16>(ones, column);
          multiply_keys<kBits, BFloat16>(sum, q, codes, record);
        } else if (a.is_bfloat16) {
          multiply_keys<kBits, BFloat16>(sum, q, codes, record);
        } else {
          multiply_keys<kBits, Float16>(sum, q, codes, record);
        }
        record += kv_code_bytes(kBits);
      }
    }
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      if (kBits < 16) {
        constant[row] += ptx::shuffle_xor(constant[row], 1);
        constant[row] += ptx::shuffle_xor(constant[row], 2);
      }
      if (kBits < 8) constant[row] -= 128.0f * (kPaired ? ones[0] + ones[2] : ones[2 * row]);
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float s = kPaired ? sum[j][column] + sum[j][column + 2] : sum[j][2 * row + column];
          score[j][2 * row + column] = s + constant[row];
        }
    }
  }

  // ---- softmax ------------------------------------------------------------------------------------------------

  // Scores to logits in units of log 2, -infinity where a row does not see a token. `valid`: bit 2j + column for
  // the lane's tokens that exist and that some row of the block sees.
  TERSOR_DEVICE uint32_t mask(float (&score)[8][2 * kOwn], const KvPage& page) const {
    const float factor = a.softcap > 0 ? 0 : a.scale * kLog2E;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2 * kOwn; ++i) score[j][i] = a.softcap > 0 ? cap(score[j][i]) : score[j][i] * factor;
    const int last = page.position + page.tokens - 1;
    const Limits seen = limits();
    if (page.tokens == kKvTokens && page.position >= seen.all_from && last <= seen.all_to) return 0xffff;
    const int any_from = seen.any_from > page.position ? seen.any_from : page.position;
    const int any_to = seen.any_to < last ? seen.any_to : last;
    int from[kOwn], to[kOwn];
    for (int row = 0; row < kOwn; ++row) {
      const auto range = ptx::load_shared<ptx::Vec<int, 2>>(limits_at + 16 + 8 * (g + 8 * row));
      from[row] = range[0];
      to[row] = range[1] < last ? range[1] : last;
    }
    uint32_t valid = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int position = page.position + 8 * j + 2 * t + column;
        if (position >= any_from && position <= any_to) valid |= 1u << (2 * j + column);
#pragma unroll
        for (int row = 0; row < kOwn; ++row) {
          if (position < from[row] || position > to[row]) score[j][2 * row + column] = -infinity();
        }
      }
    if (a.mask != nullptr) hide(score, page.position, from, to);
    return valid;
  }

  // By the mask, whose bytes are read where the row sees at all.
  TERSOR_DEVICE void hide(float (&score)[8][2 * kOwn], int first, const int (&from)[kOwn], const int (&to)[kOwn]) const {
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      const int index = this->index_of(g + 8 * row);
      const uint8_t* bytes = a.mask + this->sequence() * a.mask_strides[0] +
                             this->query_head(index) * a.mask_strides[1] + index / a.group * a.mask_strides[2];
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const int position = first + 8 * j + 2 * t + column;
          if (position < from[row] || position > to[row]) continue;
          const int64_t at = (position - a.mask_first) * a.mask_strides[3];
          if (ptx::load_global_constant(bytes + at) == 0) score[j][2 * row + column] = -infinity();
        }
    }
  }

  // tanh by its exponential: close to 0 it has an absolute error of 2^-23, which times the cap is small enough.
  TERSOR_DEVICE float cap(float s) const {
    const float e = ptx::exp2_approx(s * (2 * kLog2E * a.scale / a.softcap));
    return a.softcap * kLog2E * (1.0f - 2.0f / (1.0f + e));
  }

  // Logits to probabilities relative to the row's maximum so far; what was summed before is brought to it.
  TERSOR_DEVICE void soften(float (&score)[8][2 * kOwn]) {
    float factor[kOwn];
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      float most = peak[row];
#pragma unroll
      for (int j = 0; j < 8; ++j) most = larger(larger(score[j][2 * row], score[j][2 * row + 1]), most);
      most = larger(ptx::shuffle_xor(most, 1), most);
      most = larger(ptx::shuffle_xor(most, 2), most);
      const float reference = reference_of(most);
      factor[row] = ptx::exp2_approx(peak[row] - reference);
      peak[row] = most;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) sum += score[j][i] = ptx::exp2_approx(score[j][i] - reference);
      total[row] = total[row] * factor[row] + sum;
    }
    // Maxima settle after some pages; then there is nothing to bring anywhere.
    bool moved = false;
    for (int row = 0; row < kOwn; ++row) moved |= factor[row] != 1.0f;
    if (!ptx::any(moved)) return;
#pragma unroll
    for (int n = 0; n < 2 * kRecords; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= factor[kPaired ? 0 : i / 2];
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int row = 0; row < kOwn; ++row) minima[group][row] *= factor[row];
  }

  // ---- values -------------------------------------------------------------------------------------------------

  // Probabilities as A for the four steps of 16 tokens, as they are.
  template <class Type>
  TERSOR_DEVICE void plain_weights(Operand (&weights)[4], const float (&p)[8][2 * kOwn]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int row = 0; row < kOwn; ++row) {
        uint32_t remainder;
        const uint32_t pair = split_pair<Type>(p[j][2 * row], p[j][2 * row + 1], remainder);
        weights[j / 2].set(j % 2, row, pair, remainder);
      }
  }

  // Probabilities times the scales of a group's tokens, and their sum with the minima, to which the middle of the codes
  // belongs. Tokens that nobody sees may hold anything: 0 times their NaN must not be.
  template <int kBits>
  TERSOR_DEVICE void scaled_weights(Operand (&weights)[4], float (&sum)[kOwn], const float (&p)[8][2 * kOwn],
                                    shared_t parameters, uint32_t valid) const {
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
      const shared_t at = parameters + 32 * t + 16 * quarter;
      const auto four_scales = ptx::load_shared<ptx::Vec<uint32_t, 4>>(at);
      const auto four_minima = ptx::load_shared<ptx::Vec<uint32_t, 4>>(at + kKvValueParameters / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * quarter + i;
        auto scales = ptx::unpack_f16x2(four_scales[i]), lowest = ptx::unpack_f16x2(four_minima[i]);
        if (valid != 0xffff) {
          if (!(valid >> (2 * j) & 1)) scales[0] = lowest[0] = 0;
          if (!(valid >> (2 * j) & 2)) scales[1] = lowest[1] = 0;
        }
#pragma unroll
        for (int row = 0; row < kOwn; ++row) {
          const float low_p = p[j][2 * row], high_p = p[j][2 * row + 1];
          const float low_scaled = low_p * scales[0], high_scaled = high_p * scales[1];
          sum[row] += low_p * lowest[0] + high_p * lowest[1];
          sum[row] += float(1 << (kBits - 1)) * (low_scaled + high_scaled);
          uint32_t remainder;
          const uint32_t pair = split_pair<BFloat16>(low_scaled, high_scaled, remainder);
          weights[j / 2].set(j % 2, row, pair, remainder);
        }
      }
    }
  }

  // Step kPart / 2 of 16 tokens, for 8 of the record's channels. Raw values of tokens that nobody sees, which may be
  // what memory happened to hold, become 0.
  template <int kBits, class Type, int kPart = 0>
  TERSOR_DEVICE void multiply_values(float (*record_out)[4], const Operand (&weights)[4], KvWords<kBits>& codes,
                                     shared_t record, uint32_t valid) const {
    load_ahead<kBits, kPart>(codes, record);
    uint32_t b[2] = {kv_centred_pair<kBits, 2 * kPart>(codes), kv_centred_pair<kBits, 2 * kPart + 1>(codes)};
    if (kBits == 16 && valid != 0xffff) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t two = valid >> (kPart / 2 * 4 + 2 * half);
        b[half] &= (two & 1 ? 0xffffu : 0) | (two & 2 ? 0xffff0000u : 0);
      }
    }
    weights[kPart / 2].template multiply<Type, kBits != 16>(record_out[kPart % 2], b);
    if constexpr (kPart < 7) multiply_values<kBits, Type, kPart + 1>(record_out, weights, codes, record, valid);
  }

  template <int kBits>
  TERSOR_DEVICE void add_values(const float (&p)[8][2 * kOwn], uint32_t valid) {
    constexpr int unit = kv_unit_records(kDim, kBits);
    Operand weights[4];
    if constexpr (kBits == 16) a.is_bfloat16 ? plain_weights<BFloat16>(weights, p) : plain_weights<Float16>(weights, p);
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int first = 0; first < kGroupRecords; first += unit) {
        shared_t record = next_unit();
        if constexpr (kBits < 16) {
          if (first == 0) {
            scaled_weights<kBits>(weights, minima[group], p, record, valid);
            record += kKvValueParameters;
          }
        }
#pragma unroll
        for (int i = first; i < first + unit && i < kGroupRecords; ++i) {
          const int n = 2 * (group * kGroupRecords + i);
          KvWords<kBits> codes;
          if (kBits < 16 || a.is_bfloat16) {
            multiply_values<kBits, BFloat16>(out + n, weights, codes, record, valid);
          } else {
            multiply_values<kBits, Float16>(out + n, weights, codes, record, valid);
          }
          record += kv_code_bytes(kBits);
        }
      }
  }

  // ---- a page -------------------------------------------------------------------------------------------------

  TERSOR_DEVICE void attend(const KvPage& page) {
    float p[8][2 * kOwn];
    switch (page.key_bits) {
      case 2: score_keys<2>(p); break;
      case 3: score_keys<3>(p); break;
      case 4: score_keys<4>(p); break;
      case 8: score_keys<8>(p); break;
      default: score_keys<16>(p);
    }
    const uint32_t valid = mask(p, page);
    soften(p);
    switch (page.value_bits) {
      case 2: add_values<2>(p, valid); break;
      case 3: add_values<3>(p, valid); break;
      case 4: add_values<4>(p, valid); break;
      case 8: add_values<8>(p, valid); break;
      default: add_values<16>(p, valid);
    }
  }

  // ---- before and after -----------------------------------------------------------------------------------------

  TERSOR_DEVICE void load_queries() const {
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      const int index = this->index_of(g + 8 * row);
      const bool exists = this->first_row() + g + 8 * row < this->row_count();
      const uint16_t* from = static_cast<const uint16_t*>(a.q) + this->sequence() * a.q_strides[0] +
                             this->query_head(index) * a.q_strides[1] + index / a.group * a.q_strides[2] + 4 * t;
      for (int record = warp; record < kRecords; record += kKvWarps) {
        ptx::Vec<uint32_t, 2> pairs = {{0, 0}};
        if (exists) {
          pairs = ptx::load_global_constant(
              reinterpret_cast<const ptx::Vec<uint32_t, 2>*>(from + record * kKvRecordChannels));
        }
        ptx::store_shared(query + (record * 32 + lane) * 8 * kOwn + 8 * row, pairs);
      }
    }
  }

  // `position`: of the first query.
  TERSOR_DEVICE void store_limits(int position) const {
    const int first = a.first != nullptr ? ptx::load_global_constant(a.first + this->sequence()) : 0;
    const int least = a.mask != nullptr && a.mask_first > first ? a.mask_first : first;
    const int most = a.mask != nullptr ? a.mask_end - 1 : INT32_MAX;
    const auto from = [&](int row) {
      const int own = position + this->index_of(row) / a.group;
      return a.window > 0 && own - a.window + 1 > least ? own - a.window + 1 : least;
    };
    const auto to = [&](int row) {
      const int own = position + this->index_of(row) / a.group;
      return a.causal && own < most ? own : most;
    };
    if (threadIdx.x < kRows) {
      const ptx::Vec<int, 2> range = {{from(threadIdx.x), to(threadIdx.x)}};
      ptx::store_shared(limits_at + 16 + 8 * threadIdx.x, range);
    } else if (threadIdx.x == kRows) {
      // With a mask no page is seen whole unread.
      const int all_from = a.mask != nullptr ? INT32_MAX : from(kRows - 1);
      ptx::store_shared(limits_at, Limits{all_from, to(0), from(0), to(kRows - 1)});
    }
  }

  TERSOR_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < 2 * kRecords; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      peak[row] = -infinity();
      total[row] = 0;
      for (int group = 0; group < kGroups; ++group) minima[group][row] = 0;
    }
  }

  // The four warps' results as one in shared memory, in the order of the warps.
  TERSOR_DEVICE void merge_warps(const Results& results) {
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      total[row] += ptx::shuffle_xor(total[row], 1);
      total[row] += ptx::shuffle_xor(total[row], 2);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        minima[group][row] += ptx::shuffle_xor(minima[group][row], 1);
        minima[group][row] += ptx::shuffle_xor(minima[group][row], 2);
      }
    }
    ptx::barrier();  // nobody reads units any more
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      const ptx::Vec<float, 2> both = {{peak[row], total[row]}};
      if (t == 0) ptx::store_shared(results.statistics_at(warp, g + 8 * row), both);
    }
    ptx::barrier();
    float factor[kOwn];
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      factor[row] = ptx::exp2_approx(peak[row] - reference_of(results.merged(g + 8 * row)[0]));
    }
#pragma unroll 1
    for (int turn = 0; turn < kKvWarps; ++turn) {
      if (warp == turn) {
#pragma unroll
        for (int n = 0; n < 2 * kRecords; ++n)
#pragma unroll
          for (int row = 0; row < kOwn; ++row) {
            const shared_t at = results.sum_at(g + 8 * row, 8 * n + 2 * t);
            ptx::Vec<float, 2> two = {{0, 0}};
            if (turn > 0) two = ptx::load_shared<ptx::Vec<float, 2>>(at);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float sum = kPaired ? out[n][i] + out[n][i + 2] : out[n][2 * row + i];
              two[i] += (sum + minima[n / 2 / kGroupRecords][row]) * factor[row];
            }
            ptx::store_shared(at, two);
          }
      }
      ptx::barrier();
    }
  }

  TERSOR_DEVICE void run() {
    clear();
    const Limits seen = limits();
    stream.start(seen.any_from, seen.any_to);
    ptx::region("pages");
    for (int index = 0; index < stream.listed(); ++index) attend(stream.page(index));
    ptx::region("results");
    ptx::cp_async_wait<0>();
    const Results results(a, shared);
    merge_warps(results);
    if (a.splits > 1) {
      results.write_with_splits();
    } else {
      results.write();
    }
  }
};

template <int kDim, int kRows>
__global__ void __launch_bounds__(kKvThreads, kv_blocks_per_multiprocessor(kDim, kRows))
    kv_attention(const KvAttentionArguments a) {
  ptx::region("start");
  const int sequence = blockIdx.z, warp = threadIdx.x / 32;
  const KvPage* table = a.table + int64_t(sequence) * a.table_pages;
  const int pages = ptx::load_global_constant(a.pages + sequence);
  int position = 0;
  if (a.positions != nullptr) {
    position = ptx::load_global_constant(a.positions + sequence);
  } else if (pages > 0) {
    const KvPage last = ptx::load_global_constant(table + pages - 1);
    position = last.position + last.tokens - a.queries;
  }
  const int share = (pages + a.splits - 1) / a.splits, begin = blockIdx.x * share;
  KvAttention<kDim, kRows> attention(a, table, begin + warp, begin + share < pages ? begin + share : pages);
  attention.store_limits(position);
  attention.load_queries();
  ptx::barrier();
  attention.run();
}

KvAttentionKernel* choose_kernel(int rows) {
  return rows == 8 ? kv_attention<TERSOR_HEAD_DIM, 8> : kv_attention<TERSOR_HEAD_DIM, kv_most_rows(TERSOR_HEAD_DIM)>;
}
const bool entered = (kv_attention_choosers[TERSOR_HEAD_DIM] = choose_kernel, true);

}  // namespace
}  // namespace tersor
