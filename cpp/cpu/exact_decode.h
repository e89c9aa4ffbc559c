// From a block of packed codes to operands: the two arithmetics of the exact kernels.
//
// Float: one step per k. A code is cut out of its dword where it lies, so its value is code * 2^shift;
// the activation carries 2^-shift (both exact). That is and + convert + FMA for 8 weights of AVX2, with
// nothing unpacked. |x| below 2^-102 would lose bits to gradual underflow; no sum of layers gets there.
//
// Bf16 (AVX-512): one step per pair of k. A shifted dword holds the codes of a pair in its two 16-bit
// words; a table lookup, which ignores the bits above its index, turns them into bfloat16; vdpbf16ps
// multiplies and adds both. Codes of up to 8 bits are exact in bfloat16, so the scale stays outside.
#pragma once

#include "cpu/int_layout.h"
#include "cpu/simd.h"

namespace tersor::TERSOR_ISA {

template <int n>
TERSOR_INLINE i32 shift_right(i32 v) {
  if constexpr (n > 0) return srl<n>(v);
  if constexpr (n < 0) return sll<-n>(v);
  return v;
}

struct Float {
  using Element = float;  // of the prepared activations
  using Operand = f32;    // 16 weights, or an activation in every lane
  static constexpr int kSteps = 32;
  static constexpr bool kPairs = false;
  static constexpr int kFused = kFusedRows;

  TERSOR_INLINE f32 broadcast(float a) { return splat(a); }
  TERSOR_INLINE f32 madd(f32 acc, f32 w, f32 a) { return fma(w, a, acc); }
  TERSOR_INLINE f32 load_weights(const float* p) { return load(p); }
  TERSOR_INLINE void store_weights(float* p, f32 w) { store(p, w); }

  // Where the value of k's code begins in the dword that `field` returns: in place, unless it would
  // reach the sign bit.
  static constexpr int value_shift(int bits, int k) {
    const int p = plane_bits(bits, 0), s = shift_of(k, p);
    return s + bits <= 31 ? s : 0;
  }

  template <int bits, int k, int plane>
  TERSOR_INLINE i32 higher_planes(const uint8_t* block, i32 value) {
    constexpr int p = plane_bits(bits, plane);
    if constexpr (p == 0) {
      return value;
    } else {
      constexpr int low = plane_offset(bits, plane), at = value_shift(bits, k) + low;
      const i32 v = load_i32(block + 64 * (low + chunk_of(k, p)));
      const i32 part = and_(shift_right<shift_of(k, p) - at>(v), ((1u << p) - 1) << at);
      return higher_planes<bits, k, plane + 1>(block, or_(value, part));
    }
  }

  template <int bits, int k>
  TERSOR_INLINE i32 field(const uint8_t* block) {
    constexpr int p = plane_bits(bits, 0), from = shift_of(k, p), to = value_shift(bits, k);
    i32 v = shift_right<from - to>(load_i32(block + 64 * chunk_of(k, p)));
    if constexpr (from + p < 32 || from == to) v = and_(v, ((1u << p) - 1) << to);
    return higher_planes<bits, k, 1>(block, v);
  }

  // What decode() leaves out: w = (decode - (zero_point - centre)) * scale, up to the shift.
  static constexpr int centre(int) { return 0; }
  static constexpr int panel_centre(int bits) { return 1 << (bits - 1); }

  template <int bits>
  struct Table {};
  template <int bits, int step>
  TERSOR_INLINE f32 decode(const uint8_t* block, const Table<bits>&) {
    return to_f32(field<bits, step>(block));
  }
  // Centred, so that long sums of a symmetric weight do not cancel.
  template <int bits, int step>
  TERSOR_INLINE f32 decode_panel(const uint8_t* block, const Table<bits>& table) {
    constexpr float middle = static_cast<float>(int64_t(1) << (bits - 1 + value_shift(bits, step)));
    return sub(decode<bits, step>(block, table), splat(middle));
  }
};

#if defined(TERSOR_SIMD_BF16)
struct Bf16 {
  using Element = uint32_t;  // x[2j] in the low half, x[2j+1] in the high half
  using Operand = i32;
  static constexpr int kSteps = 16;
  static constexpr bool kPairs = true;
  static constexpr int kFused = kFusedRowsBf16;

  TERSOR_INLINE i32 broadcast(uint32_t a) { return splat_i32(a); }
  TERSOR_INLINE f32 madd(f32 acc, i32 w, i32 a) { return dot_bf16(acc, w, a); }
  TERSOR_INLINE i32 load_weights(const float* p) { return load_i32(p); }
  TERSOR_INLINE void store_weights(float* p, i32 w) { store_i32(p, w); }

  // 7 bits: 0x4300 | code is 128 + code. 8 bits: the code itself.
  static constexpr int centre(int bits) { return bits <= 6 ? 1 << (bits - 1) : bits == 7 ? -128 : 0; }
  static constexpr int panel_centre(int bits) { return centre(bits); }

  template <int bits>
  struct Table {
    i32 values[2];
    Table() {
      if constexpr (bits <= 6) {
        uint16_t entries[64];
        for (int i = 0; i < 64; ++i) {
          entries[i] = float_to_bf16(static_cast<float>((i & ((1 << bits) - 1)) - centre(bits)));
        }
        values[0] = load_i32(entries);
        values[1] = load_i32(entries + 32);
      }
    }
  };

  // The codes of a pair in the low bits of the two words, anything above them.
  template <int bits, int pair, int plane>
  TERSOR_INLINE i32 index(const uint8_t* block) {
    constexpr int p = plane_bits(bits, plane), low = plane_offset(bits, plane), k = 2 * pair;
    const i32 v = shift_right<shift_of(k, p) - low>(load_i32(block + 64 * (low + chunk_of(k, p))));
    if constexpr (plane == 0) {
      return v;
    } else {
      constexpr uint32_t below = (1u << low) - 1;
      return select_bits(below * 0x10001u, index<bits, pair, plane - 1>(block), v);
    }
  }

  template <int bits, int pair>
  TERSOR_INLINE i32 decode(const uint8_t* block, const Table<bits>& table) {
    if constexpr (bits == 8) {
      constexpr int k = 2 * pair;
      const i32 v = load_i32(block + 64 * chunk_of(k, 8));
      const i32 even = and_(shift_right<shift_of(k, 8)>(v), 0xff);
      const i32 odd = and_(shift_right<shift_of(k + 1, 8)>(v), 0xff);
      return select_bits(0xffff0000u, as_i32(to_f32(odd)), srl<16>(as_i32(to_f32(even))));
    } else {
      constexpr int planes = plane_bits(bits, 1) == 0 ? 1 : plane_bits(bits, 2) == 0 ? 2 : 3;
      const i32 i = index<bits, pair, planes - 1>(block);
      if constexpr (bits == 7) return select_bits(0x007f007fu, i, splat_i32(0x43004300u));
      if constexpr (bits == 6) return lookup64(table.values, i);
      return lookup32(table.values, i);
    }
  }
  template <int bits, int pair>
  TERSOR_INLINE i32 decode_panel(const uint8_t* block, const Table<bits>& table) {
    return decode<bits, pair>(block, table);
  }
};
#endif

}  // namespace tersor::TERSOR_ISA
