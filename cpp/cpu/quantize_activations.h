// Dynamic int8 activations: per token and per block of 32 channels, scale = max|x| / 127 and
// q = round_to_nearest_even(x / scale) in fp32, which is formats/integer.py:quantize_activations bit for bit.
// A block of zeros, or one so small that its scale is 0, gives zeros; a block with NaN or Inf gives NaN.
//
// Rows come in strips of nearly equal height, at most `most_rows`: what a microkernel takes at once. All
// lies in the order in which the kernels read it:
//   records [chunks][strips][blocks of the chunk][rows of the strip][words + parts + 1] dwords:
//           the codes, the corrections (simd_int8.h), the scale
//   sums    [strips][segments][rows of the strip] floats: sum of scale * sum(q) over a segment, what a zero
//           point multiplies
//
// Limbs. Activations of 16 bits can also be taken nearly as they are, as a row of int8 for each 7 bits (`limbs` > 1):
//   x = sum over l of q_l * unit * 2^(-7 l),   unit = 2^(e - 6) for a block whose largest |x| is below 2^(e + 1)
// Two limbs leave at most 2^-14 of the block's largest |x|, and nothing of bf16 values above 2^-6 of it;
// three leave 2^-21. A token's limbs are rows next to each other.
//
// A segment is the part of a weight group inside one chunk of kChunkBlocks blocks; sums over a segment are
// scaled once. It depends on k and the group size alone: not on the rows, the threads or the kernel, so
// that int8 activations of a row give the same result in every batch. (Limbs serve a row or two, floats more: the same
// row differs then in its last bits.)
#pragma once

#include "common/parallel.h"
#include "cpu/int_layout.h"
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

template <class Dot>
struct QuantizedRows {
  static constexpr int record = Dot::words + Dot::parts + 1;

  IntShape shape;  // of the weights; `bits` gives the centre
  int limbs;
  int64_t rows, strips, segments;  // rows: limbs of all tokens
  uint32_t* records;
  float* sums;

  QuantizedRows(const IntShape& s, int64_t m, int limbs_, int64_t most_rows)
      : shape(s), limbs(limbs_), rows(m * limbs_), strips(div_up(rows, most_rows)),
        segments(segments_before(s, s.blocks)) {}
  size_t record_count() const { return size_t(rows) * shape.blocks * record; }
  size_t sum_count() const { return size_t(rows) * segments; }

  Range strip(int64_t index) const { return split(rows, strips, index); }
  // The records of a strip in the chunk that begins at `block`.
  uint32_t* strip_records(Range strip, int64_t block) const {
    const int64_t left = shape.blocks - block, blocks = left < kChunkBlocks ? left : kChunkBlocks;
    return records + (rows * block + strip.begin * blocks) * record;
  }
  const float* strip_sums(Range strip, int64_t segment) const {
    return sums + strip.begin * segments + segment * (strip.end - strip.begin);
  }

  // One chunk of one token. Not inlined: two copies could contract their sums differently.
  __attribute__((noinline)) void quantize(const void* x, int dtype, int64_t ldx, int64_t token, int64_t chunk) const {
    const char* values = static_cast<const char*>(x) + token * ldx * dtype_size(dtype);
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
        quantize_block(values, dtype, block * kBlockK, to, part);
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
    int64_t index = row * strips / rows;  // at most one too low
    if (strip(index).end <= row) ++index;
    return {strip(index), row - strip(index).begin};
  }

  // Writes a record and scale * sum(q) for each limb.
  void quantize_block(const char* values, int dtype, int64_t k, uint32_t* const* to, float* sum) const {
    f32 low, high;
    if (k + kBlockK <= shape.k) {
      low = load_as(values + k * dtype_size(dtype), dtype);
      high = load_as(values + (k + 16) * dtype_size(dtype), dtype);
    } else {
      float padded[kBlockK] = {};
      for (int64_t i = k; i < shape.k; ++i) padded[i - k] = load_as_float(values, dtype, i);
      low = load(padded);
      high = load(padded + 16);
    }
    const int centre = 1 << (shape.bits - 1);
    const uint32_t top = reduce_max(max_i32(magnitude(low), magnitude(high)));
    if (top >= 0x7f800000u) {
      for (int l = 0; l < limbs; ++l) sum[l] = write(to[l], splat_i32(0), splat_i32(0), 0, bits_to_float(0x7fc00000u));
    } else if (limbs == 1) {
      const float scale = bits_to_float(top) / 127.0f;
      if (scale > 0) {
        const f32 divisor = splat(scale);
        sum[0] = write(to[0], round_to_codes(div(low, divisor)), round_to_codes(div(high, divisor)), centre, scale);
      } else {
        sum[0] = write(to[0], splat_i32(0), splat_i32(0), 0, scale);
      }
    } else {
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
  }

  TERSOR_INLINE float write(uint32_t* to, i32 low, i32 high, int centre, float scale) {
    const int total = Dot::pack(low, high, centre, to);
    to[record - 1] = float_to_bits(scale);
    return scale * static_cast<float>(total);
  }
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
