// How low-bit activations lie in memory: written by the kernels that round them, read by the integer GEMM.
//
//   codes   m rows of row_bytes, 16-byte aligned. Channels are padded with zero codes to K = 128 ceil(k / 128).
//           width 8: a byte a channel, signed; within each 8 channels the bytes are channels 0 4 1 5 2 6 3 7.
//           width 4: a nibble a channel, two's complement; from bit 0 of each dword channels 0 2 4 6 1 3 5 7.
//           Those are the orders in which a lane finds the codes of integer weights (cpp/cpu/int_layout.h): a dword of
//           4-bit weights masked with 0x0f0f0f0f has channels 0 4 1 5, shifted by 4 channels 2 6 3 7.
//           mixed: blocks of 128 channels one after another, 128 or 64 bytes each.
//   scales  float32 [m, groups], groups = ceil(k / act_group), one for act_group 0. A row that holds NaN or Inf has
//           scales NaN and codes 0; a row of zeros has codes 0.
//   sums    int16 [m, K / 32]: the stored codes of each 32 channels added up.
//   zero points  codes that are not symmetric are stored less their zero point where that fits the byte (4 and 6 bits).
//           Of 8 bits: code - 128 is stored, and int16 [m, groups] holds zero point - 128.
#pragma once

#include <cstdint>

#include "cpu/int_layout.h"

namespace tersor {

constexpr int kActBlockK = 128;  // channels are padded to it; mixed widths change at its multiples
constexpr int kActSumK = 32;     // channels of one sum

constexpr int64_t act_padded(int64_t k) { return div_up(k, kActBlockK) * kActBlockK; }
constexpr int64_t act_row_bytes(int64_t k, int width) { return act_padded(k) * width / 8; }

// Where channel j (0 to 7) of eight lies: the byte of width 8, the nibble of width 4 (from bit 0).
__host__ __device__ constexpr int act_byte_of(int j) { return 2 * (j % 4) + j / 4; }
__host__ __device__ constexpr int act_nibble_of(int j) { return 4 * (j % 2) + j / 2; }
// The channel that byte or nibble i of eight holds.
__host__ __device__ constexpr int act_channel_of_byte(int i) { return i / 2 + 4 * (i % 2); }
__host__ __device__ constexpr int act_channel_of_nibble(int i) { return 2 * (i % 4) + i / 4; }

constexpr bool act_orders_agree_with_weights() {
  for (int j = 0; j < 8; ++j) {
    if (act_channel_of_byte(act_byte_of(j)) != j || act_channel_of_nibble(act_nibble_of(j)) != j) return false;
    if (act_byte_of(j) != 4 * (vector_of(j) % 2) + byte_of(j) || 4 * act_nibble_of(j) != shift_of(j, 4)) return false;
  }
  return true;
}
static_assert(act_orders_agree_with_weights(), "activations lie in the order in which weights are found");

}  // namespace tersor
