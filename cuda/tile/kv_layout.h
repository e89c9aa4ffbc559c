// How a page of the cache lies in a GPU's memory: 64 tokens of one sequence, its heads one after another, each head's
// keys and then its values. The order is that of the fragments of mma.m16n8k16: what a lane unpacks is its operand B.
// python/tersor/kv/cuda_layout.py is the same for tests.
//
//   part     is                                                          bytes of one, b bits a number
//   keys     a record for each 16 channels: parameters, codes            (b < 16: 64) + 128 b
//   values   a group for each 64 channels (one of 80, 96): parameters,   (b < 16: 256) + 128 b a record
//            then a record of codes for each 16 channels
//
//   RECORD. 64 tokens x 16 channels; a lane (g, t) = (lane / 4, lane % 4) has 16 pairs of codes, in b words:
//     keys    pair 2j + h:        token 8j + g,                    channels 4t + 2h, + 1          j < 8, h < 2
//     values  pair 4i + 2a + h:   tokens 16i + 8h + 2t, + 1,       channel 8a + g                 i < 4, a < 2, h < 2
//
//     Keys are B of q k^T: column g of product j is a token, and channels 4t .. 4t + 3 take the place of the fragment's
//     k = 2t, 2t+1, 2t+8, 2t+9, for queries alike. Values are B of p v: column g is a channel, k is the token of a step
//     i as it falls from the products before: two products of scores, D, are one fragment A.
//
//     The two numbers of a pair stand 16 bits apart. 16 bits: word p is pair p. 8: word p / 2, byte p % 2 of each
//     half, with the top bit exchanged (a signed byte, code - 128). 4: word p / 4, bit 4 (p % 4). 2: word p / 8, bit
//     2 (p % 8). 3: two bits as for 2, then a word with the third of pair p at bit p. Words of a lane are in chunks of
//     up to four (3 bits: two and one), chunks outermost, lanes within: a warp reads 128 to 512 bytes at a time.
//
//   PARAMETERS, float16. x = minimum + scale * code. Keys: of a channel over the page's tokens; for t: four scales and
//     four minima of channels 4t ... Values: of a token over the group's channels; for t: 16 scales, then (all scales
//     before) 16 minima, of tokens 8j + 2t, + 1 in the order of j.
//
// A raw page is one of 16 bits. Tokens past a page's count are never read as numbers, whatever they hold.
//
// FORMATS. Pages whose entry names a format above 0 (KvFormat) differ from this as it says:
//
//   key_token     scales of keys belong to tokens, over all channels: parameters of 256 bytes, as those of values, lie
//                 before the records, which have none
//   key_halves    keys by channel have scales for tokens 0 to 31, and after them others for tokens 32 to 63: 128 bytes
//   value_records  so many records of values are a group, whose scales are a token's (all: one for all channels)
//   separable     a value is times a factor of its channel: a record of values begins with 16 of them, float16
//   coding        levels: code c of b bits is minimum + scale (2^b - 1) (level[c] + 127) / 254; E4M3: a byte as it is
//   outliers      entries (uint16 token * dim + channel, float16 what to add to that number), after the keys: those of
//                 keys in order of tokens, then those of values in order of channels. Before each list, 16 bits each:
//                 where the entries of every second token (channel) begin, and where the last ends.
//
// Where the cache is biased, float32 of each token lie after the keys, or their outliers, of every page.
#pragma once

#include <cstdint>

#include "ptx/ptx.h"

namespace tersor {

constexpr int kKvTokens = 64;          // of a page
constexpr int kKvRecordChannels = 16;  // of a record
constexpr int kKvKeyParameters = 64, kKvValueParameters = 256;  // bytes: of a record, of a group

// An entry of the page table.
struct alignas(16) KvPage {
  int64_t address;  // of the sequence's first head; the others follow
  int32_t position;  // of the first token; they ascend from page to page
  uint8_t tokens, format;  // format 0: integers, keys by channel, values by token and group
  uint8_t key_bits, value_bits;
};
static_assert(sizeof(KvPage) == 16, "an entry is one 16-byte load");

// How the numbers of a packed page are stored; nothing of it holds for what has 16 bits. Enum tersor_kv_coding.
enum KvCoding : uint8_t { kKvUniform = 0, kKvLevels = 1, kKvE4M3 = 2 };
struct KvFormat {
  uint8_t key_coding, value_coding, key_token, key_halves, separable;
  uint8_t value_records;  // 0: as plain pages have it
  uint16_t value_begins;  // bit r: record r is the first of a group
  uint16_t key_outliers, value_outliers;  // of a page and head
  uint32_t key_levels[4], value_levels[4];  // int8 [16]
};
constexpr int kKvFormats = 8;  // with the plain one, 0

// A page's part of a low-rank residual: keys are left[0]^T times a right factor that queries have been multiplied by,
// values left[1]^T right. float16 of each head: left [2][rank][64], right [rank][dim].
struct alignas(16) KvResidual {
  int64_t left, right;   // addresses of the first head's
  int64_t column, rank;  // the first of the products of queries; 0: no residual
};

// Keys that are stored as before their rotary embedding, but for their page's first slot. A pair of channels is one of
// stored channels 2i and 2i + 1: channels i and i + pairs, where halves are paired (in raw pages too).
struct KvRotary {
  const float* table;  // cosines and sines [slots][pairs][2]
  int pairs;           // 0: keys are as they come
  int halves;
};
// With 256 channels there are not enough registers.
__host__ __device__ constexpr bool kv_turns_keys(int dim) { return dim < 256; }
__host__ __device__ constexpr bool kv_adds_residuals(int dim) { return dim < 256; }
__host__ __device__ constexpr bool kv_halves_keys(int dim) { return dim < 256; }

constexpr bool kv_bits_exist(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16; }
constexpr bool kv_dim_exists(int dim) { return dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 256; }

// Records whose values share parameters, but for formats with value_records; and the fewest that may.
__host__ __device__ constexpr int kv_group_records(int dim) { return dim % 64 == 0 ? 4 : dim / kKvRecordChannels; }
__host__ __device__ constexpr int kv_least_group_records(int dim) {
  return dim == 256 ? 4 : dim % 64 == 0 ? 2 : dim == 96 ? 3 : 1;
}
__host__ __device__ constexpr int kv_value_begins(int dim, int records) {
  int begins = 0;
  for (int r = 0; r < dim / kKvRecordChannels; r += records > 0 ? records : kv_group_records(dim)) begins |= 1 << r;
  return begins;
}
__host__ __device__ constexpr int kv_code_bytes(int bits) { return 128 * bits; }
__host__ __device__ constexpr int kv_key_record_bytes(int bits, bool token = false, bool halves = false) {
  return kv_code_bytes(bits) + (bits < 16 && !token ? (halves ? 2 : 1) * kKvKeyParameters : 0);
}
__host__ __device__ constexpr int kv_key_bytes(int dim, int bits, bool token = false, bool halves = false) {
  return dim / kKvRecordChannels * kv_key_record_bytes(bits, token, halves) +
         (bits < 16 && token ? kKvValueParameters : 0);
}
__host__ __device__ constexpr int kv_value_record_bytes(int bits, bool separable = false) {
  return kv_code_bytes(bits) + (bits < 16 && separable ? kKvRecordChannels * 2 : 0);
}
__host__ __device__ constexpr int kv_value_groups(int dim, int records = 0) {
  return dim / kKvRecordChannels / (records > 0 ? records : kv_group_records(dim));
}
__host__ __device__ constexpr int kv_value_group_bytes(int dim, int bits, int records = 0, bool separable = false) {
  return dim / kKvRecordChannels / kv_value_groups(dim, records) * kv_value_record_bytes(bits, separable) +
         (bits < 16 ? kKvValueParameters : 0);
}
__host__ __device__ constexpr int kv_value_bytes(int dim, int bits, int records = 0, bool separable = false) {
  return kv_value_groups(dim, records) * kv_value_group_bytes(dim, bits, records, separable);
}
// Of a list of outliers: where the entries of each pair of tokens (or channels) begin, then the entries.
__host__ __device__ constexpr int kv_outlier_starts_bytes(int pairs) { return (2 * (pairs + 1) + 15) / 16 * 16; }
__host__ __device__ constexpr int kv_outlier_bytes(int pairs, int count) {
  return count > 0 ? kv_outlier_starts_bytes(pairs) + (4 * count + 15) / 16 * 16 : 0;
}
__host__ __device__ constexpr int kv_key_tail_bytes(int outliers, bool biased) {
  return kv_outlier_bytes(kKvTokens / 2, outliers) + (biased ? 4 * kKvTokens : 0);
}
__host__ __device__ constexpr int kv_value_tail_bytes(int dim, int outliers) {
  return kv_outlier_bytes(dim / 2, outliers);
}

// Of one head, of a plain page.
__host__ __device__ constexpr int kv_page_bytes(int dim, int key_bits, int value_bits) {
  return kv_key_bytes(dim, key_bits) + kv_value_bytes(dim, value_bits);
}
// Where the values begin, and the end, of one of any format.
__host__ __device__ constexpr int kv_values_at(int dim, int key_bits, const KvFormat& f, bool biased) {
  return kv_key_bytes(dim, key_bits, f.key_token, f.key_halves) + kv_key_tail_bytes(f.key_outliers, biased) +
         kv_value_tail_bytes(dim, f.value_outliers);
}
__host__ __device__ constexpr int kv_page_bytes(int dim, int key_bits, int value_bits, const KvFormat& f, bool biased) {
  return kv_values_at(dim, key_bits, f, biased) + kv_value_bytes(dim, value_bits, f.value_records, f.separable);
}

// Byte of a lane's word in a record's codes.
__host__ __device__ constexpr int kv_word_offset(int bits, int lane, int word) {
  return bits == 3 ? (word < 2 ? 8 * lane + 4 * word : 256 + 4 * lane)
                   : bits == 2 ? 8 * lane + 4 * word : word / 4 * 512 + 16 * lane + word % 4 * 4;
}
// Where pair `pair` of a plane of `width` bits begins (3 bits: planes of 2 and of 1).
__host__ __device__ constexpr int kv_pair_word(int width, int pair) { return pair * width / 16; }
__host__ __device__ constexpr int kv_pair_shift(int width, int pair) { return pair * width % 16; }

// Byte of the raw number (16 bits) of a token and a channel, from the start of the keys, or of the values.
__host__ __device__ constexpr int kv_raw_key_offset(int token, int channel) {
  const int t = channel % 16 / 4, pair = token / 8 * 2 + channel % 4 / 2;
  return channel / 16 * kv_code_bytes(16) + kv_word_offset(16, token % 8 * 4 + t, pair) + channel % 2 * 2;
}
__host__ __device__ constexpr int kv_raw_value_offset(int token, int channel) {
  const int t = token % 8 / 2, pair = token / 16 * 4 + channel % 16 / 8 * 2 + token % 16 / 8;
  return channel / 16 * kv_code_bytes(16) + kv_word_offset(16, channel % 8 * 4 + t, pair) + token % 2 * 2;
}

constexpr bool kv_raw_places_are_distinct(bool values) {
  bool taken[kKvTokens * kKvRecordChannels] = {};
  for (int token = 0; token < kKvTokens; ++token)
    for (int channel = 0; channel < kKvRecordChannels; ++channel) {
      const int at = (values ? kv_raw_value_offset(token, channel) : kv_raw_key_offset(token, channel)) / 2;
      if (at < 0 || at >= kKvTokens * kKvRecordChannels || taken[at]) return false;
      taken[at] = true;
    }
  return true;
}
static_assert(kv_raw_places_are_distinct(false) && kv_raw_places_are_distinct(true),
              "every token and channel of a record has a place of its own");
static_assert(kv_raw_key_offset(9, 2) - kv_raw_key_offset(9, 0) == 4 && kv_raw_key_offset(9, 0) % 8 == 0,
              "four channels of a raw key are one 8-byte piece");

}  // namespace tersor
