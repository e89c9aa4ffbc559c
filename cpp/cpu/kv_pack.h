// Packing one page of one head (kv_pack.cpp), for kv_append.cpp as well.
#pragma once

#include "common/scratch.h"
#include "cpu/isa.h"
#include "cpu/kv_layout.h"

namespace tersor::TERSOR_ISA {

struct PackScratch {
  char* raw = nullptr;  // a raw page, for tokens that are packed at once
  float* x = nullptr;   // the numbers of keys or values, vector after vector
  float* turned = nullptr;
  uint8_t *codes = nullptr, *removed = nullptr;
  struct Extremes {  // of a vector: the largest two and the smallest two numbers that are left
    double gain;
    float high[2], low[2];
    int32_t high_at, low_at, left;
  };
  Extremes* extremes = nullptr;
  bool allocate(const tersor_kv& kv, Scratch& memory) {
    const int64_t dim = kv.key_dim > kv.value_dim ? kv.key_dim : kv.value_dim;
    const size_t raw_bytes = kv_offsets(kv, 0).bytes, numbers = kv.page_tokens * dim;
    memory.reserve<char>(raw_bytes);
    memory.reserve<float>(numbers);
    memory.reserve<float>(numbers);
    memory.reserve<uint8_t>(numbers);
    memory.reserve<uint8_t>(numbers);
    memory.reserve<Extremes>(numbers / 16);
    if (!memory.allocate()) return false;
    raw = memory.take<char>(raw_bytes);
    x = memory.take<float>(numbers);
    turned = memory.take<float>(numbers);
    codes = memory.take<uint8_t>(numbers);
    removed = memory.take<uint8_t>(numbers);
    extremes = memory.take<Extremes>(numbers / 16);
    return true;
  }
};

void kv_pack_page(const tersor_kv& kv, int64_t kind, const char* raw, char* page, PackScratch& scratch);

// Threads that are worth starting for so many numbers.
static inline int kv_useful_threads(int64_t numbers, int threads) {
  const int64_t useful = 1 + numbers / (1 << 16), most = threads < 256 ? threads : 256;
  return static_cast<int>(useful < most ? useful : most);
}

}  // namespace tersor::TERSOR_ISA
