// Loops that do one thing as fast as this instruction set can (compiled once for each).
#include "cpu/isa.h"
#include "cpu/simd.h"

namespace tersor::TERSOR_ISA {

uint64_t floor_read(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  i32 sums[4] = {load_i32(p), load_i32(p + 64), load_i32(p + 128), load_i32(p + 192)};
  for (size_t i = 256; i + 256 <= bytes; i += 256) {
    __builtin_prefetch(p + i + 4096);
    __builtin_prefetch(p + i + 4160);
    __builtin_prefetch(p + i + 4224);
    __builtin_prefetch(p + i + 4288);
    for (int j = 0; j < 4; ++j) sums[j] = or_(sums[j], load_i32(p + i + 64 * j));
  }
  uint32_t lanes[16];
  store_i32(lanes, or_(or_(sums[0], sums[1]), or_(sums[2], sums[3])));
  uint64_t total = 0;
  for (uint32_t lane : lanes) total += lane;
  return total;
}

double floor_fp32(long rounds) {
  // Twelve native registers, each a chain of its own: enough to hide the latency of an FMA.
  Native acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = native_splat(1.0f + i);
  const Native a = native_splat(0.999f), b = native_splat(1e-3f);
  for (long round = 0; round < rounds * 100; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = native_fma(acc[i], a, b);
  }
  for (int i = 0; i < 12; ++i) {
    Native sum = acc[i];
    asm volatile("" : TERSOR_NATIVE_CONSTRAINT(sum));  // it is needed
  }
  return 2.0 * 12 * (sizeof(Native) / 4) * 100 * rounds;
}

double floor_int8(long rounds) { return native_int8_loop(rounds); }

double floor_bf16(long rounds) { return native_bf16_loop(rounds); }

}  // namespace tersor::TERSOR_ISA
