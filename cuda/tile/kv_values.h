// Probabilities of a row tile times the values of a page, into sums in registers.
//
// Packed pages. The scale of a value's token and group is multiplied into p, in fp32 kept as two bf16 of 16 bits
// together; codes around zero become bf16 integers, exactly. Minima: p times them is the same for a group's channels,
// a sum of its own. Formats: factors of channels multiply a page's sums, record by record; outliers add p times their
// difference, p from shared memory.
#pragma once

#include "tile/kv_scores.h"

namespace tersor {

template <int kDim, int kRows, bool kFormats>
struct KvValues : KvScores<kDim, kRows, kFormats, true> {
  using shared_t = ptx::shared_t;
  using Scores = KvScores<kDim, kRows, kFormats, true>;
  using Scores::a;
  using Scores::g;
  using Scores::kOwn;
  using Scores::kPaired;
  using Scores::kRecords;
  using Scores::t;
  using Operand = typename Scores::Operand;
  static constexpr int kGroupRecords = kv_group_records(kDim), kGroups = kRecords / kGroupRecords;
  static_assert(kRecords == kGroups * kGroupRecords, "groups are whole");

  float out[2 * kRecords][4];
  float minima[kGroups][kOwn];  // p times minima, this lane's tokens; not with formats, whose sums have them

  using Scores::Scores;

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
  template <int kCode>
  TERSOR_DEVICE void scaled_weights(Operand (&weights)[4], float (&sum)[kOwn], const float (&p)[8][2 * kOwn],
                                    shared_t parameters, uint32_t valid, KvUnits units) const {
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
          float low_scaled = low_p * scales[0], high_scaled = high_p * scales[1];
          sum[row] += low_p * lowest[0] + high_p * lowest[1];
          sum[row] += units.offset * (low_scaled + high_scaled);
          if (kCode == kKvBytes) {
            low_scaled *= units.unit;
            high_scaled *= units.unit;
          }
          uint32_t remainder;
          const uint32_t pair = split_pair<BFloat16>(low_scaled, high_scaled, remainder);
          weights[j / 2].set(j % 2, row, pair, remainder);
        }
      }
    }
  }

  // Step kPart / 2 of 16 tokens, for 8 of the record's channels. Raw values of tokens that nobody sees, which may be
  // what memory happened to hold, become 0.
  template <int kCode, class Type, int kPart = 0>
  TERSOR_DEVICE void multiply_values(float (*record_out)[4], const Operand (&weights)[4],
                                     KvWords<kv_code_words(kCode)>& codes, shared_t record, uint32_t valid, int bits,
                                     const uint32_t (&levels)[4]) const {
    this->template load_ahead<kCode, kPart>(codes, record, bits, levels);
    uint32_t b[2] = {kv_value_pair<kCode, 2 * kPart>(codes), kv_value_pair<kCode, 2 * kPart + 1>(codes)};
    if (kCode == 16 && valid != 0xffff) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t two = valid >> (kPart / 2 * 4 + 2 * half);
        b[half] &= (two & 1 ? 0xffffu : 0) | (two & 2 ? 0xffff0000u : 0);
      }
    }
    weights[kPart / 2].template multiply<Type, kCode != 16>(record_out[kPart % 2], b);
    if constexpr (kPart < 7) {
      multiply_values<kCode, Type, kPart + 1>(record_out, weights, codes, record, valid, bits, levels);
    }
  }

  template <int kCode>
  TERSOR_DEVICE void add_values(const float (&p)[8][2 * kOwn], uint32_t valid, const KvPage& page) {
    constexpr int unit = kv_unit_records(kDim, kCode == kKvBytes ? 4 : kCode == kKvFloats ? 8 : kCode, kFormats);
    const KvFormat& f = this->format(page);
    const int bits = kCode == kKvBytes ? page.value_bits : kv_code_words(kCode);
    const KvUnits units = kv_units<kCode>(bits);
    Operand weights[4];
    float whole[kOwn] = {};  // of formats: p times minima, of a group of the page
    if constexpr (kCode == 16) a.is_bfloat16 ? plain_weights<BFloat16>(weights, p) : plain_weights<Float16>(weights, p);
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int first = 0; first < kGroupRecords; first += unit) {
        shared_t record = this->next_unit();
        if constexpr (kCode != 16 && !kFormats) {
          if (first == 0) {
            scaled_weights<kCode>(weights, minima[group], p, record, valid, units);
            record += kKvValueParameters;
          }
        }
#pragma unroll
        for (int i = first; i < first + unit && i < kGroupRecords; ++i) {
          const int n = 2 * (group * kGroupRecords + i);
          if constexpr (kCode != 16 && kFormats) {
            if (n / 2 % kv_least_group_records(kDim) == 0 && (n == 0 || (f.value_begins >> (n / 2) & 1) != 0)) {
              begin_group<kCode>(weights, whole, p, record, valid, units);
            }
          }
          KvWords<kv_code_words(kCode)> codes;
          if (kFormats && kCode != 16) {
            const shared_t factors = record;
            if (f.separable) record += 2 * kKvRecordChannels;
            float page_out[2][4] = {};
            multiply_values<kCode, BFloat16>(page_out, weights, codes, record, valid, bits, f.value_levels);
            add_factored(out + n, page_out, whole, factors, f.separable);
          } else if (kCode != 16 || a.is_bfloat16) {
            multiply_values<kCode, BFloat16>(out + n, weights, codes, record, valid, bits, f.value_levels);
          } else {
            multiply_values<kCode, Float16>(out + n, weights, codes, record, valid, bits, f.value_levels);
          }
          record += kv_code_bytes(bits);
        }
      }
  }

  // The weights of a group of a format, and what minima come to in the page.
  template <int kCode>
  TERSOR_DEVICE void begin_group(Operand (&weights)[4], float (&whole)[kOwn], const float (&p)[8][2 * kOwn],
                                 shared_t& record, uint32_t valid, KvUnits units) {
    float sum[kOwn] = {};
    scaled_weights<kCode>(weights, sum, p, record, valid, units);
    record += kKvValueParameters;
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      sum[row] += ptx::shuffle_xor(sum[row], 1);
      whole[row] = sum[row] + ptx::shuffle_xor(sum[row], 2);
    }
  }

  // A page's sums of a record, times the factors of its channels, if it has any.
  TERSOR_DEVICE void add_factored(float (*record_out)[4], const float (&page_out)[2][4], const float (&whole)[kOwn],
                                  shared_t factors, bool separable) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t ones = 0x3c003c00;  // float16
      const auto two = ptx::unpack_f16x2(separable ? ptx::load_shared<uint32_t>(factors + 2 * (8 * n + 2 * t)) : ones);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Where rows are paired, the remainders' half has no part in the minima.
        const float constant = kPaired ? (i < 2 ? whole[0] : 0.0f) : whole[kPaired ? 0 : i / 2];
        record_out[n][i] += two[i % 2] * (page_out[n][i] + constant);
      }
    }
  }

  // Probabilities of 8 rows go through shared memory: a lane has tokens of its own, but entries of its channels.
  TERSOR_DEVICE void add_outliers(const float (&p)[8][2 * kOwn], shared_t starts) {
    const shared_t entries = starts + kv_outlier_starts_bytes(kDim / 2);
    const shared_t weights = this->scratch() + 4 * g * kKvTokens;
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      ptx::sync_warp();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const ptx::Vec<float, 2> two = {{p[j][2 * row], p[j][2 * row + 1]}};
        ptx::store_shared(weights + 4 * ((8 * j + 2 * t) ^ (g % 4 * 8)), two);
      }
      ptx::sync_warp();
#pragma unroll
      for (int n = 0; n < 2 * kRecords; ++n) {
        const shared_t at = starts + 2 * (4 * n + t);
        const int end = ptx::load_shared<uint16_t>(at + 2);
        for (int e = ptx::load_shared<uint16_t>(at); e < end; ++e) {
          const uint32_t entry = ptx::load_shared<uint32_t>(entries + 4 * e);
          const int index = entry & 0xffff, token = index / kDim;
          const float weight = ptx::load_shared<float>(weights + 4 * (token ^ (g % 4 * 8)));
          // A weight of 0 may be that of a token which nobody sees, whose entries mean nothing.
          const float add = weight == 0 ? 0.0f : weight * ptx::unpack_f16x2(entry)[1];
          out[n][2 * row] += index % 2 != 0 ? 0.0f : add;
          out[n][2 * row + 1] += index % 2 != 0 ? add : 0.0f;
        }
      }
    }
  }

  // The residual: p times its left factor, times the right one.
  TERSOR_DEVICE void add_residual(const float (&p)[8][2 * kOwn], const KvPage& page) {
    const KvResidual r = this->residual_of(page);
#pragma unroll 1
    for (int i = 0; i < r.rank; ++i) {
      float sum[kOwn] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto two = this->residual_pair(r, i, j, true);
#pragma unroll
        for (int n = 0; n < 2 * kOwn; ++n) sum[n / 2] += p[j][n] * two[n % 2];
      }
#pragma unroll
      for (int row = 0; row < kOwn; ++row) {
        sum[row] += ptx::shuffle_xor(sum[row], 1);
        sum[row] += ptx::shuffle_xor(sum[row], 2);
      }
      const int64_t right = r.right + (int64_t(this->head()) * r.rank + i) * kDim * 2;
#pragma unroll
      for (int n = 0; n < 2 * kRecords; ++n) {
        const auto two = ptx::unpack_f16x2(
            ptx::load_global_constant(reinterpret_cast<const uint32_t*>(right + (8 * n + 2 * t) * 2)));
#pragma unroll
        for (int row = 0; row < kOwn; ++row) {
          out[n][2 * row] += sum[row] * two[0];
          out[n][2 * row + 1] += sum[row] * two[1];
        }
      }
    }
  }

  // Adds p v of a page, whose keys have been used up.
  TERSOR_DEVICE void add_page(const float (&p)[8][2 * kOwn], uint32_t valid, const KvPage& page) {
    const KvFormat& f = this->format(page);
    if constexpr (kFormats) {
      if (kv_adds_residuals(kDim) && a.residuals != nullptr && page.value_bits < 16) add_residual(p, page);
    }
    if (kFormats && f.value_outliers > 0) add_outliers(p, this->next_unit());
    const int coding = kFormats && page.value_bits < 16 ? f.value_coding : int(kKvUniform);
    if (kFormats && coding == kKvLevels) {
      add_values<kFormats ? kKvBytes : 16>(p, valid, page);
    } else if (kFormats && coding == kKvE4M3) {
      add_values<kFormats ? kKvFloats : 16>(p, valid, page);
    } else {
      switch (page.value_bits) {
        case 2: add_values<2>(p, valid, page); break;
        case 3: add_values<3>(p, valid, page); break;
        case 4: add_values<4>(p, valid, page); break;
        case 8: add_values<8>(p, valid, page); break;
        default: add_values<16>(p, valid, page);
      }
    }
  }
};

}  // namespace tersor
