// Scores of a row tile's queries against a page of the cache, as logits in registers.
//
// Packed pages. The scale of a key's channel is multiplied into q, once for the page's 64 tokens, in fp32 kept as two
// bf16 of 16 bits together. Codes become bf16 integers, exactly. Below 8 bits a key's is 128 + code: a product with a
// column of ones gives what the 128 add up to, which takes eight instructions for a page instead of one for each pair.
// Minima: q times them is the same for a page's tokens, one fp32 sum for a row. Raw pages multiply q as it is, in its
// own type. Formats: scales of tokens multiply the sums, whose columns are tokens; scales of 32 tokens make two queries
// of a record, the second for its last four tiles; levels become signed bytes by prmt, and then what 8 bits become;
// outliers add q times their difference to the scores of their token; keys from before
// their rotary embedding are turned in fp32 (their two channels are a pair of codes) and multiplied as two bf16.
#pragma once

#include "ptx/math.h"
#include "ptx/ptx.h"
#include "tile/kv_codes.h"
#include "tile/kv_rows.h"
#include "tile/kv_stream.h"
#include "tile/number.h"

namespace tersor {

constexpr uint32_t kOnes = 0x3f803f80;  // bf16

// Two numbers as 16 bits each, and what that rounded off.
template <class Type>
TERSOR_DEVICE uint32_t split_pair(float low, float high, uint32_t& remainder) {
  const uint32_t pair = Type::pack(low, high);
  remainder = Type::pack(low - Type::low(pair), high - Type::high(pair));
  return pair;
}

// A warp's part of the scores: its stream of pages, and what to do with their keys. kValues: the stream has values too.
template <int kDim, int kRows, bool kFormats, bool kValues>
struct KvScores : KvRows<kDim, kRows> {
  using shared_t = ptx::shared_t;
  using Rows = KvRows<kDim, kRows>;
  using Rows::a;
  using Rows::kOwn;
  using Rows::kRecords;
  static constexpr bool kPaired = kRows == 8;   // rows 8 to 15 of a product are remainders of rows 0 to 7
  static constexpr int kSlots = kv_slots(kDim, kRows, kFormats);
  static constexpr int kStreamBytes = kv_stream_bytes(kDim, kSlots, kFormats);
  static constexpr bool kTurns = kFormats && kv_turns_keys(kDim), kHalves = kFormats && kv_halves_keys(kDim);
  static_assert(kRows == 8 || kRows == 16, "a fragment has 16 rows");

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
  KvStream<kDim, kSlots, kFormats, kValues> stream;

  TERSOR_DEVICE KvScores(const KvAttentionArguments& arguments, int tile, const KvPage* table, int scan, int end)
      : Rows{arguments, tile},
        stream(ptx::dynamic_shared() + threadIdx.x / 32 * kStreamBytes, table, Rows::head(), scan, end,
               arguments.formats, arguments.biased) {}

  TERSOR_DEVICE const KvFormat& format(const KvPage& page) const { return a.formats[page.format]; }
  // Shared memory of the warp's own, with formats: for what would take too many registers.
  TERSOR_DEVICE shared_t scratch() const { return limits_at + kv_limit_bytes(kRows) + warp * kKvWeightBytes; }
  TERSOR_DEVICE Limits limits() const { return ptx::load_shared<Limits>(limits_at); }
  TERSOR_DEVICE shared_t next_unit() {
    const Limits seen = limits();
    return stream.next(seen.any_from, seen.any_to);
  }

  // Words for the eighth kPart of a record's pairs: pairs are used in order, and their words loaded a chunk ahead;
  // those of levels all at first, of `bits` bits.
  template <int kCode, int kPart>
  TERSOR_DEVICE void load_ahead(KvWords<kv_code_words(kCode)>& codes, shared_t record, int bits,
                                const uint32_t (&levels)[4]) const {
    constexpr int chunks = kv_code_words(kCode) < 4 ? 1 : kv_code_words(kCode) / 4, each = 8 / chunks;
    const auto load_piece = [&](auto piece, int at) { return ptx::load_shared<decltype(piece)>(record + at); };
    if constexpr (kCode == kKvBytes) {
      if (kPart == 0) look_up(codes, bits, levels, load_piece);
    } else if constexpr (kPart % each == 0) {
      if (kPart == 0) codes.load_chunk(0, lane, load_piece);
      if (kPart / each + 1 < chunks) codes.load_chunk(kPart / each + 1, lane, load_piece);
    }
  }
  template <class Load>
  TERSOR_DEVICE void look_up(KvWords<8>& bytes, int bits, const uint32_t (&levels)[4], const Load& load_piece) const {
    if (bits == 4) {
      look_up<4>(bytes, levels, load_piece);
    } else if (bits == 3) {
      look_up<3>(bytes, levels, load_piece);
    } else {
      look_up<2>(bytes, levels, load_piece);
    }
  }
  template <int kBits, class Load>
  TERSOR_DEVICE void look_up(KvWords<8>& bytes, const uint32_t (&levels)[4], const Load& load_piece) const {
    KvWords<kBits> codes;
    codes.load_chunk(0, lane, load_piece);
    kv_level_words(bytes, codes, levels);
  }

  TERSOR_DEVICE ptx::Vec<float, 2> unpack_query(uint32_t pair) const {
    return a.is_bfloat16 ? ptx::unpack_bf16x2(pair) : ptx::unpack_f16x2(pair);
  }

  // The queries' channels of record `index` as A: as they are, or times the scales of a packed record. `constant`: what
  // belongs to every token (`halves`: of a half, what codes below 8 bits have too much too), or, where scales are the
  // tokens', the sum of the queries.
  template <int kCode>
  TERSOR_DEVICE void load_query(Operand& q, float (&constant)[kOwn], shared_t record, int index, KvUnits units,
                                bool token, bool halves) const {
    const auto pairs = ptx::load_shared<ptx::Vec<uint32_t, 2 * kOwn>>(query + (index * 32 + lane) * 8 * kOwn);
    if constexpr (kCode == 16) {
#pragma unroll
      for (int i = 0; i < 2 * kOwn; ++i) q.set(i % 2, i / 2, pairs[i], 0);
    } else if (kFormats && token) {
#pragma unroll
      for (int i = 0; i < 2 * kOwn; ++i) {
        const auto x = unpack_query(pairs[i]);
        constant[i / 2] += x[0] + x[1];
        uint32_t remainder;
        const uint32_t pair = split_pair<BFloat16>(x[0], x[1], remainder);
        q.set(i % 2, i / 2, pair, remainder);
      }
    } else {
      const auto parameters = ptx::load_shared<ptx::Vec<uint32_t, 4>>(record + 16 * t);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto scales = ptx::unpack_f16x2(parameters[half]), lowest = ptx::unpack_f16x2(parameters[2 + half]);
#pragma unroll
        for (int row = 0; row < kOwn; ++row) {
          const auto x = unpack_query(pairs[2 * row + half]);
          float low_scaled = x[0] * scales[0], high_scaled = x[1] * scales[1];
          constant[row] += x[0] * lowest[0] + x[1] * lowest[1];
          if (kCode >= 8) constant[row] += units.offset * (low_scaled + high_scaled);
          if (kCode == kKvBytes) {
            low_scaled *= units.unit;
            high_scaled *= units.unit;
          }
          uint32_t remainder;
          const uint32_t pair = split_pair<BFloat16>(low_scaled, high_scaled, remainder);
          q.set(half, row, pair, remainder);
          if (kFormats && kCode < 8 && halves) {  // of what the products have, to the bit
            const auto first = ptx::unpack_bf16x2(pair), rest = ptx::unpack_bf16x2(remainder);
            constant[row] -= 128.0f * (first[0] + first[1] + (rest[0] + rest[1]));
          }
        }
      }
    }
  }

  template <int kCode, class Type, int kTile, int kEnd>
  TERSOR_DEVICE void multiply_keys(float (&sum)[8][4], const Operand& q, KvWords<kv_code_words(kCode)>& codes,
                                   shared_t record, int bits, const uint32_t (&levels)[4]) const {
    load_ahead<kCode, kTile>(codes, record, bits, levels);
    const uint32_t b[2] = {kv_key_pair<kCode, 2 * kTile>(codes), kv_key_pair<kCode, 2 * kTile + 1>(codes)};
    q.template multiply<Type, kCode != 16>(sum[kTile], b);
    if constexpr (kTile + 1 < kEnd) multiply_keys<kCode, Type, kTile + 1, kEnd>(sum, q, codes, record, bits, levels);
  }

  // q k^T: score[j][2 row + column] of tokens 8j + 2t and + 1.
  template <int kCode>
  TERSOR_DEVICE void score_keys(float (&score)[8][2 * kOwn], const KvPage& page) {
    constexpr int unit = kv_unit_records(kDim, kCode == kKvBytes ? 4 : kCode == kKvFloats ? 8 : kCode, kFormats);
    const KvFormat& f = format(page);
    const int bits = kCode == kKvBytes ? page.key_bits : kv_code_words(kCode);
    const bool token = kFormats && kCode != 16 && f.key_token, halves = kHalves && kCode != 16 && f.key_halves;
    const KvUnits units = kv_units<kCode>(bits);
    float sum[8][4] = {}, ones[4] = {}, constant[kOwn] = {}, second[kOwn] = {};
#pragma unroll 1
    for (int first = 0; first < kRecords; first += unit) {
      shared_t record = next_unit();
      if (kFormats && token && first == 0) {
        // Kept until the scores are there.
        ptx::store_shared(scratch() + 8 * lane, ptx::load_shared<ptx::Vec<uint32_t, 2>>(record + 8 * lane));
        record += kKvValueParameters;
      }
#pragma unroll
      for (int i = 0; i < unit; ++i) {
        if (kRecords % unit != 0 && first + i >= kRecords) break;
        Operand q;
        load_query<kCode>(q, constant, record, first + i, units, token, halves);
        if (kCode != 16 && !token) record += halves ? 2 * kKvKeyParameters : kKvKeyParameters;
        KvWords<kv_code_words(kCode)> codes;
        if constexpr (kCode != 16) {
          const uint32_t column[2] = {kOnes, kOnes};
          if (kCode < 8 && !halves) q.template multiply<BFloat16>(ones, column);
          multiply_keys<kCode, BFloat16, 0, 4>(sum, q, codes, record, bits, f.key_levels);
          if (halves) load_query<kCode>(q, second, record - kKvKeyParameters, first + i, units, false, true);
          multiply_keys<kCode, BFloat16, 4, 8>(sum, q, codes, record, bits, f.key_levels);
        } else if (a.is_bfloat16) {
          multiply_keys<kCode, BFloat16, 0, 8>(sum, q, codes, record, bits, f.key_levels);
        } else {
          multiply_keys<kCode, Float16, 0, 8>(sum, q, codes, record, bits, f.key_levels);
        }
        record += kv_code_bytes(bits);
      }
    }
    float base[kOwn] = {};  // what codes of 2 to 4 bits have too much
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      if (kCode != 16) {
        constant[row] += ptx::shuffle_xor(constant[row], 1);
        constant[row] += ptx::shuffle_xor(constant[row], 2);
      }
      if (kFormats && halves) {
        second[row] += ptx::shuffle_xor(second[row], 1);
        second[row] += ptx::shuffle_xor(second[row], 2);
      }
      if (kCode < 8) base[row] = 128.0f * (kPaired ? ones[0] + ones[2] : ones[2 * row]);
    }
    if (kFormats && token) {
      scale_tokens(score, sum, base, constant, {units.unit, kCode < 8 ? 0 : units.offset});
      return;
    }
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      if (kCode < 8) constant[row] -= base[row];
      if (!halves) second[row] = constant[row];
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          score[j][2 * row + column] = sum_of(sum[j], row, column) + (j < 4 ? constant[row] : second[row]);
        }
    }
  }

  // A row's sum with its remainder's.
  TERSOR_DEVICE float sum_of(const float (&sum)[4], int row, int column) const {
    return kPaired ? sum[column] + sum[column + 2] : sum[2 * row + column];
  }

  // Scores of keys whose scales and minima are the tokens', from where they were kept. `whole`: the sum of a row's
  // queries.
  TERSOR_DEVICE void scale_tokens(float (&score)[8][2 * kOwn], const float (&sum)[8][4], const float (&base)[kOwn],
                                  const float (&whole)[kOwn], KvUnits units) const {
    ptx::sync_warp();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const shared_t at = scratch() + 32 * t + 4 * j;
      const auto scales = ptx::unpack_f16x2(ptx::load_shared<uint32_t>(at));
      const auto lowest = ptx::unpack_f16x2(ptx::load_shared<uint32_t>(at + kKvValueParameters / 2));
#pragma unroll
      for (int row = 0; row < kOwn; ++row)
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float codes = units.unit * (sum_of(sum[j], row, column) - base[row]) + units.offset * whole[row];
          score[j][2 * row + column] = scales[column] * codes + lowest[column] * whole[row];
        }
    }
  }

  // Entries of this lane's tokens, each times its channel of the lane's queries.
  TERSOR_DEVICE void add_outliers(float (&score)[8][2 * kOwn], shared_t starts) const {
    const shared_t entries = starts + kv_outlier_starts_bytes(kKvTokens / 2);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const shared_t at = starts + 2 * (4 * j + t);
      const int end = ptx::load_shared<uint16_t>(at + 2);
      for (int e = ptx::load_shared<uint16_t>(at); e < end; ++e) {
        const uint32_t entry = ptx::load_shared<uint32_t>(entries + 4 * e);
        const int index = entry & 0xffff, channel = index % kDim;
        const float difference = ptx::unpack_f16x2(entry)[1];
        const bool second = index / kDim % 2 != 0;
        ptx::Vec<float, 2> turn = {{1, 0}};
        if (kTurns && channel < 2 * a.rotary.pairs) turn = turn_of(index / kDim, channel / 2);
#pragma unroll
        for (int row = 0; row < kOwn; ++row) {
          const float other = channel % 2 == 0 ? query_at(row, channel + 1) : -query_at(row, channel - 1);
          const float add = difference * (turn[0] * query_at(row, channel) + turn[1] * other);
          score[j][2 * row] += second ? 0.0f : add;
          score[j][2 * row + 1] += second ? add : 0.0f;
        }
      }
    }
  }
  // Cosine and sine of a slot and a pair.
  TERSOR_DEVICE ptx::Vec<float, 2> turn_of(int slot, int pair) const {
    return ptx::load_global_constant(
        reinterpret_cast<const ptx::Vec<float, 2>*>(a.rotary.table + 2 * (slot * a.rotary.pairs + pair)));
  }
  TERSOR_DEVICE float query_at(int row, int channel) const {
    const int place = channel / kKvRecordChannels * 32 + 4 * g + channel % kKvRecordChannels / 4;
    return unpack_query(ptx::load_shared<uint16_t>(query + place * 8 * kOwn + 8 * row + channel % 4 * 2))[0];
  }

  // A page's residual, which there may be none of (rank 0).
  TERSOR_DEVICE KvResidual residual_of(const KvPage& page) const {
    const auto* at = reinterpret_cast<const ptx::Vec<int64_t, 2>*>(
        a.residuals + int64_t(this->sequence()) * a.table_pages + page.position / kKvTokens);
    const auto addresses = ptx::load_global_constant(at), numbers = ptx::load_global_constant(at + 1);
    return {addresses[0], addresses[1], numbers[0], numbers[1]};
  }
  // Two tokens of a row of its left factors: those of keys, or `values`.
  TERSOR_DEVICE ptx::Vec<float, 2> residual_pair(const KvResidual& r, int i, int j, bool values) const {
    const int64_t row = (int64_t(this->head()) * 2 + values) * r.rank + i;
    return ptx::unpack_f16x2(ptx::load_global_constant(
        reinterpret_cast<const uint32_t*>(r.left + (row * kKvTokens + 8 * j + 2 * t) * 2)));
  }
  TERSOR_DEVICE void add_residual(float (&score)[8][2 * kOwn], const KvPage& page) const {
    const KvResidual r = residual_of(page);
#pragma unroll 1
    for (int i = 0; i < r.rank; ++i) {
      float q[kOwn];
#pragma unroll
      for (int row = 0; row < kOwn; ++row) {
        const int index = this->index_of(g + 8 * row);
        const int64_t of = (int64_t(this->sequence()) * a.heads + this->query_head(index)) * a.queries + index / a.group;
        q[row] = ptx::load_global_constant(a.residual_query + of * a.residual_width + r.column + i);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto two = residual_pair(r, i, j, false);
#pragma unroll
        for (int n = 0; n < 2 * kOwn; ++n) score[j][n] += q[n / 2] * two[n % 2];
      }
    }
  }

  // Scores of packed keys that are turned: of any coding and bits, which a record's words become bytes of. Scales of
  // tokens lie behind those bytes.
  TERSOR_DEVICE void score_turned_keys(float (&score)[8][2 * kOwn], const KvPage& page) {
    const KvFormat& f = format(page);
    const int bits = page.key_bits, unit = kv_unit_records(kDim, bits, true);
    const bool floats = f.key_coding == kKvE4M3, looked_up = f.key_coding == kKvLevels;
    const KvUnits units = looked_up ? kv_units<kKvBytes>(bits) : KvUnits{1, bits == 8 && !floats ? 128.0f : 0.0f};
    const uint32_t plain[4] = {0x03020100, 0x07060504, 0x0b0a0908, 0x0f0e0d0c};
    uint32_t levels[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) levels[i] = looked_up ? f.key_levels[i] : plain[i];
    float sum[8][4] = {};
    shared_t record = 0;
#pragma unroll 1
    for (int index = 0; index < kRecords; ++index) {
      if (index % unit == 0) record = next_unit();
      if (f.key_token && index == 0) {
        ptx::store_shared(scratch() + kTurnedBytes + 8 * lane,
                          ptx::load_shared<ptx::Vec<uint32_t, 2>>(record + 8 * lane));
        ptx::sync_warp();
        record += kKvValueParameters;
      }
      const auto pairs = ptx::load_shared<ptx::Vec<uint32_t, 2 * kOwn>>(query + (index * 32 + lane) * 8 * kOwn);
      Operand q;
#pragma unroll
      for (int i = 0; i < 2 * kOwn; ++i) {
        const auto x = unpack_query(pairs[i]);
        uint32_t remainder;
        const uint32_t pair = split_pair<BFloat16>(x[0], x[1], remainder);
        q.set(i % 2, i / 2, pair, remainder);
      }
      const shared_t parameters = record;
      if (!f.key_token) record += f.key_halves ? 2 * kKvKeyParameters : kKvKeyParameters;
      KvWords<8> codes;
      const auto load_piece = [&](auto piece, int at) { return ptx::load_shared<decltype(piece)>(record + at); };
      if (bits == 8) {
        codes.load_chunk(0, lane, load_piece);
        codes.load_chunk(1, lane, load_piece);
      } else {
        look_up(codes, bits, levels, load_piece);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) ptx::store_shared(scratch() + 128 * i + 4 * lane, codes.words[i]);
      KvTurned turned = {index, floats, f.key_token != 0, units, {}, {}};
      if (!f.key_token) turned.load(parameters + 16 * t);
      multiply_turned<0, 4>(sum, q, turned);
      if (f.key_halves) turned.load(parameters + kKvKeyParameters + 16 * t);
      multiply_turned<4, 8>(sum, q, turned);
      record += kv_code_bytes(bits);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2 * kOwn; ++i) score[j][i] = sum_of(sum[j], i / 2, i % 2);
  }

  static constexpr int kTurnedBytes = 1024;  // of a record's codes in scratch memory

  // A record of keys that are turned, with the lane's scales and minima of channels.
  struct KvTurned {
    int record;
    bool floats, token;
    KvUnits units;
    ptx::Vec<float, 2> scales[2], lowest[2];

    TERSOR_DEVICE void load(shared_t at) {
      const auto parameters = ptx::load_shared<ptx::Vec<uint32_t, 4>>(at);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scales[half] = ptx::unpack_f16x2(parameters[half]);
        lowest[half] = ptx::unpack_f16x2(parameters[2 + half]);
        mend(half);
      }
    }
    // Those of one token, of which there are two in a pair of 16 bits.
    TERSOR_DEVICE void load_token(shared_t at) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = ptx::unpack_f16x2(ptx::load_shared<uint16_t>(at))[0];
        const float least = ptx::unpack_f16x2(ptx::load_shared<uint16_t>(at + kKvValueParameters / 2))[0];
        scales[half] = {{scale, scale}};
        lowest[half] = {{least, least}};
        mend(half);
      }
    }
    TERSOR_DEVICE void mend(int half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        lowest[half][i] += scales[half][i] * units.offset;
        scales[half][i] *= units.unit;
      }
    }
  };

  template <int kTile, int kEnd>
  TERSOR_DEVICE void multiply_turned(float (&sum)[8][4], const Operand& q, KvTurned& turned) const {
    if (turned.token) turned.load_token(scratch() + kTurnedBytes + 32 * (g / 2) + 4 * kTile + 2 * (g % 2));
    KvWords<8> codes;
    codes.words[kTile] = ptx::load_shared<uint32_t>(scratch() + 128 * kTile + 4 * lane);
    const bool floats = turned.floats;
    const uint32_t both[2] = {floats ? kv_float_pair<2 * kTile>(codes) : kv_pair<8, 2 * kTile>(codes),
                              floats ? kv_float_pair<2 * kTile + 1>(codes) : kv_pair<8, 2 * kTile + 1>(codes)};
    const int pair = turned.record * (kKvRecordChannels / 2) + 2 * t;
    ptx::Vec<float, 4> turns = {{1, 0, 1, 0}};
    if (pair < a.rotary.pairs) {
      // In order, tile by tile: loaded all at once they would need 32 registers.
      turns = ptx::load_global(reinterpret_cast<const ptx::Vec<float, 4>*>(
          a.rotary.table + 2 * ((8 * kTile + g) * a.rotary.pairs + pair)));
    }
    uint32_t b[2], rest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto code = ptx::unpack_bf16x2(both[half]);
      const float x = code[0] * turned.scales[half][0] + turned.lowest[half][0];
      const float y = code[1] * turned.scales[half][1] + turned.lowest[half][1];
      const float cosine = turns[2 * half], sine = turns[2 * half + 1];
      b[half] = split_pair<BFloat16>(x * cosine - y * sine, y * cosine + x * sine, rest[half]);
    }
    q.template multiply<BFloat16>(sum[kTile], b);
    BFloat16::mma(sum[kTile], q.first, rest);
    if constexpr (kTile + 1 < kEnd) multiply_turned<kTile + 1, kEnd>(sum, q, turned);
  }

  // Logits in units of log 2, -infinity where a row does not see a token; for what is returned see `mask`.
  TERSOR_DEVICE uint32_t logits(float (&score)[8][2 * kOwn], const KvPage& page) {
    const int coding = kFormats && page.key_bits < 16 ? format(page).key_coding : int(kKvUniform);
    if (kTurns && a.rotary.pairs > 0 && page.key_bits < 16) {
      if constexpr (kTurns) score_turned_keys(score, page);
    } else if (kFormats && coding == kKvLevels) {
      score_keys<kFormats ? kKvBytes : 16>(score, page);
    } else if (kFormats && coding == kKvE4M3) {
      score_keys<kFormats ? kKvFloats : 16>(score, page);
    } else {
      switch (page.key_bits) {
        case 2: score_keys<2>(score, page); break;
        case 3: score_keys<3>(score, page); break;
        case 4: score_keys<4>(score, page); break;
        case 8: score_keys<8>(score, page); break;
        default: score_keys<16>(score, page);
      }
    }
    shared_t biases = 0;
    if constexpr (kFormats) {
      if (kv_adds_residuals(kDim) && a.residuals != nullptr && page.key_bits < 16) add_residual(score, page);
      const int outliers = format(page).key_outliers;
      if (outliers > 0 || a.biased) biases = next_unit();
      if (outliers > 0) add_outliers(score, biases);
      biases += kv_outlier_bytes(kKvTokens / 2, outliers);
    }
    return mask(score, page, biases);
  }

  // Scores to logits in units of log 2, -infinity where a row does not see a token. `valid`: bit 2j + column for
  // the lane's tokens that exist and that some row of the block sees.
  TERSOR_DEVICE uint32_t mask(float (&score)[8][2 * kOwn], const KvPage& page, shared_t biases) const {
    const float factor = a.softcap > 0 ? 0 : a.scale * kLog2E;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2 * kOwn; ++i) score[j][i] = a.softcap > 0 ? cap(score[j][i]) : score[j][i] * factor;
    if (kFormats && a.biased) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto bias = ptx::load_shared<ptx::Vec<float, 2>>(biases + 4 * (8 * j + 2 * t));
#pragma unroll
        for (int i = 0; i < 2 * kOwn; ++i) score[j][i] += bias[i % 2] * kLog2E;
      }
    }
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
    if (a.mask != nullptr) hide(score, page.position);
    return valid;
  }

  // By the mask, whose bytes are read where the row sees at all.
  TERSOR_DEVICE void hide(float (&score)[8][2 * kOwn], int first) const {
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
          if (score[j][2 * row + column] == -infinity()) continue;
          const int64_t at = (position - a.mask_first) * a.mask_strides[3];
          if (ptx::load_global(bytes + at) == 0) score[j][2 * row + column] = -infinity();
        }
    }
  }

  // tanh by its exponential: close to 0 it has an absolute error of 2^-23, which times the cap is small enough.
  TERSOR_DEVICE float cap(float s) const {
    const float e = ptx::exp2_approx(s * (2 * kLog2E * a.scale / a.softcap));
    return a.softcap * kLog2E * (1.0f - 2.0f / (1.0f + e));
  }
};

}  // namespace tersor
