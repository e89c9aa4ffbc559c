// What a lane makes of a record's codes (tile/kv_layout.h): operands of products, in bf16, exactly.
#pragma once

#include <cstdint>

#include "ptx/ptx.h"
#include "tile/kv_layout.h"

namespace tersor {

// How a record's codes are read: by 2, 3, 4, 8 or 16 bits as integers (16: as numbers), or
constexpr int kKvBytes = 9;    // levels, looked up into signed bytes
constexpr int kKvFloats = 10;  // E4M3
__host__ __device__ constexpr int kv_code_words(int code) { return code == kKvBytes || code == kKvFloats ? 8 : code; }

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

// The four stored channels from `channel` on of a row of keys or queries: as they lie, or, below 2 * pairs, those that
// are paired in halves.
TERSOR_DEVICE ptx::Vec<uint32_t, 2> kv_load_four(const uint16_t* row, int channel, int pairs) {
  if (channel >= 2 * pairs) {
    return ptx::load_global_constant(reinterpret_cast<const ptx::Vec<uint32_t, 2>*>(row + channel));
  }
  const uint32_t first = ptx::load_global_constant(reinterpret_cast<const uint32_t*>(row + channel / 2));
  const uint32_t second = ptx::load_global_constant(reinterpret_cast<const uint32_t*>(row + channel / 2 + pairs));
  return {{ptx::prmt(first, second, 0x5410), ptx::prmt(first, second, 0x7632)}};
}

// ---- codings of formats ----------------------------------------------------------------------------------------

// The codes of pairs 2 kWord and 2 kWord + 1 as signed bytes, as 8 bits have them: their levels. A selector of prmt is
// four nibbles; those of codes are brought side by side first.
template <int kBits, int kWord>
TERSOR_DEVICE uint32_t kv_level_word(const KvWords<kBits>& codes, const uint32_t (&levels)[4]) {
  if constexpr (kBits == 4) {
    const uint32_t nibbles = ptx::prmt(codes.words[kWord / 2], 0, kWord % 2 ? 0x4431 : 0x4420);
    const uint32_t lower = nibbles & 0x7777, upper = nibbles >> 1 & 0x4444;
    const uint32_t below = ptx::prmt(levels[0], levels[1], lower), above = ptx::prmt(levels[2], levels[3], lower);
    constexpr uint32_t choose = (0xf0 & 0xaa) | (0xcc & 0x55);  // c ? a : b
    return ptx::lop3<choose>(above, below, ptx::prmt(0, 0xffffffff, upper));
  } else {
    const uint32_t four = codes.words[kWord / 4] >> (4 * (kWord % 4));
    uint32_t spread = (four & 0x00030003) | (four << 2 & 0x00300030);
    if constexpr (kBits == 3) {
      const uint32_t thirds = codes.words[2] >> (2 * kWord);
      spread |= (thirds << 2 & 0x00040004) | (thirds << 5 & 0x00400040);
    }
    return ptx::prmt(levels[0], levels[1], spread | spread >> 8);
  }
}
template <int kBits, int kWord = 0>
TERSOR_DEVICE void kv_level_words(KvWords<8>& bytes, const KvWords<kBits>& codes, const uint32_t (&levels)[4]) {
  bytes.words[kWord] = kv_level_word<kBits, kWord>(codes, levels);
  if constexpr (kWord < 7) kv_level_words<kBits, kWord + 1>(bytes, codes, levels);
}

// Pair kPair of bytes that are E4M3: exponents are 120 too low in place, which one product mends, subnormals too.
template <int kPair>
TERSOR_DEVICE uint32_t kv_float_pair(const KvWords<8>& codes) {
  const uint32_t word = codes.words[kPair / 2];
  const uint32_t magnitude = (kPair % 2 ? word >> 4 : word << 4) & 0x07f007f0;
  const uint32_t sign = (kPair % 2 ? word : word << 8) & 0x80008000;
  return ptx::mul_bf16x2(magnitude | sign, 0x7b807b80);
}

// A code that stands for x in its pair is unit * x + offset times its scale. Uniform codes: for pairs around zero.
struct KvUnits {
  float unit, offset;
};
template <int kCode>
TERSOR_DEVICE KvUnits kv_units(int bits) {
  if constexpr (kCode == kKvBytes) {
    const float top = static_cast<float>((1 << bits) - 1);
    return {top / 254, top / 2};
  }
  return {1, kCode == kKvFloats ? 0.0f : static_cast<float>(1 << (kCode - 1))};
}

// Pairs as kv_pair and kv_centred_pair have them, of any code.
template <int kCode, int kPair>
TERSOR_DEVICE uint32_t kv_key_pair(const KvWords<kv_code_words(kCode)>& codes) {
  if constexpr (kCode == kKvFloats) {
    return kv_float_pair<kPair>(codes);
  } else {
    return kv_pair<kv_code_words(kCode), kPair>(codes);
  }
}
template <int kCode, int kPair>
TERSOR_DEVICE uint32_t kv_value_pair(const KvWords<kv_code_words(kCode)>& codes) {
  if constexpr (kCode == kKvFloats) {
    return kv_float_pair<kPair>(codes);
  } else {
    return kv_centred_pair<kv_code_words(kCode), kPair>(codes);
  }
}

}  // namespace tersor
