// simd.h in portable C++: four vectors of four lanes, which compilers map to SSE2 or NEON.
#pragma once

#include "common/float16.h"

namespace tersor::TERSOR_ISA {

typedef float v4f __attribute__((vector_size(16)));
typedef uint32_t v4u __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

struct f32 {
  v4f v[4];
};
struct i32 {
  v4u v[4];
};

#define TERSOR_LANES _Pragma("GCC unroll 4") for (int l = 0; l < 4; ++l)
#define TERSOR_INLINE static inline __attribute__((always_inline))

TERSOR_INLINE i32 load_i32(const void* p) {
  i32 r;
  std::memcpy(&r, p, 64);
  return r;
}
TERSOR_INLINE void store_i32(void* p, i32 a) { std::memcpy(p, &a, 64); }
TERSOR_INLINE i32 splat_i32(uint32_t x) {
  i32 r;
  TERSOR_LANES r.v[l] = v4u{x, x, x, x};
  return r;
}
template <int n>
TERSOR_INLINE i32 srl(i32 a) {
  TERSOR_LANES a.v[l] = a.v[l] >> n;
  return a;
}
template <int n>
TERSOR_INLINE i32 sll(i32 a) {
  TERSOR_LANES a.v[l] = a.v[l] << n;
  return a;
}
TERSOR_INLINE i32 and_(i32 a, uint32_t c) {
  TERSOR_LANES a.v[l] = a.v[l] & c;
  return a;
}
TERSOR_INLINE i32 or_(i32 a, i32 b) {
  TERSOR_LANES a.v[l] = a.v[l] | b.v[l];
  return a;
}
TERSOR_INLINE f32 to_f32(i32 a) {
  f32 r;
  TERSOR_LANES r.v[l] = __builtin_convertvector((v4i)a.v[l], v4f);
  return r;
}
TERSOR_INLINE f32 as_f32(i32 a) {
  f32 r;
  TERSOR_LANES r.v[l] = (v4f)a.v[l];
  return r;
}
TERSOR_INLINE f32 splat(float x) {
  f32 r;
  TERSOR_LANES r.v[l] = v4f{x, x, x, x};
  return r;
}
TERSOR_INLINE f32 zero() { return splat(0.0f); }
TERSOR_INLINE f32 load(const float* p) {
  f32 r;
  std::memcpy(&r, p, 64);
  return r;
}
TERSOR_INLINE void store(float* p, f32 a) { std::memcpy(p, &a, 64); }
TERSOR_INLINE f32 fma(f32 a, f32 b, f32 c) {
  TERSOR_LANES c.v[l] = a.v[l] * b.v[l] + c.v[l];
  return c;
}
TERSOR_INLINE f32 mul(f32 a, f32 b) {
  TERSOR_LANES a.v[l] = a.v[l] * b.v[l];
  return a;
}
TERSOR_INLINE f32 add(f32 a, f32 b) {
  TERSOR_LANES a.v[l] = a.v[l] + b.v[l];
  return a;
}
TERSOR_INLINE f32 sub(f32 a, f32 b) {
  TERSOR_LANES a.v[l] = a.v[l] - b.v[l];
  return a;
}
// A call, not inlined: there is no instruction for it, and kernels have it once for each code of a word.
static __attribute__((noinline, unused)) void lookup_floats(const f32& table, const i32& index, f32& to) {
  float entries[16], out[16];
  uint32_t at[16];
  store(entries, table);
  store_i32(at, index);
  for (int i = 0; i < 16; ++i) out[i] = entries[at[i] & 15];
  to = load(out);
}
template <int bits>
TERSOR_INLINE f32 lookup_f32(const f32& table, i32 index) {
  f32 r;
  lookup_floats(table, index, r);
  return r;
}

static inline f32 load_as(const void* p, int dtype) {
  if (dtype == TERSOR_FLOAT32) return load(static_cast<const float*>(p));
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = load_as_float(p, dtype, i);
  return load(values);
}
static inline f32 load_u8(const uint8_t* p) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = p[i];
  return load(values);
}
static inline void store_as(void* p, int dtype, f32 a, int count) {
  float values[16];
  store(values, a);
  for (int i = 0; i < count; ++i) store_from_float(p, dtype, i, values[i]);
}
static inline float reduce_add(f32 a) {
  const v4f s = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

#if defined(__aarch64__)
constexpr int kFusedRows = 4, kPanelRows = 6, kPanelTiles = 1, kChains = 4;
#else
constexpr int kFusedRows = 2, kPanelRows = 3, kPanelTiles = 1, kChains = 2;
#endif

using Native = v4f;
TERSOR_INLINE Native native_splat(float x) { return v4f{x, x, x, x}; }
TERSOR_INLINE Native native_fma(Native a, Native b, Native c) { return a * b + c; }
#if defined(__aarch64__)
#define TERSOR_NATIVE_CONSTRAINT "+w"
#else
#define TERSOR_NATIVE_CONSTRAINT "+x"
#endif
// Portable C++ names no int8 dot product and no bf16 one.
static inline double native_int8_loop(long) { return 0; }
static inline double native_bf16_loop(long) { return 0; }

}  // namespace tersor::TERSOR_ISA
