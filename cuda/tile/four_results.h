// Four consecutive features of one token, in fp32, to and from memory in fp32, bf16 or fp16 (enum tersor_dtype).
#pragma once

#include "tile/number.h"

namespace tersor {

template <class Type>
TERSOR_DEVICE void add_four_16(float (&values)[4], const uint16_t* source, int count) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) values[i] += Type::low(ptx::load_global_constant(source + i));
  }
}

// values += the first `count` of four elements from `index` on.
TERSOR_DEVICE void add_four(float (&values)[4], int dtype, const void* from, int64_t index, int count) {
  if (dtype == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) values[i] += ptx::load_global_constant(static_cast<const float*>(from) + index + i);
    }
  } else if (dtype == 1) {
    add_four_16<BFloat16>(values, static_cast<const uint16_t*>(from) + index, count);
  } else {
    add_four_16<Float16>(values, static_cast<const uint16_t*>(from) + index, count);
  }
}

// The first `count` of four values; wide: their address is a multiple of four elements.
TERSOR_DEVICE void store_four(const float (&values)[4], int dtype, void* to, int64_t index, int count, bool wide) {
  const bool whole = count >= 4 && wide;
  if (dtype == 0) {
    float* y = static_cast<float*>(to) + index;
    if (whole) {
      ptx::store_global(reinterpret_cast<ptx::Vec<float, 4>*>(y),
                        ptx::Vec<float, 4>{{values[0], values[1], values[2], values[3]}});
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < count) ptx::store_global(y + i, values[i]);
      }
    }
    return;
  }
  uint16_t* y = static_cast<uint16_t*>(to) + index;
  ptx::Vec<uint32_t, 2> pairs;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pairs[i] = dtype == 1 ? BFloat16::pack(values[2 * i], values[2 * i + 1])
                          : Float16::pack(values[2 * i], values[2 * i + 1]);
  }
  if (whole) {
    ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(y), pairs);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) ptx::store_global(y + i, static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2))));
    }
  }
}

}  // namespace tersor
