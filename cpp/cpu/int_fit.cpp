// Scales and zero points of integer groups: the range of a group, or the best of a grid of clipped ranges.
//
//   For step = 0 .. steps-1 the range [low, high] of a group is multiplied by 1 - step/100, turned into a scale (and
//   a zero point), and the squared error of the group is summed; the first best candidate wins. One group stays in
//   L1 for all candidates: about 9 vector operations per 16 values and candidate.
//
//   A group is copied to a buffer padded with zeros to whole vectors: zero is representable in every range used here,
//   so padding adds no error.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "common/float16.h"
#include "common/parallel.h"
#include "cpu/isa.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(4 * kLanes)));

inline Vector splat(float value) { return value - Vector{}; }
inline Vector load(const float* data) {
  Vector value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

struct Candidate {
  float scale, zero_point;
};

// As formats/integer.py defines them; the scale is what a tensor of `dtype` would hold.
Candidate candidate(float low, float high, float levels, bool symmetric, int dtype) {
  constexpr float smallest = 1.17549435e-38f, smallest_fp16 = 6.103515625e-05f;
  constexpr float largest_bf16 = 3.38953139e38f, largest_fp16 = 65504.0f;
  float scale = symmetric ? std::max(-low, high) * (2 / levels) : (high - low) / levels;
  if (dtype == TERSOR_FLOAT32) {
    scale = std::min(std::max(scale, smallest), std::numeric_limits<float>::max());
  } else if (dtype == TERSOR_BFLOAT16) {
    scale = bf16_to_float(float_to_bf16(std::min(std::max(scale, smallest), largest_bf16)));
  } else {
    scale = fp16_to_float(float_to_fp16(std::min(std::max(scale, smallest_fp16), largest_fp16)));
  }
  if (symmetric) return {scale, (levels + 1) / 2};
  return {scale, std::min(std::max(std::nearbyint(-low / scale), 0.0f), levels)};
}

template <bool weighted>
float group_error(const float* w, const float* importance, int64_t padded, Candidate c, float levels) {
  const Vector scale = splat(c.scale), inverse = splat(1 / c.scale);
  const Vector bottom = splat(-c.zero_point), top = splat(levels - c.zero_point);
  const Vector round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves no fraction bits
  Vector sum{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vector value = load(w + i);
    Vector q = value * inverse;
    q = q < bottom ? bottom : q;
    q = q > top ? top : q;
    q = (q + round) - round;
    const Vector error = q * scale - value;
    if (weighted) {
      sum += error * error * load(importance + i);
    } else {
      sum += error * error;
    }
  }
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

void fit_row(const IntFitArgs& a, int64_t row, int64_t group_size, int64_t groups, float* w, float* importance) {
  const float levels = static_cast<float>((1 << a.bits) - 1);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * group_size, count = std::min(group_size, a.k - first);
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    const float* source = a.w + row * a.ldw + first;
    std::copy(source, source + count, w);
    std::fill(w + count, w + padded, 0.0f);
    float low = *std::min_element(w, w + count), high = *std::max_element(w, w + count);
    if (!a.symmetric) {
      low = std::min(low, 0.0f);
      high = std::max(high, 0.0f);
    }
    if (a.importance) {
      std::copy(a.importance + first, a.importance + first + count, importance);
      std::fill(importance + count, importance + padded, 0.0f);
    }
    const auto error = [&](Candidate c) {
      return a.importance ? group_error<true>(w, importance, padded, c, levels)
                          : group_error<false>(w, importance, padded, c, levels);
    };
    Candidate best = candidate(low, high, levels, a.symmetric, a.scale_dtype);
    float least = a.steps > 1 ? error(best) : 0;
    for (int step = 1; step < a.steps; ++step) {
      const float shrink = 1 - step / 100.0f;
      const Candidate c = candidate(low * shrink, high * shrink, levels, a.symmetric, a.scale_dtype);
      const float e = error(c);
      if (e < least) {
        least = e;
        best = c;
      }
    }
    a.scales[row * groups + g] = best.scale;
    a.zero_points[row * groups + g] = best.zero_point;
  }
}

}  // namespace

int int_fit(const IntFitArgs& a) {
  const int64_t group_size = a.group_size > 0 && a.group_size < a.k ? a.group_size : a.k;
  const int64_t groups = (a.k + group_size - 1) / group_size;
  const int64_t padded = (group_size + kLanes - 1) / kLanes * kLanes;
  const int threads = static_cast<int>(std::min<int64_t>(a.threads, a.n));
  std::vector<float> scratch;
  try {
    scratch.resize(size_t(2) * threads * padded);
  } catch (const std::bad_alloc&) {
    return TERSOR_NO_MEMORY;
  }
  parallel_for(threads, [&](int index) {
    float* buffer = scratch.data() + size_t(2) * index * padded;
    const Range range = split(a.n, threads, index);
    for (int64_t row = range.begin; row < range.end; ++row) {
      fit_row(a, row, group_size, groups, buffer, buffer + padded);
    }
  });
  return TERSOR_OK;
}

}  // namespace tersor::TERSOR_ISA
