// Activations rounded to integers, bit for bit as formats/integer.py:activation_codes: a scale for each group of
// channels of a token, q = round_to_nearest_even(x / scale) in fp32, limited to the range of the bits.
// A group of zeros, or one so small that its scale is 0, gives zeros; a group with NaN or Inf gives NaN.
//
// Rows come in strips of nearly equal height, at most `most_rows`: what a microkernel takes at once. All
// lies in the order in which the kernels read it:
//   records [chunks][strips][blocks of the chunk][rows of the strip][words + parts + 1] dwords:
//           the codes, the corrections (simd_int8.h), the scale
//   sums    [strips][segments][rows of the strip] floats: sum of scale * sum(q) over a segment, what a zero
//           point multiplies; with `integer_sums` sum(q) alone
//
// Zero points of activations: the integer is code - zero point. With 4 and 6 bits it fits a byte, and the products need
// no correction; with 8 bits it has nine, and becomes two rows, of scales 16 and 1.
//
// Limbs. Such rows of one token are its limbs. Activations of 16 bits can also be taken nearly as they are, as a row
// of int8 for each 7 bits (`limbs` > 1):
//   x = sum over l of q_l * unit * 2^(-7 l),   unit = 2^(e - 6) for a block whose largest |x| is below 2^(e + 1)
// Two limbs leave at most 2^-14 of the block's largest |x|, and nothing of bf16 values above 2^-6 of it;
// three leave 2^-21. A token's limbs are rows next to each other.
//
// A segment is the part of a weight group inside one chunk of kChunkBlocks blocks; sums over a segment are
// scaled once. It depends on k and the group size alone: not on the rows, the threads or the kernel, so
// that int8 activations of a row give the same result in every batch. (Limbs serve a row or two, floats more: the same
// row differs then in its last bits.)
#pragma once

#include <cmath>

#include "common/parallel.h"
#include "cpu/int_layout.h"
#include "cpu/isa.h"
#include "cpu/simd_int8.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kChunkBlocks = 16;
constexpr int kMostLimbs = 3;

// The end of the segment that begins at `block`.
inline int64_t segment_end(const IntShape& shape, int64_t block) {
  const int64_t group = (block / shape.group_blocks + 1) * shape.group_blocks;
  const int64_t chunk = (block / kChunkBlocks + 1) * kChunkBlocks;
  const int64_t end = group < chunk ? group : chunk;
  return end < shape.blocks ? end : shape.blocks;
}

// The number of segments before `block`, which begins one.
inline int64_t segments_before(const IntShape& shape, int64_t block) {
  // Every multiple of either length begins a segment; common multiples count once.
  int64_t a = shape.group_blocks, b = kChunkBlocks;
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  const int64_t common = shape.group_blocks / a * kChunkBlocks;
  return div_up(block, shape.group_blocks) + div_up(block, kChunkBlocks) - div_up(block, common);
}

// One block of a row as floats; beyond k zeros.
TERSOR_INLINE void load_block(const char* values, int dtype, int64_t at, int64_t k, f32* low, f32* high) {
  if (at + kBlockK <= k) {
    *low = load_as(values + at * dtype_size(dtype), dtype);
    *high = load_as(values + (at + 16) * dtype_size(dtype), dtype);
    return;
  }
  float padded[kBlockK] = {};
  for (int64_t i = at; i < k; ++i) padded[i - at] = load_as_float(values, dtype, i);
  *low = load(padded);
  *high = load(padded + 16);
}

// What a group of a row is divided by, and the limits of its integers.
struct Quantum {
  float scale, low, high;
};
constexpr uint32_t kInfinity = 0x7f800000u;

TERSOR_INLINE Quantum symmetric_quantum(uint32_t largest, int bits, float clip) {
  const float high = static_cast<float>((1 << (bits - 1)) - 1);
  if (largest >= kInfinity) return {bits_to_float(0x7fc00000u), 0, 0};
  return {bits_to_float(largest) * clip / high, -high, high};
}

// The scales of a row's groups, for inputs whose scale is not that of a single block.
class RowScales {
 public:
  RowScales(const tersor_input& input, int64_t k)
      : input_(input), k_(k), group_(input.group && input.group < k ? input.group : div_up(k, kBlockK) * kBlockK) {}
  // Whether each block has a symmetric scale of its own, which is found when it is rounded.
  bool by_block() const { return group_ == kBlockK && !input_.asymmetric && !input_.scales && !input_.block_bits; }
  int64_t groups() const { return div_up(k_, group_); }
  int64_t group_blocks() const { return group_ / kBlockK; }

  void find(const char* values, int dtype, Quantum* quanta) const {
    for (int64_t group = 0; group < groups(); ++group) {
      const int64_t begin = group * group_, end = begin + group_ < k_ ? begin + group_ : k_;
      quanta[group] = input_.asymmetric ? range(values, dtype, begin, end) : size(values, dtype, begin, end, group);
    }
  }

 private:
  Quantum size(const char* values, int dtype, int64_t begin, int64_t end, int64_t group) const {
    i32 most[2] = {splat_i32(0), splat_i32(0)};
    for (int64_t at = begin; at < end; at += kBlockK) {
      f32 low, high;
      load_block(values, dtype, at, k_, &low, &high);
      most[0] = max_i32(most[0], magnitude(low));
      most[1] = max_i32(most[1], magnitude(high));
    }
    const int bits = input_.block_bits ? input_.block_bits[begin / 128] : static_cast<int>(input_.bits);
    Quantum q = symmetric_quantum(reduce_max(max_i32(most[0], most[1])), bits, input_.clip);
    if (input_.scales && q.high > 0) q.scale = input_.scales[group];
    return q;
  }
  Quantum range(const char* values, int dtype, int64_t begin, int64_t end) const {
    const f32 minus = splat(-1.0f);
    i32 size = splat_i32(0), above = splat_i32(0), below = splat_i32(0);
    for (int64_t at = begin; at < end; at += kBlockK) {
      f32 part[2];
      load_block(values, dtype, at, k_, &part[0], &part[1]);
      for (const f32& x : part) {  // the bits of negative numbers are negative integers
        size = max_i32(size, magnitude(x));
        above = max_i32(above, float_bits(x));
        below = max_i32(below, float_bits(mul(x, minus)));
      }
    }
    if (reduce_max(size) >= kInfinity) return {bits_to_float(0x7fc00000u), 0, 0};
    const float high = bits_to_float(reduce_max(above)) * input_.clip;
    const float low = bits_to_float(reduce_max(below)) * input_.clip;
    const float levels = static_cast<float>((1 << input_.bits) - 1);
    const float scale = high / levels + low / levels;
    if (!(scale > 0)) return {0, 0, 0};
    float zero = std::nearbyint(low / scale);
    if (zero > levels) zero = levels;
    return {scale, -zero, levels - zero};
  }

  const tersor_input& input_;
  int64_t k_, group_;
};

template <class Dot>
struct QuantizedRows {
  static constexpr int record = Dot::words + Dot::parts + 1;

  IntShape shape;  // of the weights; `bits` gives the centre
  tersor_input input;
  int limbs;
  bool integer_sums;
  int64_t tokens, group_blocks;
  int64_t rows, strips, segments;  // rows: limbs of all tokens
  uint32_t* records;
  float* sums;

  QuantizedRows(const IntShape& s, const tersor_input& in, int64_t m, int limbs_, int64_t most_rows, bool integers)
      : shape(s), input(in), limbs(limbs_), integer_sums(integers), tokens(m),
        group_blocks(RowScales(in, s.k).group_blocks()), rows(m * limbs_), strips(div_up(m, most_rows / limbs_)),
        segments(segments_before(s, s.blocks)) {}
  size_t record_count() const { return size_t(rows) * shape.blocks * record; }
  size_t sum_count() const { return size_t(rows) * segments; }

  // Rows of a strip: the limbs of a token stay together.
  Range strip(int64_t index) const {
    const Range range = split(tokens, strips, index);
    return {range.begin * limbs, range.end * limbs};
  }
  // The records of a strip in the chunk that begins at `block`.
  uint32_t* strip_records(Range strip, int64_t block) const {
    const int64_t left = shape.blocks - block, blocks = left < kChunkBlocks ? left : kChunkBlocks;
    return records + (rows * block + strip.begin * blocks) * record;
  }
  const float* strip_sums(Range strip, int64_t segment) const {
    return sums + strip.begin * segments + segment * (strip.end - strip.begin);
  }

  // One chunk of one token, with the scales of its groups or null. Not inlined: two copies could contract their sums
  // differently.
  __attribute__((noinline)) void quantize(const char* values, int dtype, int64_t token, int64_t chunk,
                                          const Quantum* quanta) const {
    const int64_t first = chunk * kChunkBlocks;
    const int64_t last = first + kChunkBlocks < shape.blocks ? first + kChunkBlocks : shape.blocks;
    int64_t segment = segments_before(shape, first);
    for (int64_t block = first; block < last; ++segment) {
      const int64_t end = segment_end(shape, block);
      float total[kMostLimbs] = {};
      for (; block < end; ++block) {
        uint32_t* to[kMostLimbs];
        float part[kMostLimbs];
        for (int l = 0; l < limbs; ++l) {
          const Place at = place(token * limbs + l);
          to[l] = strip_records(at.strip, first) + ((block - first) * at.height() + at.lane) * record;
        }
        quantize_block(values, dtype, block * kBlockK, quanta ? quanta + block / group_blocks : nullptr, to, part);
        for (int l = 0; l < limbs; ++l) total[l] += part[l];
      }
      for (int l = 0; l < limbs; ++l) {
        const Place at = place(token * limbs + l);
        sums[at.strip.begin * segments + segment * at.height() + at.lane] = total[l];
      }
    }
  }

 private:
  struct Place {
    Range strip;
    int64_t lane;
    int64_t height() const { return strip.end - strip.begin; }
  };
  Place place(int64_t row) const {
    int64_t index = row / limbs * strips / tokens;  // at most one too low
    if (strip(index).end <= row) ++index;
    return {strip(index), row - strip(index).begin};
  }

  // Writes a record and what `sums` adds up for each limb.
  void quantize_block(const char* values, int dtype, int64_t k, const Quantum* quantum, uint32_t* const* to,
                      float* sum) const {
    f32 low, high;
    load_block(values, dtype, k, shape.k, &low, &high);
    const int centre = 1 << (shape.bits - 1);
    if (input.bits == 16) return write_limbs(low, high, centre, to, sum);
    const Quantum q = quantum ? *quantum : symmetric_quantum(reduce_max(max_i32(magnitude(low), magnitude(high))),
                                                             static_cast<int>(input.bits), input.clip);
    if (!(q.scale > 0)) {
      for (int l = 0; l < limbs; ++l) sum[l] = write(to[l], splat_i32(0), splat_i32(0), centre, q.scale);
      return;
    }
    const f32 divisor = splat(q.scale);
    const i32 a = round_within(div(low, divisor), q.low, q.high), b = round_within(div(high, divisor), q.low, q.high);
    if (limbs == 1) {
      sum[0] = write(to[0], a, b, centre, q.scale);
      return;
    }
    const f32 sixteenth = splat(1.0f / 16), sixteen = splat(-16.0f);
    const i32 c = round_to_codes(mul(to_f32(a), sixteenth)), d = round_to_codes(mul(to_f32(b), sixteenth));
    sum[0] = write(to[0], c, d, centre, q.scale * 16);
    sum[1] = write(to[1], round_to_codes(fma(to_f32(c), sixteen, to_f32(a))),
                   round_to_codes(fma(to_f32(d), sixteen, to_f32(b))), centre, q.scale);
  }

  void write_limbs(f32 low, f32 high, int centre, uint32_t* const* to, float* sum) const {
    const uint32_t top = reduce_max(max_i32(magnitude(low), magnitude(high)));
    if (top >= kInfinity) {
      for (int l = 0; l < limbs; ++l) sum[l] = write(to[l], splat_i32(0), splat_i32(0), 0, bits_to_float(0x7fc00000u));
      return;
    }
    // Units are powers of two, and normal numbers down to the last limb.
    const uint32_t exponent = top >> 23 > 28 ? top >> 23 : 28;
    float unit = bits_to_float((exponent - 6) << 23);
    const f32 inverse = splat(bits_to_float((260 - exponent) << 23)), radix = splat(128.0f);
    low = mul(low, inverse);
    high = mul(high, inverse);
    for (int l = 0; l < limbs; ++l, unit *= 1.0f / 128) {
      const i32 a = round_to_codes(low), b = round_to_codes(high);
      sum[l] = write(to[l], a, b, centre, unit);
      low = mul(sub(low, to_f32(a)), radix);
      high = mul(sub(high, to_f32(b)), radix);
    }
  }

  float write(uint32_t* to, i32 low, i32 high, int centre, float scale) const {
    const int total = Dot::pack(low, high, centre, to);
    to[record - 1] = float_to_bits(scale);
    return integer_sums ? static_cast<float>(total) : scale * static_cast<float>(total);
  }
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
