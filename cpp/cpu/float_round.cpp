// Activations rounded to e4m3, e2m1 or e2m3 under scales that come from them, and multiplied back: bit for bit what
// ops_round.py computes in some thirty passes. A group with NaN or Inf becomes NaN and does not count elsewhere.
// Steps before that run in the memory of the thread that rounds the row; where a scale is the whole input's they run
// twice, which is nothing beside the product and spares the input in fp32.
#include "cpu/float_round.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/row_transform.h"
#include "cpu/simd.h"
#include "cpu/simd_int8.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kValuesPerThread = 1 << 15;
constexpr uint32_t kInfinityBits = 0x7f800000u, kSign = 0x80000000u;
// Of each dtype the bits from which on a float rounds to Inf, and its largest number.
constexpr uint32_t kTooLarge[] = {kInfinityBits, 0x7f7f8000u, 0x477ff000u};
constexpr float kMost[] = {0x1.fffffep127f, 0x1.fep127f, 65504.0f};

struct Element {
  int mantissa, lowest;  // bits, and the lowest exponent of a normal number
  float top;
};
constexpr Element kElements[] = {{3, -6, 448.0f}, {1, 0, 6.0f}, {3, 0, 7.5f}};

// Nearest value of the element, ties to even, saturating. The sum with 1.5 * 2^23 steps has no bits below a step.
TERSOR_INLINE f32 nearest(f32 v, const Element& e) {
  v = limit(v, -e.top, e.top);
  const i32 power = max_i32(and_(float_bits(v), kInfinityBits), splat_i32(static_cast<uint32_t>(e.lowest + 127) << 23));
  const f32 steps = as_f32(add_i32(power, splat_i32((static_cast<uint32_t>(23 - e.mantissa) << 23) | 0x400000u)));
  const f32 rounded = sub(add(v, steps), steps);
  return as_f32(or_(float_bits(rounded), and_(float_bits(v), kSign)));
}

float nearest_one(float v, const Element& e) {
  float values[16];
  store(values, nearest(splat(v), e));
  return values[0];
}

// Sixteen values from `at` on; beyond k zeros.
TERSOR_INLINE f32 load_part(const char* row, int dtype, int64_t at, int64_t k) {
  if (at + 16 <= k) return load_as(row + at * dtype_size(dtype), dtype);
  float padded[16] = {};
  for (int64_t i = at; i < k; ++i) padded[i - at] = load_as_float(row, dtype, i);
  return load(padded);
}

// The bits of the largest magnitude in [begin, end): at least infinity's where something is not finite.
uint32_t largest(const char* row, int dtype, int64_t begin, int64_t end) {
  i32 most = splat_i32(0);
  for (int64_t at = begin; at < end; at += 16) most = max_i32(most, magnitude(load_part(row, dtype, at, end)));
  return reduce_max(most);
}

// What a group whose largest magnitude is `bits` is divided by; `one`: NVFP4's number for the whole input.
float scale_of(uint32_t bits, const FloatRoundArgs& a, const Element& e, float one) {
  const float top = bits_to_float(bits);
  if (a.scale == kRoundPower) {
    // One higher where the largest would round beyond the element's last binade: from 1.75 on, e2m3 from 1.9375.
    const int up = (bits & 0x7fffff) >= (a.element == kE2m3 ? 0x780000u : 0x600000u);
    const int exponent = static_cast<int>(bits >> 23) - 127 + up - (a.element == kE4m3 ? 8 : 2);
    const int limited = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
    return bits_to_float(static_cast<uint32_t>(limited + 127) << 23);
  }
  if (a.scale == kRoundE4m3) {
    const float scale = nearest_one(top / e.top * one, kElements[kE4m3]);
    return (scale < 0x1p-9f ? 0x1p-9f : scale) / one;
  }
  const float scale = top / e.top;
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

}  // namespace

int float_round(const FloatRoundArgs& a) {
  const tersor_input none{};
  IntLinearArgs given{};
  given.x = a.x;
  given.x_dtype = a.dtype;
  given.m = a.rows;
  given.k = a.k;
  given.ldx = a.ldx;
  given.input = a.steps ? a.steps : &none;
  const RowTransform transform(given);
  const int size = dtype_size(a.dtype);
  const int64_t parts = 1 + a.rows * a.k * (transform.any() ? transform.work() : 1) / kValuesPerThread;
  const int64_t useful = parts < a.rows ? parts : a.rows;
  const int threads = useful < a.threads ? static_cast<int>(useful) : a.threads;
  const Element& element = kElements[a.element];
  const int64_t group = a.group < a.k ? a.group : a.k;
  const uint32_t infinity = kTooLarge[a.dtype];

  const int64_t buffer = transform.floats(), memory = 2 * buffer + transform.left_floats();
  Scratch scratch;
  scratch.reserve<uint32_t>(threads);
  scratch.reserve<float>(threads * memory);
  if (!scratch.allocate()) return fail(TERSOR_NO_MEMORY, "no memory for %d rows of %lld", threads, (long long)a.k);
  uint32_t* const most = scratch.take<uint32_t>(threads);
  float* const buffers = scratch.take<float>(threads * memory);
  // Calls what is given with the number, values and dtype of each row, behind the steps.
  const auto for_rows = [&](int index, const auto& use) {
    float* const mine = buffers + index * memory;
    transform.copy_left(mine + 2 * buffer);
    const Range range = split(a.rows, threads, index);
    for (int64_t row = range.begin; row < range.end; ++row) {
      if (transform.any()) {
        const float* const made = transform.row(row, mine, mine + buffer, mine + 2 * buffer);
        use(row, reinterpret_cast<const char*>(made), static_cast<int>(TERSOR_FLOAT32));
      } else {
        use(row, static_cast<const char*>(a.x) + row * a.ldx * size, a.dtype);
      }
    }
  };

  uint32_t whole = 0;
  if (a.scale == kRoundWhole || a.scale == kRoundE4m3) {
    parallel_for(threads, [&](int index) {
      uint32_t found = 0;
      for_rows(index, [&](int64_t, const char* x, int dtype) {
        for (int64_t at = 0; at < a.k; at += group) {
          const uint32_t bits = largest(x, dtype, at, at + group < a.k ? at + group : a.k);
          if (bits < infinity && bits > found) found = bits;
        }
      });
      most[index] = found;
    });
    for (int i = 0; i < threads; ++i) whole = most[i] > whole ? most[i] : whole;
  }
  float one = 1.0f;
  if (a.scale == kRoundE4m3) {
    const float top = bits_to_float(whole);
    one = 1.0f / (top < 0x1p-126f ? 0x1p-126f : top) * (448.0f * 6.0f);
    if (one > 0x1.fffffep127f) one = 1.0f;
  }

  parallel_for(threads, [&](int index) {
    for_rows(index, [&](int64_t row, const char* x, int dtype) {
      char* const y = static_cast<char*>(a.y) + row * a.k * size;
      for (int64_t begin = 0; begin < a.k; begin += group) {
        const int64_t end = begin + group < a.k ? begin + group : a.k;
        const uint32_t bits = largest(x, dtype, begin, end);
        const bool finite = bits < infinity;
        const f32 scale = splat(scale_of(a.scale == kRoundWhole ? whole : bits, a, element, one));
        for (int64_t at = begin; at < end; at += 16) {
          const int count = end - at < 16 ? static_cast<int>(end - at) : 16;
          const f32 value = mul(nearest(div(load_part(x, dtype, at, end), scale), element), scale);
          store_as(y + at * size, a.dtype,
                   finite ? limit(value, -kMost[a.dtype], kMost[a.dtype]) : splat(bits_to_float(0x7fc00000u)), count);
        }
      }
    });
  });
  return TERSOR_OK;
}

}  // namespace tersor::TERSOR_ISA
