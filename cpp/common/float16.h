// Scalar conversions of bfloat16 and float16, rounding to nearest even. Integers carry the bits, so
// the same code serves every compiler and machine. `static inline`: each translation unit keeps its
// own copy, because units are compiled for different instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#include "tersor.h"

namespace tersor {

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN stays one
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float fp16_to_float(uint16_t h) {
  // Placing the 15 bits at the top of fp32's fields leaves the exponent too small by 112.
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | (magnitude + 0x70000000u));  // Inf, NaN
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);            // * 2^112
  return bits_to_float(sign | float_to_bits(scaled));
}

static inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to Inf
  if (magnitude < 0x38800000u) {                                             // subnormal: count units of 2^-24
    const float units = bits_to_float(magnitude) * 16777216.0f;              // exact, at most 1024
    const float rounded = (units + 8388608.0f) - 8388608.0f;                 // the adder rounds to nearest even
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

static inline int dtype_size(int dtype) { return dtype == TERSOR_FLOAT32 ? 4 : 2; }

static inline float load_as_float(const void* data, int dtype, int64_t index) {
  if (dtype == TERSOR_FLOAT32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == TERSOR_BFLOAT16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

static inline void store_from_float(void* data, int dtype, int64_t index, float value) {
  if (dtype == TERSOR_FLOAT32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] = dtype == TERSOR_BFLOAT16 ? float_to_bf16(value) : float_to_fp16(value);
  }
}

}  // namespace tersor
