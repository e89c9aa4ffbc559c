// A row of activations in the shared memory of its block, on its way through a transform.
//
//   The row is a list of lines (QuantizeRowsArguments). Eight channels of a line ("a chunk") are 32 bytes: 8 fp32 in
//   order, or what tensor cores take, 8 bf16 and 8 bf16 that hold the first's rounding errors: 16 bits of a
//   significand. Either takes the other's place.
//
//     line   | chunk 0: 8 x fp32, or 8 high, 8 low | chunk 1 | ... | 16 bytes unused |
//
//   The unused 16 bytes put 8 rows of an ldmatrix, and the 8 rows of sums, into different banks. Lanes that have chunks
//   side by side move the two halves of theirs in the other order where bit 2 of the lane is set: no conflicts.
//   Lines whose length is no multiple of 8 are moved channel by channel, with conflicts.
//
//   Butterflies of a Hadamard matrix: those across 256 channels in registers (3 stages) and by shuffles (5 stages, 8 a
//   stage and lane), the others in passes of up to 16 numbers over shared memory, lanes side by side.
#pragma once

#include <cstdint>

#include "kernels/quantize_rows.h"
#include "ptx/ptx.h"
#include "tile/number.h"

namespace tersor {

class RowBuffer {
 public:
  TERSOR_DEVICE RowBuffer(const QuantizeRowsArguments& arguments, ptx::shared_t base)
      : a(arguments), base_(base), whole_(a.columns % 8 == 0), swap_(threadIdx.x / 4 % 2) {}

  TERSOR_DEVICE ptx::shared_t line(int index) const { return base_ + index * a.line_bytes; }
  // Of a channel's fp32, or of a chunk when it begins one.
  TERSOR_DEVICE ptx::shared_t address(int channel) const {
    if (a.lines == 1) return base_ + 4 * channel;
    const int row = channel / a.columns, padding = (a.rows + 15) / 16 * 16 - a.rows;
    return line(row + row / a.rows * padding) + 4 * (channel - row * a.columns);
  }

  TERSOR_DEVICE void store_floats(int chunk, const float (&v)[8]) const {
    if (whole_ && 8 * chunk + 8 <= a.k) {
      const ptx::Vec<float, 4> first{{v[0], v[1], v[2], v[3]}}, second{{v[4], v[5], v[6], v[7]}};
      return store_halves(address(8 * chunk), first, second);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (8 * chunk + i < a.k) ptx::store_shared(address(8 * chunk + i), v[i]);
    }
  }
  // Zeros from k on.
  TERSOR_DEVICE void load_floats(int chunk, float (&v)[8]) const {
    if (whole_ && 8 * chunk + 8 <= a.k) {
      ptx::Vec<float, 4> first, second;
      load_halves(address(8 * chunk), first, second);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = first[i];
        v[4 + i] = second[i];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = 8 * chunk + i < a.k ? ptx::load_shared<float>(address(8 * chunk + i)) : 0.0f;
    }
  }

  // As two bf16 for each.
  TERSOR_DEVICE void store_parts(int chunk, const float (&v)[8]) const {
    ptx::Vec<uint32_t, 4> high, low;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(v[2 * i], v[2 * i + 1], high[i], low[i]);
    if (whole_ && 8 * chunk + 8 <= a.k) return store_halves(address(8 * chunk), high, low);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (8 * chunk + i >= a.k) break;
      const ptx::shared_t at = part_address(8 * chunk + i);
      ptx::store_shared(at, static_cast<uint16_t>(high[i / 2] >> (16 * (i % 2))));
      ptx::store_shared(at + 16, static_cast<uint16_t>(low[i / 2] >> (16 * (i % 2))));
    }
  }
  // Of lines of whole chunks; zeros from k on.
  TERSOR_DEVICE void load_parts(int chunk, float (&v)[8]) const {
    ptx::Vec<uint32_t, 4> high{{0, 0, 0, 0}}, low{{0, 0, 0, 0}};
    if (8 * chunk < a.k) load_halves(address(8 * chunk), high, low);
    add_parts(high, low, v);
  }
  static TERSOR_DEVICE void split(float first, float second, uint32_t& high, uint32_t& low) {
    high = BFloat16::pack(first, second);
    low = BFloat16::pack(first - BFloat16::low(high), second - BFloat16::high(high));
  }

  // Lines of less than a chunk, from parts to fp32, through all their stages. All threads come, a line each.
  TERSOR_DEVICE void narrow_butterflies() const {
    using Two = ptx::Vec<uint32_t, 2>;
    for (int index = threadIdx.x; index < a.lines; index += kQuantizeThreads) {
      const ptx::shared_t at = line(index);
      float v[4];
      add_parts(ptx::load_shared<Two>(at), ptx::load_shared<Two>(at + 16), v);
      for (int distance = 1; distance < a.butterflies; distance *= 2) {
        const float x = v[0], y = v[1], z = v[2], w = v[3];
        if (distance == 1) {
          v[0] = x + y;
          v[1] = x - y;
          v[2] = z + w;
          v[3] = z - w;
        } else {
          v[0] = x + z;
          v[1] = y + w;
          v[2] = x - z;
          v[3] = y - w;
        }
      }
      ptx::store_shared(at, ptx::Vec<float, 4>{{v[0], v[1], v[2], v[3]}});
    }
  }

  // The Hadamard matrix's stages of up to 256 channels on what the lanes of a warp hold of 256 channels, from a
  // multiple of them on. All lanes come.
  TERSOR_DEVICE void butterflies_in_warp(float (&v)[8]) const {
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
      if (distance >= a.butterflies) return;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i & distance) continue;
        const float x = v[i], y = v[i + distance];
        v[i] = x + y;
        v[i + distance] = x - y;
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      if (8 * lanes >= a.butterflies) return;
      const bool upper = threadIdx.x & lanes;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float other = ptx::shuffle_xor(v[i], lanes);
        v[i] = upper ? other - v[i] : v[i] + other;
      }
    }
  }
  // Those of 512 channels and more, on fp32 in shared memory. All threads come; barriers before each pass and none
  // after the last.
  TERSOR_DEVICE void butterflies_in_block() const {
    int distance = 256;
    while (distance < a.butterflies) {
      ptx::barrier();
      const int left = a.butterflies / distance;
      if (left >= 16) {
        pass<16>(distance);
      } else if (left == 8) {
        pass<8>(distance);
      } else if (left == 4) {
        pass<4>(distance);
      } else {
        pass<2>(distance);
      }
      distance *= left < 16 ? left : 16;
    }
  }

 private:
  template <class Pairs, int count>
  static TERSOR_DEVICE void add_parts(const Pairs& high, const Pairs& low, float (&v)[count]) {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      v[2 * i] = BFloat16::low(high[i]) + BFloat16::low(low[i]);
      v[2 * i + 1] = BFloat16::high(high[i]) + BFloat16::high(low[i]);
    }
  }
  template <int radix>
  TERSOR_DEVICE void pass(int distance) const {
#pragma unroll 1
    for (int item = threadIdx.x; item < a.k / radix; item += kQuantizeThreads) {
      const int low = item & (distance - 1);
      const ptx::shared_t at = address((item - low) * radix + low);
      float v[radix];
#pragma unroll
      for (int i = 0; i < radix; ++i) v[i] = ptx::load_shared<float>(at + 4 * i * distance);
#pragma unroll
      for (int step = 1; step < radix; step *= 2) {
#pragma unroll
        for (int i = 0; i < radix; ++i) {
          if (i & step) continue;
          const float x = v[i], y = v[i + step];
          v[i] = x + y;
          v[i + step] = x - y;
        }
      }
#pragma unroll
      for (int i = 0; i < radix; ++i) ptx::store_shared(at + 4 * i * distance, v[i]);
    }
  }

  // Of the high part of a channel; the low one is 16 bytes on.
  TERSOR_DEVICE ptx::shared_t part_address(int channel) const {
    const int column = a.lines == 1 ? channel : channel % a.columns;
    return address(channel) - 4 * column + column / 8 * 32 + column % 8 * 2;
  }
  template <class Four>
  TERSOR_DEVICE void store_halves(ptx::shared_t at, const Four& first, const Four& second) const {
    ptx::store_shared(at + 16 * swap_, swap_ ? second : first);
    ptx::store_shared(at + 16 * (1 - swap_), swap_ ? first : second);
  }
  template <class Four>
  TERSOR_DEVICE void load_halves(ptx::shared_t at, Four& first, Four& second) const {
    const Four one = ptx::load_shared<Four>(at + 16 * swap_), two = ptx::load_shared<Four>(at + 16 * (1 - swap_));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      first[i] = swap_ ? two[i] : one[i];
      second[i] = swap_ ? one[i] : two[i];
    }
  }

  const QuantizeRowsArguments& a;
  const ptx::shared_t base_;
  const bool whole_;
  const int swap_;
};

// What a row is multiplied by before a Hadamard transform: signs, and 1 / sqrt(size).
TERSOR_DEVICE void scale_input(const QuantizeRowsArguments& a, int chunk, float (&v)[8]) {
  if (a.signs != nullptr) {
    if (8 * chunk + 8 <= a.k) {
      const auto* signs = reinterpret_cast<const ptx::Vec<float, 4>*>(a.signs) + 2 * chunk;
      const auto first = ptx::load_global_constant(signs), second = ptx::load_global_constant(signs + 1);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] *= first[i];
        v[4 + i] *= second[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (8 * chunk + i < a.k) v[i] *= ptx::load_global_constant(a.signs + 8 * chunk + i);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= a.factor;
}

}  // namespace tersor
