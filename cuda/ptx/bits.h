// Bit operations, conversions and packed arithmetic on pairs of 16-bit floats in one 32-bit register
// (element 0 in the low half). Rounding is to nearest even, subnormals are kept, NaN becomes 0x7fff.
#pragma once

#include "ptx/config.h"

namespace tersor {
namespace ptx {

TERSOR_PTX uint32_t float_to_bits(float value) {
#if defined(TERSOR_EMULATION)
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#else
  return __float_as_uint(value);
#endif
}

TERSOR_PTX float bits_to_float(uint32_t bits) {
#if defined(TERSOR_EMULATION)
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#else
  return __uint_as_float(bits);
#endif
}

// Any function of three bits, bitwise: `lut` is that function applied to 0xf0, 0xcc, 0xaa.
template <uint32_t lut>
TERSOR_PTX uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(lut < 256, "a truth table of three inputs has 8 bits");
#if defined(TERSOR_EMULATION)
  uint32_t result = 0;
  for (uint32_t i = 0; i < 8; ++i)
    if (lut >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(lut));
  return result;
#endif
}

// Byte i of the result is byte (selector >> 4i & 7) of {a: 0 to 3, b: 4 to 7}, or, where bit 3 of that
// nibble is set, that byte's sign bit in every bit.
TERSOR_PTX uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(TERSOR_EMULATION)
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(both >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
#else
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#endif
}

// The 32 bits of {high, low} that start `shift` (modulo 32) bits up.
TERSOR_PTX uint32_t funnel_shift_right(uint32_t low, uint32_t high, uint32_t shift) {
#if defined(TERSOR_EMULATION)
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
#else
  return __funnelshift_r(low, high, shift);
#endif
}

// ---- float32 to pairs and back ---------------------------------------------------------------------------
TERSOR_PTX uint32_t pack_f16x2(float low, float high) {
#if defined(TERSOR_EMULATION)
  return emulation::pack(emulation::f16, low, high);
#else
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#endif
}

TERSOR_PTX uint32_t pack_bf16x2(float low, float high) {
#if defined(TERSOR_EMULATION)
  return emulation::pack(emulation::bf16, low, high);
#else
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#endif
}

TERSOR_PTX Vec<float, 2> unpack_f16x2(uint32_t pair) {
#if defined(TERSOR_EMULATION)
  return {{emulation::f16_to_float(pair & 0xffff), emulation::f16_to_float(pair >> 16)}};
#else
  Vec<float, 2> result;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(result.values[0]), "=f"(result.values[1])
      : "r"(pair));
  return result;
#endif
}

TERSOR_PTX Vec<float, 2> unpack_bf16x2(uint32_t pair) {
  return {{bits_to_float(pair << 16), bits_to_float(pair & 0xffff0000u)}};
}

// ---- packed arithmetic -----------------------------------------------------------------------------------
// Each rounds once. bf16x2 has only fma on sm_80, so the others are fma with a neutral operand: exact,
// because a product with 1 is exact and adding -0 changes no value and no sign.
TERSOR_PTX uint32_t add_f16x2(uint32_t a, uint32_t b) {
#if defined(TERSOR_EMULATION)
  return emulation::fma_pair(emulation::f16, a, 0x3c003c00u, b);
#else
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#endif
}

TERSOR_PTX uint32_t sub_f16x2(uint32_t a, uint32_t b) {
#if defined(TERSOR_EMULATION)
  return emulation::fma_pair(emulation::f16, b, 0xbc00bc00u, a);
#else
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#endif
}

TERSOR_PTX uint32_t mul_f16x2(uint32_t a, uint32_t b) {
#if defined(TERSOR_EMULATION)
  return emulation::fma_pair(emulation::f16, a, b, 0x80008000u);
#else
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#endif
}

TERSOR_PTX uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(TERSOR_EMULATION)
  return emulation::fma_pair(emulation::f16, a, b, c);
#else
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

TERSOR_PTX uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(TERSOR_EMULATION)
  return emulation::fma_pair(emulation::bf16, a, b, c);
#else
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#endif
}

TERSOR_PTX uint32_t add_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, 0x3f803f80u, b); }
TERSOR_PTX uint32_t sub_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(b, 0xbf80bf80u, a); }
TERSOR_PTX uint32_t mul_bf16x2(uint32_t a, uint32_t b) { return fma_bf16x2(a, b, 0x80008000u); }

}  // namespace ptx
}  // namespace tersor
