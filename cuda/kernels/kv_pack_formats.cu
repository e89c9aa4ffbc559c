// Full raw pages to pages of a format (KvFormat of tile/kv_layout.h), and biased ones: as kv_pack.cu for plain pages.
//
//   A block takes a page and a head:
//     1  factors of channels (separable values), a warp for each record; biases are copied
//     2  outliers are chosen: those of keys by the first warp, those of values by the second, a number at a time
//        (tile/kv_choose.h), into a bit for each number in shared memory
//     3  scales of what is left, a warp for each vector (what shares one), then codes, a warp for each record
//     4  entries of outliers, whose differences need scales: a lane for two tokens, or two channels
//
//   Simple rather than fast: numbers are read from L1 one at a time, with one piece of code for all codings.
//
//   Numbers are those of python/tersor/kv/formats.py. Where values are divided by factors, or keys turned back, that is
//   done in fp32, and differences are rounded to fp32 before float16: one place in some thousands may differ from
//   float64 there.
//
//   SHARED MEMORY: 16640 bytes. Outliers take some 1500 cycles each, one after another.
//
// gate: registers 128
// gate: wants LDG.E.128.CONSTANT STG.E.128 SHFL
#include "kernels/kv_pack.h"

#include "ptx/math.h"
#include "ptx/ptx.h"
#include "tile/kv_choose.h"
#include "tile/kv_pack.h"

namespace tersor {
namespace {

using Four = ptx::Vec<uint32_t, 4>;
using ptx::shared_t;

constexpr int kTokenWords = 8, kChannelWords = 2;  // bits of a token's channels, and of a channel's tokens

struct KvPackFormats {
  const KvPackArguments& a;
  const KvFormat& f;
  const char *raw_keys, *raw_values;
  char *keys, *key_tail, *value_tail, *values;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const shared_t shared = ptx::dynamic_shared();
  // Bits of what is stored apart: keys [vectors][words] as vectors are, values alike.
  const shared_t key_taken = shared + 2 * kKvChooseBytes, value_taken = key_taken + kKvTakenBytes;

  TERSOR_DEVICE KvPackFormats(const KvPackArguments& arguments, const char* raw, char* packed)
      : a(arguments),
        f(arguments.format),
        raw_keys(raw),
        raw_values(raw + kv_values_at(a.dim, 16, {}, a.biased)),
        keys(packed),
        key_tail(packed + kv_key_bytes(a.dim, a.key_bits, f.key_token, f.key_halves)),
        value_tail(key_tail + kv_key_tail_bytes(f.key_outliers, a.biased)),
        values(value_tail + kv_value_tail_bytes(a.dim, f.value_outliers)) {}

  TERSOR_DEVICE int value_records() const {
    return f.value_records > 0 ? f.value_records : kv_group_records(a.dim);
  }
  TERSOR_DEVICE int value_channels() const { return value_records() * kKvRecordChannels; }
  TERSOR_DEVICE KvCoder key_coder() const { return {a.key_bits, f.key_coding, value_taken + kKvTakenBytes}; }
  TERSOR_DEVICE KvCoder value_coder() const {
    return {a.value_bits, f.value_coding, value_taken + kKvTakenBytes + 128};
  }
  TERSOR_DEVICE char* value_record(int record) const {
    const int records = value_records();
    return values + record / records * kv_value_group_bytes(a.dim, a.value_bits, f.value_records, f.separable) +
           kKvValueParameters + record % records * kv_value_record_bytes(a.value_bits, f.separable);
  }

  // ---- numbers -------------------------------------------------------------------------------------------------

  TERSOR_DEVICE float number_at(const char* at) const {
    const uint16_t bits = ptx::load_global_constant(reinterpret_cast<const uint16_t*>(at));
    return a.is_bfloat16 ? BFloat16::low(bits) : Float16::low(bits);
  }
  // Turned back to the first slot, where keys are.
  TERSOR_DEVICE float key_at(int token, int channel) const {
    const float x = number_at(raw_keys + kv_raw_key_offset(token, channel));
    if (channel >= 2 * a.rotary.pairs) return x;
    const float y = number_at(raw_keys + kv_raw_key_offset(token, channel ^ 1));
    const auto turn = ptx::load_global_constant(
        reinterpret_cast<const ptx::Vec<float, 2>*>(a.rotary.table + 2 * (token * a.rotary.pairs + channel / 2)));
    return x * turn[0] + (channel % 2 == 0 ? y : -y) * turn[1];
  }
  TERSOR_DEVICE float raw_value_at(int token, int channel) const {
    return number_at(raw_values + kv_raw_value_offset(token, channel));
  }
  // Of a channel, stored before a barrier.
  TERSOR_DEVICE float factor_of(int channel) const {
    if (!f.separable) return 1;
    const char* at = value_record(channel / kKvRecordChannels) + channel % kKvRecordChannels * 2;
    return f16(ptx::load_global(reinterpret_cast<const uint16_t*>(at)));
  }
  TERSOR_DEVICE static float divided(float x, float factor) {
    const bool finite = (ptx::float_to_bits(x) & 0x7f800000) != 0x7f800000;
    return factor == 0 && finite ? 0.0f : x / factor;
  }
  TERSOR_DEVICE float value_at(int token, int channel) const {
    const float x = raw_value_at(token, channel);
    return f.separable ? divided(x, factor_of(channel)) : x;
  }

  // Keys' vectors are channels of 64 tokens, or of each half, or tokens of all channels; values' are tokens of a group's
  // channels. A channel's halves have a word each, one after another.
  TERSOR_DEVICE bool key_is_taken(int token, int channel) const {
    if (f.key_outliers == 0) return false;
    const int v = f.key_token ? token : channel, i = f.key_token ? channel : token;
    return is_taken(key_taken, v * (f.key_token ? kTokenWords : kChannelWords) + i / 32, i);
  }
  TERSOR_DEVICE int halves() const { return f.key_halves ? 2 : 1; }
  TERSOR_DEVICE bool value_is_taken(int token, int channel) const {
    if (f.value_outliers == 0) return false;
    const int groups = a.dim / value_channels(), i = channel % value_channels();
    return is_taken(value_taken, (token * groups + channel / value_channels()) * value_words() + i / 32, i);
  }
  TERSOR_DEVICE int value_words() const { return (value_channels() + 31) / 32; }
  TERSOR_DEVICE static bool is_taken(shared_t bits, int word, int i) {
    return ptx::load_shared<uint32_t>(bits + 4 * word) >> (i % 32) & 1;
  }

  // ---- 1: factors ------------------------------------------------------------------------------------------------

  // The root of a channel's largest magnitude.
  TERSOR_DEVICE void store_factor(int channel) const {
    float largest = 0;
    for (int token = lane; token < kKvTokens; token += 32) {
      const float magnitude = fabsf(raw_value_at(token, channel));
      if (magnitude > largest && magnitude < infinite()) largest = magnitude;
    }
    for (int mask = 1; mask <= 16; mask *= 2) {
      const float other = ptx::shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    const float root = sqrtf(largest);
    if (lane == 0) {
      ptx::store_global(reinterpret_cast<uint16_t*>(value_record(channel / kKvRecordChannels)) +
                            channel % kKvRecordChannels,
                        uint16_t(Float16::pack(root > 65504 ? 65504 : root, 0)));
    }
  }
  TERSOR_DEVICE static float infinite() { return ptx::bits_to_float(0x7f800000); }

  // ---- 2: outliers -----------------------------------------------------------------------------------------------

  TERSOR_DEVICE void choose_keys() const {
    const bool token = f.key_token;
    const int each = halves(), length = kKvTokens / each;
    const auto number = [&](int v, int i) { return token ? key_at(v, i) : key_at(v % each * length + i, v / each); };
    const KvChooser<decltype(number)> chooser = {shared, key_taken, token ? kTokenWords : kChannelWords / each,
                                                 token ? kKvTokens : a.dim * each, token ? a.dim : length,
                                                 f.key_coding == kKvE4M3, number};
    chooser.run(f.key_outliers);
  }
  TERSOR_DEVICE void choose_values() const {
    const int length = value_channels(), groups = a.dim / length;
    const auto number = [&](int v, int i) { return value_at(v / groups, v % groups * length + i); };
    const KvChooser<decltype(number)> chooser = {shared + kKvChooseBytes, value_taken, value_words(),
                                                 kKvTokens * groups, length, f.value_coding == kKvE4M3, number};
    chooser.run(f.value_outliers);
  }

  // ---- 3: scales and codes ---------------------------------------------------------------------------------------

  // Where the scale of a number is, with its minimum so much further.
  TERSOR_DEVICE char* key_scale(int token, int channel) const {
    if (f.key_token) return keys + token_parameter(token);
    return keys + channel / kKvRecordChannels * kv_key_record_bytes(a.key_bits, false, f.key_halves) +
           (f.key_halves ? token / 32 * kKvKeyParameters : 0) + channel % kKvRecordChannels / 4 * 16 + channel % 4 * 2;
  }
  TERSOR_DEVICE int key_minimum() const { return f.key_token ? kKvValueParameters / 2 : 8; }
  TERSOR_DEVICE char* value_scale(int token, int channel) const {
    return values + token_parameter(token) +
           channel / value_channels() * kv_value_group_bytes(a.dim, a.value_bits, f.value_records, f.separable);
  }
  static constexpr int kValueMinimum = kKvValueParameters / 2;
  TERSOR_DEVICE static int token_parameter(int token) {
    return 32 * (token % 8 / 2) + 2 * (token / 8 * 2 + token % 2);
  }

  // number(i) and taken(i) of a vector; its parameters go to `scale`.
  template <class Number, class Taken>
  TERSOR_DEVICE void fit_vector(const KvCoder& coder, int length, char* scale, int to_minimum, const Number& number,
                                const Taken& taken) const {
    Range range = empty_range();
    for (int i = lane; i < length; i += 32) {
      Range with = range;
      extend(with, number(i));
      range.finite = with.finite;
      if (!taken(i)) range = with;
    }
    const Parameters p = coder.fit_range(shared_range(range, 1, 16));
    if (lane == 0) {
      ptx::store_global(reinterpret_cast<uint16_t*>(scale), uint16_t(p.scale_bits));
      ptx::store_global(reinterpret_cast<uint16_t*>(scale + to_minimum), uint16_t(p.minimum_bits));
    }
  }
  TERSOR_DEVICE void fit_keys() const {
    const bool token = f.key_token;
    const int each = halves(), length = kKvTokens / each;
    for (int v = warp; v < (token ? kKvTokens : a.dim * each); v += kKvPackWarps) {
      const int channel = v / each, from = v % each * length;
      const auto number = [&](int i) { return token ? key_at(v, i) : key_at(from + i, channel); };
      const auto taken = [&](int i) { return token ? key_is_taken(v, i) : key_is_taken(from + i, channel); };
      fit_vector(key_coder(), token ? a.dim : length, token ? key_scale(v, 0) : key_scale(from, channel),
                 key_minimum(), number, taken);
    }
  }
  TERSOR_DEVICE void fit_values() const {
    const int length = value_channels(), groups = a.dim / length;
    for (int v = warp; v < kKvTokens * groups; v += kKvPackWarps) {
      const int token = v / groups, first = v % groups * length;
      fit_vector(value_coder(), length, value_scale(token, first), kValueMinimum,
                 [&](int i) { return value_at(token, first + i); },
                 [&](int i) { return value_is_taken(token, first + i); });
    }
  }

  TERSOR_DEVICE Parameters parameters_at(const char* scale, int to_minimum) const {
    return stored_parameters(ptx::load_global(reinterpret_cast<const uint16_t*>(scale)),
                             ptx::load_global(reinterpret_cast<const uint16_t*>(scale + to_minimum)));
  }
  TERSOR_DEVICE uint32_t key_code(int token, int channel) const {
    return key_coder().code(key_at(token, channel), parameters_at(key_scale(token, channel), key_minimum()));
  }
  TERSOR_DEVICE uint32_t value_code(int token, int channel) const {
    return value_coder().code(value_at(token, channel), parameters_at(value_scale(token, channel), kValueMinimum));
  }

  // A lane's words of a record: code(pair, which) is one of a pair's two.
  template <class Code>
  TERSOR_DEVICE void store_codes(int bits, char* record, const Code& code) const {
    const int width = bits == 3 ? 2 : bits;
    const uint32_t mask = ((1u << width) - 1) * 0x10001;
    uint32_t word = 0, thirds = 0;
#pragma unroll 1
    for (int pair = 0; pair < 16; ++pair) {
      const uint32_t two = code(pair, 0) | code(pair, 1) << 16;
      word |= (two & mask) << kv_pair_shift(width, pair);
      thirds |= (two >> 2 & 0x00010001) << pair;
      if (kv_pair_shift(width, pair + 1) != 0) continue;
      ptx::store_global(reinterpret_cast<uint32_t*>(record + kv_word_offset(bits, lane, kv_pair_word(width, pair))),
                        word);
      word = 0;
    }
    if (bits == 3) ptx::store_global(reinterpret_cast<uint32_t*>(record + kv_word_offset(3, lane, 2)), thirds);
  }
  // Pair 2j + h: token 8j + g, channels 4t + 2h and + 1.
  TERSOR_DEVICE void store_key_record(int record) const {
    char* to = keys + record * kv_key_record_bytes(a.key_bits, f.key_token, f.key_halves) +
               (f.key_token ? kKvValueParameters : halves() * kKvKeyParameters);
    store_codes(a.key_bits, to, [&](int pair, int which) {
      return key_code(pair / 2 * 8 + g, record * kKvRecordChannels + 4 * t + pair % 2 * 2 + which);
    });
  }
  // Pair 4i + 2a + h: tokens 16i + 8h + 2t and + 1, channel 8a + g.
  TERSOR_DEVICE void store_value_record(int record) const {
    char* to = value_record(record) + (f.separable ? 2 * kKvRecordChannels : 0);
    store_codes(a.value_bits, to, [&](int pair, int which) {
      return value_code(pair / 4 * 16 + pair % 2 * 8 + 2 * t + which,
                        record * kKvRecordChannels + pair / 2 % 2 * 8 + g);
    });
  }

  // ---- 4: entries ------------------------------------------------------------------------------------------------

  TERSOR_DEVICE uint32_t entry(int token, int channel, double difference) const {
    float rounded = static_cast<float>(difference);
    rounded = rounded > 65504 ? 65504 : rounded < -65504 ? -65504 : rounded;
    return uint32_t(token * a.dim + channel) | Float16::pack(rounded, 0) << 16;
  }
  TERSOR_DEVICE uint32_t key_entry(int token, int channel) const {
    const Parameters p = parameters_at(key_scale(token, channel), key_minimum());
    const double stands_for = key_coder().value(key_code(token, channel), p);
    return entry(token, channel, double(key_at(token, channel)) - stands_for);
  }
  TERSOR_DEVICE uint32_t value_entry(int token, int channel) const {
    const Parameters p = parameters_at(value_scale(token, channel), kValueMinimum);
    const double stands_for = value_coder().value(value_code(token, channel), p) * double(factor_of(channel));
    return entry(token, channel, double(raw_value_at(token, channel)) - stands_for);
  }

  // A list: lanes take pairs of lines (tokens, or channels), of `length` numbers each, in order; entries that are left
  // name the last number and add nothing.
  template <class Taken, class Entry>
  TERSOR_DEVICE void store_entries(char* tail, int pairs, int length, int count, const Taken& taken,
                                   const Entry& make) const {
    uint32_t* entries = reinterpret_cast<uint32_t*>(tail + kv_outlier_starts_bytes(pairs));
    uint16_t* starts = reinterpret_cast<uint16_t*>(tail);
    int before = 0;
    for (int first = 0; first < pairs; first += 32) {
      const int pair = first + lane;
      int mine = 0;
      for (int i = 0; pair < pairs && i < 2 * length; ++i) mine += taken(2 * pair + i / length, i % length);
      int sum = mine;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int below = ptx::shuffle(sum, lane - distance);
        if (lane >= distance) sum += below;
      }
      int at = before + sum - mine;
      if (pair < pairs) ptx::store_global(starts + pair, uint16_t(at));
      for (int i = 0; mine > 0 && i < 2 * length; ++i) {
        if (!taken(2 * pair + i / length, i % length)) continue;
        ptx::store_global(entries + at++, make(2 * pair + i / length, i % length));
      }
      before += ptx::shuffle(sum, 31);
    }
    if (lane == 0) ptx::store_global(starts + pairs, uint16_t(before));
    for (int at = before + lane; at < count; at += 32) {
      ptx::store_global(entries + at, uint32_t(kKvTokens * a.dim - 1));
    }
  }

  // ----------------------------------------------------------------------------------------------------------------

  TERSOR_DEVICE void copy(char* to, const char* from, int bytes) const {
    for (int at = 16 * threadIdx.x; at < bytes; at += 16 * 32 * kKvPackWarps) {
      ptx::store_global(reinterpret_cast<Four*>(to + at),
                        ptx::load_global_constant(reinterpret_cast<const Four*>(from + at)));
    }
  }

  TERSOR_DEVICE void run() const {
    const int records = a.dim / kKvRecordChannels;
    if (a.biased) {
      copy(key_tail + kv_outlier_bytes(kKvTokens / 2, f.key_outliers), raw_keys + kv_key_bytes(a.dim, 16),
           4 * kKvTokens);
    }
    if (f.separable) {
      for (int channel = warp; channel < a.dim; channel += kKvPackWarps) store_factor(channel);
    }
    if (f.key_outliers > 0 || f.value_outliers > 0) {
      for (int at = 4 * threadIdx.x; at < 2 * kKvTakenBytes; at += 4 * 32 * kKvPackWarps) {
        ptx::store_shared<uint32_t>(key_taken + at, 0);
      }
    }
    const int which = threadIdx.x / 16;  // levels of keys, of values
    if (which == 0) key_coder().store_positions(f.key_levels, threadIdx.x);
    if (which == 1) value_coder().store_positions(f.value_levels, threadIdx.x % 16);
    ptx::barrier();
    if (warp == 0 && f.key_outliers > 0) choose_keys();
    if (warp == 1 && f.value_outliers > 0) choose_values();
    ptx::barrier();
    if (a.key_bits < 16) fit_keys();
    if (a.value_bits < 16) fit_values();
    ptx::barrier();
    if (a.key_bits == 16) {
      copy(keys, raw_keys, kv_key_bytes(a.dim, 16));
    } else {
      for (int record = warp; record < records; record += kKvPackWarps) store_key_record(record);
    }
    if (a.value_bits == 16) {
      copy(values, raw_values, kv_value_bytes(a.dim, 16));
    } else {
      for (int record = warp; record < records; record += kKvPackWarps) store_value_record(record);
    }
    if (warp == 0 && f.key_outliers > 0) {
      store_entries(key_tail, kKvTokens / 2, a.dim, f.key_outliers,
                    [&](int token, int channel) { return key_is_taken(token, channel); },
                    [&](int token, int channel) { return key_entry(token, channel); });
    }
    if (warp == 1 && f.value_outliers > 0) {
      store_entries(value_tail, a.dim / 2, kKvTokens, f.value_outliers,
                    [&](int channel, int token) { return value_is_taken(token, channel); },
                    [&](int channel, int token) { return value_entry(token, channel); });
    }
  }
};

__global__ void __launch_bounds__(32 * kKvPackWarps, 4) kv_pack_formats(const KvPackArguments a) {
  const int head = blockIdx.y;
  const auto job = ptx::load_global_constant(reinterpret_cast<const ptx::Vec<int64_t, 2>*>(a.jobs) + blockIdx.x);
  if (job[0] == 0 || job[1] == 0) return;
  const char* raw = reinterpret_cast<const char*>(job[0]) + int64_t(head) * kv_page_bytes(a.dim, 16, 16, {}, a.biased);
  char* packed = reinterpret_cast<char*>(job[1]) +
                 int64_t(head) * kv_page_bytes(a.dim, a.key_bits, a.value_bits, a.format, a.biased);
  KvPackFormats(a, raw, packed).run();
}

const bool entered = (kv_pack_formats_kernel = kv_pack_formats, true);

}  // namespace
}  // namespace tersor
