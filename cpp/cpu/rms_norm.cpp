// RMSNorm in one pass over a row that stays in L1, where torch's own operations are nine calls and as many passes.
// Rounded where they round: the normalized value to the dtype, then its product with the weight.
#include <cmath>

#include "common/parallel.h"
#include "cpu/isa.h"
#include "cpu/simd.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kValuesPerThread = 1 << 17;

// The 16 values from `at` on; beyond k zeros.
TERSOR_INLINE f32 load_part(const char* row, int dtype, int64_t at, int64_t k) {
  const int size = dtype_size(dtype);
  if (at + 16 <= k) return load_as(row + at * size, dtype);
  alignas(64) char padded[64] = {};
  std::memcpy(padded, row + at * size, (k - at) * size);
  return load_as(padded, dtype);
}

void normalize(const RmsNormArgs& args, int64_t row) {
  const int size = dtype_size(args.dtype);
  const char* x = static_cast<const char*>(args.x) + row * args.ldx * size;
  const char* weight = static_cast<const char*>(args.weight);
  char* y = static_cast<char*>(args.y) + row * args.k * size;
  f32 squares[2] = {zero(), zero()};
  for (int64_t at = 0; at < args.k; at += 32) {
    const f32 a = load_part(x, args.dtype, at, args.k);
    squares[0] = fma(a, a, squares[0]);
    if (at + 16 >= args.k) break;
    const f32 b = load_part(x, args.dtype, at + 16, args.k);
    squares[1] = fma(b, b, squares[1]);
  }
  const float mean = reduce_add(add(squares[0], squares[1])) / static_cast<float>(args.k);
  const f32 inverse = splat(1.0f / std::sqrt(mean + args.epsilon));
  for (int64_t at = 0; at < args.k; at += 16) {
    const int count = args.k - at < 16 ? static_cast<int>(args.k - at) : 16;
    alignas(64) char rounded[64];
    store_as(rounded, args.dtype, mul(load_part(x, args.dtype, at, args.k), inverse), 16);
    const f32 value = mul(load_as(rounded, args.dtype), load_part(weight, args.dtype, at, args.k));
    store_as(y + at * size, args.dtype, value, count);
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args) {
  const int64_t useful = 1 + args.rows * args.k / kValuesPerThread;
  const int threads = useful < args.threads ? static_cast<int>(useful) : args.threads;
  parallel_for(threads, [&](int index) {
    const Range mine = split(args.rows, threads, index);
    for (int64_t row = mine.begin; row < mine.end; ++row) normalize(args, row);
  });
}

}  // namespace tersor::TERSOR_ISA
