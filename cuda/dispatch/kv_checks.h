// What the launchers of the compressed cache check alike.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "tersor.h"
#include "tile/kv_layout.h"

namespace tersor {

inline bool kv_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline int check_kv_shape(int64_t batch, int64_t kv_heads, int64_t head_dim) {
  if (batch < 0 || batch > 65535 || kv_heads < 1 || kv_heads > 65535) {
    return fail(TERSOR_INVALID, "batch, kv_heads are %lld, %lld; accepted on CUDA: 0 to 65535 and 1 to 65535",
                (long long)batch, (long long)kv_heads);
  }
  if (head_dim < 0 || head_dim > 256 || !kv_dim_exists(static_cast<int>(head_dim))) {
    return fail(TERSOR_INVALID, "head_dim is %lld; accepted on CUDA: 64, 80, 96, 128, 256", (long long)head_dim);
  }
  return TERSOR_OK;
}

inline int check_kv_bits(int64_t key_bits, int64_t value_bits) {
  const auto exist = [](int64_t bits) { return bits > 0 && bits <= 16 && kv_bits_exist(static_cast<int>(bits)); };
  if (exist(key_bits) && exist(value_bits)) return TERSOR_OK;
  return fail(TERSOR_INVALID, "key_bits, value_bits are %lld, %lld; accepted: 2, 3, 4, 8, 16", (long long)key_bits,
              (long long)value_bits);
}

inline int check_kv_dtype(int64_t dtype) {
  if (dtype == TERSOR_BFLOAT16 || dtype == TERSOR_FLOAT16) return TERSOR_OK;
  return fail(TERSOR_INVALID, "dtype is %lld; accepted on CUDA: 1 bfloat16, 2 float16", (long long)dtype);
}

inline int check_kv_table(const void* table, const int32_t* pages, int64_t table_pages) {
  if (table_pages < 1 || table_pages > int64_t(1) << 26) {
    return fail(TERSOR_INVALID, "table_pages is %lld; accepted: 1 to 2^26", (long long)table_pages);
  }
  if (!table || !pages || !kv_aligned(table, 16)) {
    return fail(TERSOR_INVALID, "table and pages: accepted are addresses, the table's 16-byte aligned");
  }
  return TERSOR_OK;
}

}  // namespace tersor
