// What the launchers of the compressed cache check alike.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/status.h"
#include "tersor.h"
#include "tersor_kv.h"
#include "tile/kv_stream.h"

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

// Of a cache whose packed keys are turned back, as kernels have it.
inline int read_kv_rotary(const tersor_cuda_kv_cache& c, KvRotary* rotary) {
  if (c.rotary_dim < 0 || c.rotary_dim > c.head_dim || c.rotary_dim % 4 != 0) {
    return fail(TERSOR_INVALID, "rotary_dim is %lld; accepted on CUDA: multiples of 4 to head_dim = %lld",
                (long long)c.rotary_dim, (long long)c.head_dim);
  }
  if (c.rotary_dim > 0 && !kv_turns_keys(static_cast<int>(c.head_dim))) {
    return fail(TERSOR_INVALID, "rotary_dim is %lld; accepted on CUDA: 0 where head_dim is %lld",
                (long long)c.rotary_dim, (long long)c.head_dim);
  }
  if (c.rotary_dim > 0 && (!c.rotary || !kv_aligned(c.rotary, 16))) {
    return fail(TERSOR_INVALID, "rotary: accepted is a 16-byte aligned address");
  }
  *rotary = {c.rotary, static_cast<int>(c.rotary_dim / 2), c.rotary_dim > 0 && !c.rotary_interleaved};
  return TERSOR_OK;
}

// A launch's formats as kernels have them; the first, of plain pages, is all zeros.
inline int read_kv_formats(const tersor_cuda_kv_cache& c, KvFormat (&formats)[kKvFormats]) {
  if (c.formats < 0 || c.formats >= kKvFormats || (c.formats > 0 && !c.format)) {
    return fail(TERSOR_INVALID, "formats is %lld; accepted on CUDA: 0 to %d", (long long)c.formats, kKvFormats - 1);
  }
  const int dim = static_cast<int>(c.head_dim);
  for (int i = 0; i < kKvFormats; ++i) {
    formats[i] = KvFormat{};
    formats[i].value_begins = static_cast<uint16_t>(kv_value_begins(dim, 0));
  }
  for (int i = 0; i < c.formats; ++i) {
    const tersor_cuda_kv_format& from = c.format[i];
    KvFormat& f = formats[i + 1];
    const auto coding_exists = [](int64_t coding) { return coding >= 0 && coding <= kKvE4M3; };
    if (!coding_exists(from.key_coding) || !coding_exists(from.value_coding)) {
      return fail(TERSOR_INVALID, "format %d: codings are %lld, %lld; accepted: 0, 1, 2", i + 1,
                  (long long)from.key_coding, (long long)from.value_coding);
    }
    if (from.key_outliers < 0 || from.key_outliers > kv_most_key_outliers(dim) || from.value_outliers < 0 ||
        from.value_outliers > kv_most_value_outliers(dim)) {
      return fail(TERSOR_INVALID, "format %d: outliers of a page and head are %lld, %lld; accepted on CUDA: to %d, %d",
                  i + 1, (long long)from.key_outliers, (long long)from.value_outliers, kv_most_key_outliers(dim),
                  kv_most_value_outliers(dim));
    }
    f.key_coding = static_cast<uint8_t>(from.key_coding);
    f.value_coding = static_cast<uint8_t>(from.value_coding);
    const int all = dim / kKvRecordChannels, least = kv_least_group_records(dim);
    if (from.key_axis < 0 || from.key_axis > 2) {
      return fail(TERSOR_INVALID, "format %d: key_axis is %lld; accepted: 0, 1, 2", i + 1, (long long)from.key_axis);
    }
    if (from.value_records < 0 || from.value_records > all ||
        (from.value_records > 0 && (all % from.value_records != 0 || from.value_records % least != 0))) {
      return fail(TERSOR_INVALID, "format %d: value_records is %lld; accepted: 0, and multiples of %d that divide %d",
                  i + 1, (long long)from.value_records, least, all);
    }
    if (from.key_axis == 2 && !kv_halves_keys(dim)) {
      return fail(TERSOR_INVALID, "format %d: key_axis is 2; accepted on CUDA where head_dim is %d: 0, 1", i + 1, dim);
    }
    f.key_token = from.key_axis == 1;
    f.key_halves = from.key_axis == 2;
    f.separable = from.separable != 0;
    f.value_records = static_cast<uint8_t>(f.separable ? all : from.value_records);
    f.value_begins = static_cast<uint16_t>(kv_value_begins(dim, f.value_records));
    f.key_outliers = static_cast<uint16_t>(from.key_outliers);
    f.value_outliers = static_cast<uint16_t>(from.value_outliers);
    std::memcpy(f.key_levels, from.key_levels, 16);
    std::memcpy(f.value_levels, from.value_levels, 16);
  }
  return TERSOR_OK;
}

// Codings that the bits of a page's parts can have, and groups of values that units of the stream can.
inline int check_kv_codings(const KvFormat& f, int64_t head_dim, int64_t key_bits, int64_t value_bits) {
  if (head_dim == 96 && value_bits == 8 && f.value_records == 3) {
    return fail(TERSOR_INVALID, "value_records is 3 of 8 bits in 96 channels; accepted on CUDA: 0 and 6");
  }
  const auto fits = [](int coding, int64_t bits) {
    return coding == kKvUniform || (coding == kKvLevels ? bits <= 4 : bits == 8);
  };
  if (fits(f.key_coding, key_bits) && fits(f.value_coding, value_bits)) return TERSOR_OK;
  return fail(TERSOR_INVALID, "codings %d, %d of %lld, %lld bits; accepted: levels of 2 to 4 bits, E4M3 of 8",
              f.key_coding, f.value_coding, (long long)key_bits, (long long)value_bits);
}

}  // namespace tersor
