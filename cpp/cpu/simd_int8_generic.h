// simd_int8.h in portable C++: 16-bit products (255 * 127 fits), even and odd bytes apart.
#pragma once

#include "cpu/int_layout.h"

namespace tersor::TERSOR_ISA {

typedef uint16_t v8u16 __attribute__((vector_size(16)));  // unsigned, so that wrapping is defined

TERSOR_INLINE i32 magnitude(f32 x) {
  i32 r;
  TERSOR_LANES r.v[l] = (v4u)x.v[l] & 0x7fffffffu;
  return r;
}
TERSOR_INLINE i32 max_i32(i32 a, i32 b) {
  TERSOR_LANES {
    const v4u greater = (v4u)((v4i)a.v[l] > (v4i)b.v[l]);
    a.v[l] = (a.v[l] & greater) | (b.v[l] & ~greater);
  }
  return a;
}
TERSOR_INLINE uint32_t reduce_max(i32 a) {
  uint32_t lanes[16], result = 0;
  store_i32(lanes, a);
  for (uint32_t lane : lanes) result = lane > result ? lane : result;
  return result;
}
TERSOR_INLINE f32 div(f32 a, f32 b) {
  TERSOR_LANES a.v[l] = a.v[l] / b.v[l];
  return a;
}
TERSOR_INLINE f32 limit(f32 a, float low, float high) {
  TERSOR_LANES {
    v4f x = a.v[l];
    x = x > high ? v4f{high, high, high, high} : x;
    a.v[l] = x < low ? v4f{low, low, low, low} : x;
  }
  return a;
}
TERSOR_INLINE i32 round_within(f32 a, float low, float high) {
  // Adding 1.5 * 2^23 leaves the integer, rounded to nearest even, in the low bits of the sum.
  const f32 within = limit(a, low, high);
  i32 r;
  TERSOR_LANES r.v[l] = (v4u)(within.v[l] + 12582912.0f) - 0x4b400000u;
  return r;
}
TERSOR_INLINE i32 float_bits(f32 a) {
  i32 r;
  TERSOR_LANES r.v[l] = (v4u)a.v[l];
  return r;
}

constexpr int dot_kind(int bits) { return bits < 5 ? 5 : bits; }

// The compiler must not reorder a chain of sums: it would compute all products first and spill them.
TERSOR_INLINE void keep_order(v4u& x) {
#if defined(__aarch64__)
  asm("" : "+w"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

template <int kind>
struct Int8Dot {
  static constexpr int run = run_length_16(kind);
  static constexpr int words = 16, parts = 8 / run;  // words t and 8 + t: bytes 0, 2 and 1, 3 of vector t
  using Weights = struct {
    i32 even, odd;
  };
  using Activation = Weights;

  static int pack(i32 low, i32 high, int centre, uint32_t* block) {
    int32_t q[32];
    store_i32(q, low);
    store_i32(q + 16, high);
    int total = 0;
    for (int part = 0; part < parts; ++part) {
      int sums[2] = {0, 0};
      for (int t = part * run; t < (part + 1) * run; ++t) {
        const int k = 8 * (t / 2) + 2 * (t % 2);  // bytes 0..3 of the dword: k, k+4, k+1, k+5
        block[t] = pack_pair(q[k], q[k + 1]);
        block[8 + t] = pack_pair(q[k + 4], q[k + 5]);
        sums[0] += q[k] + q[k + 4];
        sums[1] += q[k + 1] + q[k + 5];
      }
      block[words + part] = pack_pair(-centre * sums[0], -centre * sums[1]);
      total += sums[0] + sums[1];
    }
    return total;
  }
  TERSOR_INLINE Weights weights(i32 bytes) { return {and_(bytes, 0x00ff00ff), and_(srl<8>(bytes), 0x00ff00ff)}; }
  TERSOR_INLINE Activation activation(const uint32_t* block, int t) {
    return {splat_i32(block[t]), splat_i32(block[8 + t])};
  }
  TERSOR_INLINE i32 start(uint32_t correction) { return splat_i32(correction); }
  TERSOR_INLINE i32 step(i32 acc, Weights w, Activation x) {
    TERSOR_LANES {
      const v8u16 even = (v8u16)w.even.v[l] * (v8u16)x.even.v[l], odd = (v8u16)w.odd.v[l] * (v8u16)x.odd.v[l];
      acc.v[l] = (v4u)((v8u16)acc.v[l] + even + odd);
      keep_order(acc.v[l]);
    }
    return acc;
  }
  TERSOR_INLINE i32 widen(i32 acc) {
    TERSOR_LANES acc.v[l] = (v4u)(((v4i)(acc.v[l] << 16) >> 16) + ((v4i)acc.v[l] >> 16));
    return acc;
  }
  static constexpr bool scales_runs = false;
  TERSOR_INLINE i32 pairs(i32 scales) { return scales; }
  TERSOR_INLINE i32 widen(i32 acc, i32) { return widen(acc); }
};
TERSOR_INLINE i32 add_i32(i32 a, i32 b) {
  TERSOR_LANES a.v[l] = a.v[l] + b.v[l];
  return a;
}
TERSOR_INLINE i32 mul_i32(i32 a, i32 b) {
  TERSOR_LANES a.v[l] = a.v[l] * b.v[l];
  return a;
}
TERSOR_INLINE i32 load_u8_i32(const void* p) {
  uint32_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = static_cast<const uint8_t*>(p)[i];
  return load_i32(lanes);
}

#if defined(__aarch64__)
constexpr int kA8DecodeRows = 4, kA8PanelRows = 4, kA8PanelTiles = 1;
#else
constexpr int kA8DecodeRows = 2, kA8PanelRows = 2, kA8PanelTiles = 1;
#endif
constexpr int kLimbRows = 0, kLimbBits = 0;
constexpr int a8_decode_strips(int) { return 0; }

}  // namespace tersor::TERSOR_ISA
