// Activations as the exact kernels read them, prepared once per call.
//
// Rows are dealt into strips of at most kFused or kPanelRows. A strip of r rows holds, for each step of
// the arithmetic (a k, or a pair of k), r elements side by side, so that a kernel reads one stream and
// broadcasts from it. Beside them the sums of x over each block and each segment, for zero points.
//
// A segment is what a kernel adds up before it applies a scale: a group, or at most 8 blocks of one.
#pragma once

#include "cpu/exact_decode.h"
#include "cpu/isa.h"

namespace tersor::TERSOR_ISA {

constexpr int kSegmentBlocks = 8;

struct Segments {
  int64_t blocks, group_blocks, per_group, count;
  explicit Segments(const IntShape& shape)
      : blocks(shape.blocks),
        group_blocks(shape.group_blocks),
        per_group(div_up(shape.group_blocks, kSegmentBlocks)),
        count(shape.groups * per_group) {}
  int64_t group(int64_t segment) const { return segment / per_group; }
  int64_t begin(int64_t segment) const {
    const int64_t at = group(segment) * group_blocks + segment % per_group * kSegmentBlocks;
    return at < blocks ? at : blocks;
  }
  int64_t end(int64_t segment) const {
    int64_t at = begin(segment) + kSegmentBlocks;
    const int64_t group_end = (group(segment) + 1) * group_blocks;
    if (at > group_end) at = group_end;
    return at < blocks ? at : blocks;
  }
};

template <class A>
struct Activations {
  typename A::Element* elements;  // strips one after another, each [steps][rows]
  float* block_sums;              // each [blocks][rows]
  float* segment_sums;            // each [segments][rows]
  int64_t blocks, segments;

  // The strip that begins at `row`.
  const typename A::Element* strip(int64_t row) const { return elements + row * blocks * A::kSteps; }
  const float* strip_block_sums(int64_t row) const { return block_sums + row * blocks; }
  const float* strip_segment_sums(int64_t row) const { return segment_sums + row * segments; }
};

// One block of one row: 32 values as they multiply, and their sum.
template <int bits>
TERSOR_INLINE float prepare_block(const char* x, int dtype, const float* factors, float* out) {
  const int64_t half = 16 * dtype_size(dtype);
  const f32 low = load_as(x, dtype), high = load_as(x + half, dtype);
  store(out, mul(low, load(factors)));
  store(out + 16, mul(high, load(factors + 16)));
  return reduce_add(add(low, high));
}

// Fills segments [first, last) of the strip of `rows` rows that begins at `row`.
template <class A, int bits>
static void prepare_strip(const Activations<A>& out, const IntLinearArgs& args, const Segments& segments, int64_t row,
                          int rows, int64_t first_row, int64_t first, int64_t last) {
  alignas(64) float factors[kBlockK];
  for (int k = 0; k < kBlockK; ++k) {
    factors[k] = A::kPairs ? 1.0f : 1.0f / static_cast<float>(int64_t(1) << Float::value_shift(bits, k));
  }
  const int size = dtype_size(args.x_dtype);
  auto* elements = const_cast<typename A::Element*>(out.strip(row));
  float* block_sums = const_cast<float*>(out.strip_block_sums(row));
  float* segment_sums = const_cast<float*>(out.strip_segment_sums(row));
  for (int r = 0; r < rows; ++r) {
    if (first_row + row + r >= args.m) {  // a row added to fill the strip
      for (int64_t at = segments.begin(first) * A::kSteps; at < segments.end(last - 1) * A::kSteps; ++at) {
        elements[at * rows + r] = 0;
      }
      for (int64_t at = segments.begin(first); at < segments.end(last - 1); ++at) block_sums[at * rows + r] = 0;
      for (int64_t at = first; at < last; ++at) segment_sums[at * rows + r] = 0;
      continue;
    }
    const char* x = static_cast<const char*>(args.x) + (first_row + row + r) * args.ldx * size;
    for (int64_t segment = first; segment < last; ++segment) {
      float segment_sum = 0;
      for (int64_t block = segments.begin(segment); block < segments.end(segment); ++block) {
        const char* source = x + block * kBlockK * size;
        alignas(64) char padded[kBlockK * 4];
        const int64_t left = args.k - block * kBlockK;
        if (left < kBlockK) {
          std::memset(padded, 0, sizeof padded);
          std::memcpy(padded, source, left * size);
          source = padded;
        }
        alignas(64) float values[kBlockK];
        typename A::Element* to = elements + block * A::kSteps * rows + r;
        const bool direct = rows == 1 && !A::kPairs;
        const float sum = prepare_block<bits>(source, args.x_dtype, factors,
                                              direct ? reinterpret_cast<float*>(to) : values);
        if constexpr (A::kPairs) {
          typename A::Element pairs[A::kSteps];
          std::memcpy(pairs, source, sizeof pairs);
          for (int step = 0; step < A::kSteps; ++step) to[step * rows] = pairs[step];
        } else if (!direct) {
          for (int step = 0; step < A::kSteps; ++step) to[step * rows] = values[step];
        }
        block_sums[block * rows + r] = sum;
        segment_sum += sum;
      }
      segment_sums[segment * rows + r] = segment_sum;
    }
  }
}

}  // namespace tersor::TERSOR_ISA
