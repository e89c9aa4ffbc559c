// Every wrapper of ptx/ alone: one warp (two for the barriers) reads 32-bit words, applies it, writes words.
// The same file runs on the host and, for the recording, on a GPU. tests/emulation/cases.py feeds it.
#include "dispatch/launch.h"
#include "ptx/math.h"
#include "ptx/ptx.h"

namespace tersor {
namespace {

using ptx::Vec;
using Pair = Vec<uint32_t, 2>;
using Quad = Vec<uint32_t, 4>;

TERSOR_DEVICE uint32_t word(const uint32_t* in, int i) { return ptx::load_global_constant(in + i); }
TERSOR_DEVICE void put(uint32_t* out, int i, uint32_t value) { ptx::store_global(out + i, value); }

}  // namespace
}  // namespace tersor

// A kernel and its launcher: `n` is whatever the case counts.
#define CASE(name, threads, shared, ...)                                                            \
  namespace tersor {                                                                                \
  namespace {                                                                                       \
  __global__ void kernel_##name(const uint32_t* in, uint32_t* out, int n) {                         \
    const int lane = ptx::lane_index();                                                             \
    (void)lane, (void)n, (void)in;                                                                  \
    __VA_ARGS__                                                                                     \
  }                                                                                                 \
  }                                                                                                 \
  }                                                                                                 \
  extern "C" int case_##name(const uint32_t* in, uint32_t* out, int n) {                            \
    return tersor::launch(tersor::kernel_##name, dim3(1), dim3(threads), shared, nullptr, in, out, n); \
  }

// Element by element over three arrays of n words.
#define ELEMENT(name, expression)                                                     \
  CASE(name, 32, 0, for (int i = lane; i < n; i += 32) {                              \
    const uint32_t a = word(in, i), b = word(in, n + i), c = word(in, 2 * n + i);     \
    (void)b, (void)c;                                                                 \
    put(out, i, expression);                                                          \
  })

ELEMENT(add_f16x2, ptx::add_f16x2(a, b))
ELEMENT(sub_f16x2, ptx::sub_f16x2(a, b))
ELEMENT(mul_f16x2, ptx::mul_f16x2(a, b))
ELEMENT(fma_f16x2, ptx::fma_f16x2(a, b, c))
ELEMENT(add_bf16x2, ptx::add_bf16x2(a, b))
ELEMENT(sub_bf16x2, ptx::sub_bf16x2(a, b))
ELEMENT(mul_bf16x2, ptx::mul_bf16x2(a, b))
ELEMENT(fma_bf16x2, ptx::fma_bf16x2(a, b, c))
ELEMENT(pack_f16x2, ptx::pack_f16x2(ptx::bits_to_float(a), ptx::bits_to_float(b)))
ELEMENT(pack_bf16x2, ptx::pack_bf16x2(ptx::bits_to_float(a), ptx::bits_to_float(b)))
ELEMENT(prmt, ptx::prmt(a, b, c))
ELEMENT(funnel_shift_right, ptx::funnel_shift_right(a, b, c))
ELEMENT(exp2_approx, ptx::float_to_bits(ptx::exp2_approx(ptx::bits_to_float(a))))
ELEMENT(count_bits, static_cast<uint32_t>(ptx::count_bits(a)))
ELEMENT(float_bits, ptx::float_to_bits(ptx::bits_to_float(a)))

#define UNPACK(name)                                              \
  CASE(name, 32, 0, for (int i = lane; i < n; i += 32) {          \
    const Vec<float, 2> v = ptx::name(word(in, i));               \
    put(out, 2 * i, ptx::float_to_bits(v[0]));                    \
    put(out, 2 * i + 1, ptx::float_to_bits(v[1]));                \
  })
UNPACK(unpack_f16x2)
UNPACK(unpack_bf16x2)

// Eight truth tables, among them the ones that kernels use.
CASE(lop3, 32, 0, for (int i = lane; i < n; i += 32) {
  const uint32_t a = word(in, i), b = word(in, n + i), c = word(in, 2 * n + i);
  put(out, 8 * i, ptx::lop3<0xea>(a, b, c));
  put(out, 8 * i + 1, ptx::lop3<0x6a>(a, b, c));
  put(out, 8 * i + 2, ptx::lop3<0xc0>(a, b, c));
  put(out, 8 * i + 3, ptx::lop3<0xf8>(a, b, c));
  put(out, 8 * i + 4, ptx::lop3<0x96>(a, b, c));
  put(out, 8 * i + 5, ptx::lop3<0x01>(a, b, c));
  put(out, 8 * i + 6, ptx::lop3<0x1b>(a, b, c));
  put(out, 8 * i + 7, ptx::lop3<0xd8>(a, b, c));
})

// ---- warps: n rounds, in[round][2][32]: values and arguments ---------------------------------------------
#define WARP(name, expression)                                                                      \
  CASE(name, 32, 0, for (int i = 0; i < n; ++i) {                                                   \
    const uint32_t value = word(in, i * 64 + lane);                                                 \
    const int argument = static_cast<int>(word(in, i * 64 + 32 + lane));                            \
    (void)argument;                                                                                 \
    put(out, i * 32 + lane, expression);                                                            \
  })
WARP(shuffle, ptx::shuffle(value, argument))
WARP(shuffle_xor, ptx::shuffle_xor(value, argument))
WARP(shuffle_down, ptx::shuffle_down(value, argument))
WARP(ballot, ptx::ballot(value & 1))
WARP(any, ptx::any(value & 1))
WARP(all, ptx::all(value & 1))
WARP(lane_index, static_cast<uint32_t>(ptx::lane_index()))
CASE(shuffle_wide, 32, 0, for (int i = 0; i < n; ++i) {
  const Pair v = ptx::shuffle(Pair{{word(in, i * 64 + lane), word(in, i * 64 + 32 + lane)}}, lane + 5);
  put(out, i * 64 + lane, v[0]);
  put(out, i * 64 + 32 + lane, v[1]);
})

// ---- matrices: in[round]: a[32][4], b[32][4], d[32][4], metadata[32] --------------------------------------
#define MMA(name, type, words_b, ...)                                                                    \
  CASE(name, 32, 0, for (int i = 0; i < n; ++i) {                                                        \
    const uint32_t* p = in + i * 416;                                                                    \
    uint32_t a[4], b[words_b];                                                                           \
    type d[4];                                                                                           \
    for (int j = 0; j < 4; ++j) a[j] = word(p, lane * 4 + j);                                            \
    for (int j = 0; j < words_b; ++j) b[j] = word(p, 128 + lane * 4 + j);                                \
    const type* sums = reinterpret_cast<const type*>(p) + 256;                                           \
    for (int j = 0; j < 4; ++j) d[j] = ptx::load_global_constant(sums + lane * 4 + j);                   \
    const uint32_t metadata = word(p, 384 + lane);                                                       \
    (void)metadata;                                                                                      \
    ptx::__VA_ARGS__;                                                                                    \
    for (int j = 0; j < 4; ++j) ptx::store_global(reinterpret_cast<type*>(out) + (i * 32 + lane) * 4 + j, d[j]); \
  })
MMA(mma_m16n8k16_f16, float, 2, mma_m16n8k16_f16(d, a, b))
MMA(mma_m16n8k16_bf16, float, 2, mma_m16n8k16_bf16(d, a, b))
MMA(mma_m16n8k32_s8, int32_t, 2, mma_m16n8k32_s8(d, a, b))
MMA(mma_m16n8k64_s4, int32_t, 2, mma_m16n8k64_s4(d, a, b))
MMA(mma_m16n8k256_b1, int32_t, 2, mma_m16n8k256_b1(d, a, b))
MMA(mma_sp_m16n8k32_f16_0, float, 4, mma_sp_m16n8k32_f16<0>(d, a, b, metadata))
MMA(mma_sp_m16n8k32_f16_1, float, 4, mma_sp_m16n8k32_f16<1>(d, a, b, metadata))
MMA(mma_sp_m16n8k32_bf16_0, float, 4, mma_sp_m16n8k32_bf16<0>(d, a, b, metadata))
MMA(mma_sp_m16n8k32_bf16_1, float, 4, mma_sp_m16n8k32_bf16<1>(d, a, b, metadata))
MMA(mma_sp_m16n8k64_s8, int32_t, 4, mma_sp_m16n8k64_s8(d, a, b, metadata))

// in[round]: 32 rows of 4 words, then the row that each lane names.
#define LDMATRIX(name, count)                                                                        \
  CASE(name, 32, 512, const ptx::shared_t tile = ptx::dynamic_shared(); for (int i = 0; i < n; ++i) { \
    const uint32_t* p = in + i * 160;                                                                \
    ptx::store_shared(tile + lane * 16, ptx::load_global_constant(reinterpret_cast<const Quad*>(p) + lane)); \
    ptx::sync_warp();                                                                                \
    uint32_t r[count];                                                                               \
    ptx::name(r, tile + word(p, 128 + lane) * 16);                                                   \
    for (int j = 0; j < count; ++j) put(out, (i * 32 + lane) * count + j, r[j]);                     \
    ptx::sync_warp();                                                                                \
  })
LDMATRIX(ldmatrix_x1, 1)
LDMATRIX(ldmatrix_x2, 2)
LDMATRIX(ldmatrix_x4, 4)
LDMATRIX(ldmatrix_x1_transposed, 1)
LDMATRIX(ldmatrix_x2_transposed, 2)
LDMATRIX(ldmatrix_x4_transposed, 4)

// ---- memory: a neighbour's bytes come back, in each width --------------------------------------------------
namespace tersor {
namespace {
template <class T, class Load>
TERSOR_DEVICE void through(const uint32_t* in, uint32_t* out, int lane, int at, const Load& load) {
  const T value = load(reinterpret_cast<const T*>(in) + lane);
  const ptx::shared_t tile = ptx::dynamic_shared();
  ptx::store_shared(tile + lane * static_cast<int>(sizeof(T)), value);
  ptx::sync_warp();
  ptx::store_global(reinterpret_cast<T*>(out) + at / static_cast<int>(sizeof(T)) + lane,
                    ptx::load_shared<T>(tile + (lane ^ 1) * static_cast<int>(sizeof(T))));
  ptx::sync_warp();
}
}  // namespace
}  // namespace tersor

#define MEMORY(name, load)                                                                                   \
  CASE(name, 32, 512, (through<uint8_t>(in, out, lane, 0, [](const uint8_t* p) { return ptx::load(p); }));   \
       (through<uint16_t>(in, out, lane, 32, [](const uint16_t* p) { return ptx::load(p); }));               \
       (through<uint32_t>(in, out, lane, 96, [](const uint32_t* p) { return ptx::load(p); }));               \
       (through<Pair>(in, out, lane, 224, [](const Pair* p) { return ptx::load(p); }));                      \
       (through<Quad>(in, out, lane, 480, [](const Quad* p) { return ptx::load(p); }));)
MEMORY(load_global, load_global)
MEMORY(load_global_constant, load_global_constant)
MEMORY(load_global_once, load_global_once)
MEMORY(load_global_volatile, load_global_volatile)

CASE(store_global_volatile, 32, 0, {
  ptx::store_global_volatile(reinterpret_cast<Quad*>(out) + lane,
                             ptx::load_global(reinterpret_cast<const Quad*>(in) + lane));
  ptx::store_global_volatile(reinterpret_cast<uint8_t*>(out + 128) + lane,
                             ptx::load_global(reinterpret_cast<const uint8_t*>(in) + lane));
})

// The alignment that dynamic shared memory promises.
CASE(dynamic_shared, 32, 128, put(out, lane, ptx::dynamic_shared() % 128);)

// in: 32 pieces of 4 words, then how many bytes of its piece each lane copies.
#define COPY(name, bytes)                                                                              \
  CASE(name, 32, 512, const ptx::shared_t tile = ptx::dynamic_shared();                                \
       for (int i = 0; i < 16; i += 4) ptx::store_shared(tile + lane * 16 + i, 0x55555555u);           \
       ptx::name(tile + lane * 16, in + lane * 4, static_cast<int>(word(in, 128 + lane)));             \
       ptx::cp_async_commit(); ptx::cp_async_commit(); ptx::cp_async_wait<1>(); ptx::sync_warp();      \
       for (int i = 0; i < 4; ++i)                                                                     \
         put(out, lane * 4 + i, ptx::load_shared<uint32_t>(tile + (lane ^ 1) * 16 + i * 4));)
COPY(cp_async_16, 16)
COPY(cp_async_16_once, 16)
COPY(cp_async_8, 8)
COPY(cp_async_4, 4)

// ---- atomics: in[4][32], one location for each lane; old values come back, then what is left there -----------
#define ATOMIC(name, type, call)                                                                          \
  CASE(name, 32, 0, type* p = reinterpret_cast<type*>(out) + 96 + lane;                                   \
       const type* q = reinterpret_cast<const type*>(in);                                                 \
       ptx::store_global(p, ptx::load_global_constant(q + lane)); for (int i = 1; i < 4; ++i) {           \
         const type operand = ptx::load_global_constant(q + i * 32 + lane);                               \
         ptx::store_global(reinterpret_cast<type*>(out) + (i - 1) * 32 + lane, ptx::call);                \
       })
ATOMIC(atomic_add, uint32_t, atomic_add(p, operand))
ATOMIC(atomic_add_float, float, atomic_add(p, operand))
ATOMIC(atomic_max, uint32_t, atomic_max(p, operand))
ATOMIC(atomic_exchange, uint32_t, atomic_exchange(p, operand))
ATOMIC(atomic_compare_exchange, uint32_t, atomic_compare_exchange(p, 7, operand))
ATOMIC(atomic_inc_wrap, uint32_t, atomic_inc_wrap(p, operand))

// ---- barriers: two warps hand words to one another ----------------------------------------------------------
#define EXCHANGE(name, first, second)                                                                  \
  CASE(name, 64, 256, const int i = threadIdx.x; const ptx::shared_t tile = ptx::dynamic_shared();     \
       ptx::store_shared(tile + i * 4, word(in, i)); first;                                            \
       const uint32_t other = ptx::load_shared<uint32_t>(tile + (i ^ 37) * 4); second;                 \
       put(out, i, other);)
EXCHANGE(barrier, ptx::barrier(), ptx::fence())
EXCHANGE(named_barrier, ptx::named_barrier(3, 64), ptx::region("after"))

// Warp 0 produces, warp 1 waits.
CASE(named_barrier_arrive, 64, 128, const ptx::shared_t tile = ptx::dynamic_shared(); if (threadIdx.x < 32) {
  ptx::store_shared(tile + lane * 4, word(in, lane));
  ptx::named_barrier_arrive(2, 64);
} else {
  ptx::named_barrier(2, 64);
  put(out, lane, ptx::load_shared<uint32_t>(tile + (31 - lane) * 4));
})
