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
  uint16_t tokens;
  uint8_t key_bits, value_bits;
};
static_assert(sizeof(KvPage) == 16, "an entry is one 16-byte load");

constexpr bool kv_bits_exist(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16; }
constexpr bool kv_dim_exists(int dim) { return dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 256; }

// Records whose values share parameters.
__host__ __device__ constexpr int kv_group_records(int dim) { return dim % 64 == 0 ? 4 : dim / kKvRecordChannels; }
__host__ __device__ constexpr int kv_code_bytes(int bits) { return 128 * bits; }
__host__ __device__ constexpr int kv_key_record_bytes(int bits) {
  return kv_code_bytes(bits) + (bits < 16 ? kKvKeyParameters : 0);
}
__host__ __device__ constexpr int kv_key_bytes(int dim, int bits) {
  return dim / kKvRecordChannels * kv_key_record_bytes(bits);
}
__host__ __device__ constexpr int kv_value_group_bytes(int dim, int bits) {
  return kv_group_records(dim) * kv_code_bytes(bits) + (bits < 16 ? kKvValueParameters : 0);
}
__host__ __device__ constexpr int kv_value_bytes(int dim, int bits) {
  return dim / kKvRecordChannels / kv_group_records(dim) * kv_value_group_bytes(dim, bits);
}
// Of one head.
__host__ __device__ constexpr int kv_page_bytes(int dim, int key_bits, int value_bits) {
  return kv_key_bytes(dim, key_bits) + kv_value_bytes(dim, value_bits);
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

// ---- words to operands -----------------------------------------------------------------------------------------

// The `bits` words of a lane, from anywhere: load_piece(value of the piece's type, byte offset) gives 16, 8 or 4 bytes.
template <int kBits>
struct KvWords {
  static constexpr int kChunks = kBits < 4 ? 1 : kBits / 4;
  uint32_t words[kBits];

  template <class Load>
  TERSOR_DEVICE void load_chunk(int chunk, int lane, const Load& load_piece) {
    if constexpr (kBits >= 4) {
      const auto piece = load_piece(ptx::Vec<uint32_t, 4>(), kv_word_offset(kBits, lane, 4 * chunk));
#pragma unroll
      for (int i = 0; i < 4; ++i) words[4 * chunk + i] = piece[i];
    } else {
      const auto piece = load_piece(ptx::Vec<uint32_t, 2>(), kv_word_offset(kBits, lane, 0));
      words[0] = piece[0];
      words[1] = piece[1];
      if constexpr (kBits == 3) words[2] = load_piece(uint32_t(), kv_word_offset(3, lane, 2));
    }
  }
};

constexpr uint32_t kKvMergeMasked = (0xf0 & 0xcc) | 0xaa;  // lop3: (a & b) | c
constexpr uint32_t kKvMagic = 0x43004300;                  // 128 in bf16: its last place is 1

// Pair kPair as bf16: 128 + code below 8 bits, code - 128 with 8; exact.
template <int kBits, int kPair>
TERSOR_DEVICE uint32_t kv_pair(const KvWords<kBits>& codes) {
  if constexpr (kBits == 16) {
    return codes.words[kPair];
  } else if constexpr (kBits == 8) {
    // A signed byte is its seven lower bits minus 128 times the top one: 128 + lower - (128 or 256).
    const uint32_t word = codes.words[kv_pair_word(8, kPair)] >> kv_pair_shift(8, kPair);
    return ptx::sub_bf16x2(ptx::lop3<kKvMergeMasked>(word, 0x007f007f, kKvMagic),
                           ptx::lop3<kKvMergeMasked>(word, 0x00800080, kKvMagic));
  } else {
    constexpr int width = kBits == 4 ? 4 : 2;
    constexpr uint32_t mask = ((1u << width) - 1) * 0x10001;
    const uint32_t word = codes.words[kv_pair_word(width, kPair)] >> kv_pair_shift(width, kPair);
    const uint32_t low = ptx::lop3<kKvMergeMasked>(word, mask, kKvMagic);
    if constexpr (kBits != 3) return low;
    const uint32_t third = kPair < 2 ? codes.words[2] << (kPair < 2 ? 2 - kPair : 0)
                                     : codes.words[2] >> (kPair < 2 ? 0 : kPair - 2);
    return ptx::lop3<kKvMergeMasked>(third, 0x00040004, low);
  }
}

// What to subtract from kv_pair for codes around zero: 128 + 2^(bits - 1); nothing with 8 and 16 bits.
template <int kBits>
constexpr uint32_t kKvMiddle = kBits < 8 ? (0x4300u | 1u << (kBits - 1)) * 0x10001u : 0;

template <int kBits, int kPair>
TERSOR_DEVICE uint32_t kv_centred_pair(const KvWords<kBits>& codes) {
  const uint32_t pair = kv_pair<kBits, kPair>(codes);
  return kBits < 8 ? ptx::sub_bf16x2(pair, kKvMiddle<kBits>) : pair;
}

}  // namespace tersor
