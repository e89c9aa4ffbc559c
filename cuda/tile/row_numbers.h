// Rows of numbers, eight at a time as fp32, for kernels that round activations.
#pragma once

#include <cstdint>

#include "ptx/ptx.h"
#include "tile/number.h"

namespace tersor {

constexpr uint32_t kInfinity = 0x7f800000;

struct Float32 {};

template <class Type>
struct RowNumbers {
  static constexpr int kBytes = 2;
  static TERSOR_DEVICE void load_eight(const void* p, float (&out)[8]) {
    const auto pairs = ptx::load_global_constant(static_cast<const ptx::Vec<uint32_t, 4>*>(p));
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = Type::low(pairs[i]);
      out[2 * i + 1] = Type::high(pairs[i]);
    }
  }
  static TERSOR_DEVICE void store_eight(void* p, const float (&x)[8]) {
    ptx::Vec<uint32_t, 4> pairs;
    for (int i = 0; i < 4; ++i) pairs[i] = Type::pack(x[2 * i], x[2 * i + 1]);
    ptx::store_global(static_cast<ptx::Vec<uint32_t, 4>*>(p), pairs);
  }
  static TERSOR_DEVICE void store(void* p, float x) {
    ptx::store_global(static_cast<uint16_t*>(p), static_cast<uint16_t>(Type::pack(x, 0)));
  }
  static TERSOR_DEVICE float load(const void* p) {
    return Type::low(ptx::load_global_constant(static_cast<const uint16_t*>(p)));
  }
};
template <>
struct RowNumbers<Float32> {
  static constexpr int kBytes = 4;
  static TERSOR_DEVICE void load_eight(const void* p, float (&out)[8]) {
    for (int half = 0; half < 2; ++half) {
      const auto four = ptx::load_global_constant(static_cast<const ptx::Vec<float, 4>*>(p) + half);
      for (int i = 0; i < 4; ++i) out[4 * half + i] = four[i];
    }
  }
  static TERSOR_DEVICE void store_eight(void* p, const float (&x)[8]) {
    for (int half = 0; half < 2; ++half) {
      ptx::Vec<float, 4> four;
      for (int i = 0; i < 4; ++i) four[i] = x[4 * half + i];
      ptx::store_global(static_cast<ptx::Vec<float, 4>*>(p) + half, four);
    }
  }
  static TERSOR_DEVICE void store(void* p, float x) { ptx::store_global(static_cast<float*>(p), x); }
  static TERSOR_DEVICE float load(const void* p) { return ptx::load_global_constant(static_cast<const float*>(p)); }
};

// Channels channel .. channel + 7 of a row; zeros behind k.
template <class Type>
TERSOR_DEVICE void load_channels(const char* row, int channel, int k, bool aligned, float (&x)[8]) {
  const char* from = row + int64_t(channel) * RowNumbers<Type>::kBytes;
  if (aligned && channel + 8 <= k) {
    RowNumbers<Type>::load_eight(from, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = channel + i < k ? RowNumbers<Type>::load(from + i * RowNumbers<Type>::kBytes) : 0.0f;
  }
}

// The same to a row of an array whose rows are k numbers long.
template <class Type>
TERSOR_DEVICE void store_channels(char* row, int channel, int k, bool aligned, const float (&x)[8]) {
  char* to = row + int64_t(channel) * RowNumbers<Type>::kBytes;
  if (aligned && channel + 8 <= k) {
    RowNumbers<Type>::store_eight(to, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (channel + i < k) RowNumbers<Type>::store(to + i * RowNumbers<Type>::kBytes, x[i]);
  }
}

// Magnitudes are compared as bits: NaN is above infinity, and infinity above all numbers.
TERSOR_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

TERSOR_DEVICE uint32_t largest_of(const float (&x)[8]) {
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) top = larger(top, ptx::float_to_bits(x[i]) & 0x7fffffff);
  return top;
}

}  // namespace tersor
