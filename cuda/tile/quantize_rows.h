// Rows of activations: loaded, through a norm or a gate, and rounded to integers (tile/act_codes.h has their order).
//
//   A block of threads has a row. A lane has 8 channels ("a chunk"), a warp 256 at a time: 16-byte loads of 16-bit
//   numbers, 8- or 4-byte stores of codes, 32 lanes side by side. 4 lanes share a sum, 4, 8, 16 or 32 a group of 32,
//   64, 128 or 256 channels, found by shuffles: one pass. Other groups, and whole tokens, take two passes over the
//   values: the ranges of each 32 channels go to shared memory, a warp finds each group's; then codes.
//
//   q = round_to_nearest_even(x / scale) in IEEE fp32, limited; bit for bit formats/integer.py:activation_codes. The
//   limits are integers, so limiting comes first, and adding 1.5 * 2^23 rounds and leaves the integer in the low bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/quantize_rows.h"
#include "ptx/math.h"
#include "ptx/ptx.h"
#include "tile/number.h"

namespace tersor {

constexpr uint32_t kRoundingBits = 0x4b400000u;  // 1.5 * 2^23
constexpr int kInfinityBits = 0x7f800000;

TERSOR_DEVICE int most(int a, int b) { return a > b ? a : b; }

// The row of this block in global memory, after the norm or the gate.
class InputRow {
 public:
  TERSOR_DEVICE explicit InputRow(const QuantizeRowsArguments& arguments)
      : a(arguments), bytes_(a.dtype == 0 ? 4 : 2),
        x_(static_cast<const char*>(a.x) + int64_t(blockIdx.x) * a.ldx * bytes_),
        other_(static_cast<const char*>(a.other) + int64_t(blockIdx.x) * a.ldother * bytes_) {}

  // What the norm multiplies by; `reduce`: a float of shared memory for each warp. All threads come.
  TERSOR_DEVICE void find_norm(ptx::shared_t reduce) {
    if (a.norm_weight == nullptr) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float squares = 0;
    for (int chunk = threadIdx.x; 8 * chunk < a.k; chunk += kQuantizeThreads) {
      float v[8];
      load(x_, chunk, a.wide, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) squares += ptx::shuffle_xor(squares, distance);
    if (lane == 0) ptx::store_shared(reduce + 4 * warp, squares);
    ptx::barrier();
    squares = 0;
#pragma unroll
    for (int i = 0; i < kQuantizeThreads / 32; ++i) squares += ptx::load_shared<float>(reduce + 4 * i);
    norm_ = 1.0f / sqrtf(squares / static_cast<float>(a.k) + a.epsilon);
  }

  // Channels 8 chunk to 8 chunk + 7; zeros from k on.
  TERSOR_DEVICE void values(int chunk, float (&v)[8]) const {
    load(x_, chunk, a.wide, v);
    if (a.norm_weight != nullptr) {
      float weight[8];
      load(static_cast<const char*>(a.norm_weight), chunk, true, weight);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i] * norm_ * weight[i];
    }
    if (a.other != nullptr) {
      float up[8];
      load(other_, chunk, a.wide, up);
      // e^-x becomes infinite where the gate is 0; -infinity gives NaN.
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i] / (1.0f + ptx::exp2_approx(v[i] * -1.44269504f)) * up[i];
    }
  }

 private:
  TERSOR_DEVICE void load(const char* row, int chunk, bool wide, float (&v)[8]) const {
    const char* at = row + int64_t(8 * chunk) * bytes_;
    if (wide && 8 * chunk + 8 <= a.k) {
      const auto* piece = reinterpret_cast<const ptx::Vec<uint32_t, 4>*>(at);
      const auto first = ptx::load_global_constant(piece);
      if (a.dtype == 0) {
        const auto second = ptx::load_global_constant(piece + 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = ptx::bits_to_float(first[i]);
          v[4 + i] = ptx::bits_to_float(second[i]);
        }
        return;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto two = a.dtype == 1 ? ptx::unpack_bf16x2(first[i]) : ptx::unpack_f16x2(first[i]);
        v[2 * i] = two[0];
        v[2 * i + 1] = two[1];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 8 * chunk + i < a.k ? element(at + i * bytes_) : 0.0f;
  }
  TERSOR_DEVICE float element(const char* at) const {
    if (a.dtype == 0) return ptx::load_global_constant(reinterpret_cast<const float*>(at));
    const uint32_t bits = ptx::load_global_constant(reinterpret_cast<const uint16_t*>(at));
    return a.dtype == 1 ? BFloat16::low(bits) : Float16::low(bits);
  }

  const QuantizeRowsArguments& a;
  const int bytes_;
  const char *const x_, *const other_;
  float norm_ = 1.0f;
};

// Rounds what values(chunk, float (&)[8]) gives.
class RowRounder {
 public:
  TERSOR_DEVICE RowRounder(const QuantizeRowsArguments& arguments, ptx::shared_t scratch)
      : a(arguments), starts_(scratch + kReduceBytes),
        ranges_(starts_ + (a.width == 0 ? (4 * a.blocks + 15) / 16 * 16 : 0)),
        quanta_(ranges_ + 8 * a.blocks * (kActBlockK / kActSumK)) {}

  // All threads come. `values` is asked for the same chunks by the same thread, twice where groups are in no warp.
  template <class Values>
  TERSOR_DEVICE void run(const Values& values) const {
    if (a.width == 0) {
      find_starts();
      ptx::barrier();
    }
    const int chunks = a.blocks * (kActBlockK / 8), lane = threadIdx.x % 32;
    const bool in_warp = group_in_warp(a.group_sums);
    if (!in_warp) {
      for (int first = threadIdx.x - lane; first < chunks; first += kQuantizeThreads) {
        float v[8];
        const int chunk = first + lane;
        values(chunk, v);
        const Range range = shared_range(range_of(v), 4);
        if (lane % 4 == 0 && chunk < chunks) ptx::store_shared(ranges_ + 2 * chunk, pack(range));
      }
      ptx::barrier();
      find_quanta();
      ptx::barrier();
    }
    for (int first = threadIdx.x - lane; first < chunks; first += kQuantizeThreads) {
      float v[8];
      const int chunk = first + lane;
      values(chunk, v);
      const int group = chunk / 4 / a.group_sums;
      Quantum quantum;
      if (in_warp) {
        const int bits = chunk < chunks ? bits_of(chunk) : 8;
        quantum = quantum_of(shared_range(range_of(v), 4 * a.group_sums), bits, group);
        if (lane % (4 * a.group_sums) == 0 && group < a.groups) store_quantum(group, quantum);
      } else {
        quantum = loaded_quantum(group < a.groups ? group : 0);  // padding: zeros, whatever the scale
      }
      store_codes(chunk, chunk < chunks, v, quantum);
    }
  }

 private:
  struct Range {
    int above, below;  // bits of the largest x and -x, at least 0; of symmetric codes above alone, of |x|
  };
  struct Quantum {
    float scale, low, high;
  };

  TERSOR_DEVICE static ptx::Vec<int, 2> pack(Range range) { return {{range.above, range.below}}; }
  TERSOR_DEVICE Range range_of(const float (&v)[8]) const {
    Range range{0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int bits = static_cast<int>(ptx::float_to_bits(v[i]));
      range.above = most(range.above, a.asymmetric ? bits : bits & 0x7fffffff);
      range.below = most(range.below, a.asymmetric ? bits ^ static_cast<int>(0x80000000u) : 0);
    }
    return range;
  }
  TERSOR_DEVICE Range shared_range(Range range, int lanes) const {
    for (int distance = 1; distance < lanes; distance *= 2) {
      range.above = most(range.above, ptx::shuffle_xor(range.above, distance));
      if (a.asymmetric) range.below = most(range.below, ptx::shuffle_xor(range.below, distance));
    }
    return range;
  }

  TERSOR_DEVICE int bits_of(int chunk) const {
    return a.block_bits == nullptr ? a.bits : ptx::load_global_constant(a.block_bits + chunk / (kActBlockK / 8));
  }
  TERSOR_DEVICE Quantum quantum_of(Range range, int bits, int group) const {
    if (most(range.above, range.below) >= kInfinityBits) return {ptx::bits_to_float(0x7fc00000u), 0, 0};
    const float above = ptx::bits_to_float(range.above) * a.clip, below = ptx::bits_to_float(range.below) * a.clip;
    if (!a.asymmetric) {
      const float top = static_cast<float>((1 << (bits - 1)) - 1);
      if (a.static_scales == nullptr) return {above / top, -top, top};
      return {group < a.groups ? ptx::load_global_constant(a.static_scales + group) : 0.0f, -top, top};
    }
    const float levels = static_cast<float>((1 << bits) - 1);
    const float scale = above / levels + below / levels;
    if (!(scale > 0)) return {0, 0, 0};
    const float zero = fminf(rintf(below / scale), levels);
    return {scale, -zero, levels - zero};
  }
  TERSOR_DEVICE bool has_zero_points() const { return a.asymmetric && a.bits == 8; }
  // What is added to an integer before it is stored: with zero points -128 on top of the integer's own zero point.
  TERSOR_DEVICE int offset_of(const Quantum& quantum) const {
    return has_zero_points() && quantum.scale > 0 ? static_cast<int>(-quantum.low) - 128 : 0;
  }
  TERSOR_DEVICE void store_quantum(int group, const Quantum& quantum) const {
    const int64_t at = int64_t(blockIdx.x) * a.groups + group;
    ptx::store_global(a.scales + at, quantum.scale);
    if (has_zero_points()) ptx::store_global(a.zero_points + at, static_cast<int16_t>(offset_of(quantum)));
  }

  // A warp for each group.
  TERSOR_DEVICE void find_quanta() const {
    const int lane = threadIdx.x % 32, all = a.blocks * (kActBlockK / kActSumK);
    for (int group = threadIdx.x / 32; group < a.groups; group += kQuantizeThreads / 32) {
      const int begin = group * a.group_sums, end = begin + a.group_sums < all ? begin + a.group_sums : all;
      Range range{0, 0};
      for (int i = begin + lane; i < end; i += 32) {
        const auto part = ptx::load_shared<ptx::Vec<int, 2>>(ranges_ + 8 * i);
        range.above = most(range.above, part[0]);
        range.below = most(range.below, part[1]);
      }
      range = shared_range(range, 32);
      const Quantum quantum = quantum_of(range, a.bits, group);
      if (lane == 0) {
        ptx::store_shared(quanta_ + 8 * group, ptx::Vec<float, 2>{{quantum.scale, quantum.low}});
        store_quantum(group, quantum);
      }
    }
  }
  TERSOR_DEVICE Quantum loaded_quantum(int group) const {
    const auto known = ptx::load_shared<ptx::Vec<float, 2>>(quanta_ + 8 * group);
    const float levels = static_cast<float>((1 << a.bits) - 1);
    return {known[0], known[1], a.asymmetric ? levels + known[1] : -known[1]};
  }

  // Where each block's codes begin, in warp 0.
  TERSOR_DEVICE void find_starts() const {
    if (threadIdx.x >= 32) return;
    int before = 0;
    for (int first = 0; first < a.blocks; first += 32) {
      const int block = first + static_cast<int>(threadIdx.x);
      const bool eight = block < a.blocks && ptx::load_global_constant(a.block_bits + block) == 8;
      const uint32_t eights = ptx::ballot(eight);
      const int mine = ptx::count_bits(eights & ((1u << threadIdx.x) - 1));
      if (block < a.blocks) ptx::store_shared(starts_ + 4 * block, kActBlockK / 2 * (block + before + mine));
      before += ptx::count_bits(eights);
    }
  }

  TERSOR_DEVICE void store_codes(int chunk, bool inside, const float (&v)[8], const Quantum& quantum) const {
    const float magic = ptx::bits_to_float(kRoundingBits);
    uint32_t q[8];  // codes in the low byte
    const int offset = offset_of(quantum);
    const bool valid = quantum.scale > 0;
    const float divisor = valid ? quantum.scale : 1.0f;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      q[i] = ptx::float_to_bits(fminf(fmaxf(v[i] / divisor, quantum.low), quantum.high) + magic) + offset;
      if (!valid || (offset != 0 && 8 * chunk + i >= a.k)) q[i] = kRoundingBits;
      sum += static_cast<int>(q[i] - kRoundingBits);
    }
    sum += ptx::shuffle_xor(sum, 1);
    sum += ptx::shuffle_xor(sum, 2);
    if (!inside) return;
    if (a.sums != nullptr && threadIdx.x % 4 == 0) {
      ptx::store_global(a.sums + int64_t(blockIdx.x) * a.blocks * (kActBlockK / kActSumK) + chunk / 4,
                        static_cast<int16_t>(sum));
    }
    uint8_t* to = a.codes + int64_t(blockIdx.x) * a.row_bytes;
    int width = a.width;
    if (width == 0) {
      const int block = chunk / (kActBlockK / 8);
      width = bits_of(chunk);
      to += ptx::load_shared<int>(starts_ + 4 * block);
      chunk %= kActBlockK / 8;
    }
    if (width == 8) {
      ptx::Vec<uint32_t, 2> bytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto of = [&](int j) { return q[act_channel_of_byte(4 * i + j)]; };
        bytes[i] = ptx::prmt(ptx::prmt(of(0), of(1), 0x0040), ptx::prmt(of(2), of(3), 0x0040), 0x5410);
      }
      ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(to) + chunk, bytes);
    } else {
      uint32_t nibbles = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) nibbles |= (q[act_channel_of_nibble(i)] & 15) << (4 * i);
      ptx::store_global(reinterpret_cast<uint32_t*>(to) + chunk, nibbles);
    }
  }

  const QuantizeRowsArguments& a;
  const ptx::shared_t starts_, ranges_, quanta_;
};

}  // namespace tersor
