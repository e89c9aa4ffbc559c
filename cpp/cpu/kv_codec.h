// The bitstream of one head's keys or values over a chunk of tokens (after CacheGen, arXiv 2310.07240).
//
// A value is (8 q + m + a A) * step / 8: m is its channel's mean in eighths of a step, A the anchor of its group of
// 10 tokens. An anchor, the first token of its group, is coded twice as fine as other tokens, (4 A + m) * step / 8. A
// channel whose tokens resemble their anchors has a in {2, 3, 4}, half to all of the anchor; elsewhere a = 0, and
// anchors are tokens like others. The integers q and A are range coded (rANS) without loss.
//
//   part         bytes               holds
//   step         2                   float16
//   flags        1, then one 0       bit 0: means are int16 (else int8), bit 1: 32 lanes (else 8)
//   escapes      4                   bytes of the last part
//   means        dim * 1 or 2        m
//   modes        dim                 table of q, and in the upper two bits 0, 1, 2, 3 for a = 0, 2, 3, 4
//   anchors      1 per a > 0         table of A
//   states       lanes * 4           of the decoder, one for each lane
//   words        2 each              16 bits for whichever lane asks next
//   escapes      as said             what a table does not hold, as signed LEB128
//
// Symbols are coded in rows, one per channel, or anchors and the rest apart where a > 0; rows that share a table follow
// one another, by channel, anchors first. The i-th symbol of a row belongs to lane i mod lanes. A lane is a number x of
// [2^16, 2^32): its symbol is what the table has at slot x mod 4096, then x becomes frequency * (x >> 12) + slot -
// start, and takes in a word when it falls under 2^16. Lanes end at 2^16 and no word is left over.
//
// Tables are not stored: the format has 64 of them, 40 of a normal distribution and 24 of a Laplace distribution, made
// with integers alone, so that each machine has the same.
#pragma once

#include <cstdint>

#include "tersor.h"

namespace tersor {

constexpr int kCodecTables = 64, kCodecGroup = 10, kCodecBits = 12, kCodecSlots = 1 << kCodecBits;
constexpr int kCodecEscape = -128;           // the symbol that stands for another
constexpr int kCodecCostUnit = 256;          // costs are in parts of a bit
constexpr int64_t kCodecLimit = 1 << 21;     // integers are smaller than this
constexpr int kCodecHeader = 8;
constexpr int kCodecPredictor[4] = {0, 2, 3, 4};

struct CodecTable {
  uint16_t frequency[256], start[256];  // by the low byte of a symbol
  uint16_t cost[256];                   // of a symbol, or of escaping it
  uint32_t slots[kCodecSlots];          // symbol << 24 | frequency << 12 | slot - start
};
const CodecTable* codec_tables();

// What is wrong with a stream.
enum CodecFault { kCodecFine, kCodecHeaderBad, kCodecWordsEnd, kCodecEscapesBad, kCodecNotAtEnd, kCodecRoom,
                  kCodecNotFinite, kCodecNoMemory };

}  // namespace tersor
