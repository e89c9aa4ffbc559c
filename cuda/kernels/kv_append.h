// What the kernel that appends to a paged cache (kv_append.cu) and its launcher (dispatch/kv_append.cu) agree on.
#pragma once

#include <cstdint>

#include "tile/kv_layout.h"

namespace tersor {

constexpr int kKvAppendWarps = 4;

struct KvAppendArguments {
  const KvPage* table;   // [batch, table_pages]
  const int32_t* pages;  // [batch]
  const void *keys, *values;  // [batch, kv_heads, tokens, dim], 16 bits
  const float* bias;          // [batch, kv_heads, tokens], or null: 0
  int64_t key_strides[3], value_strides[3];
  int tokens, kv_heads, dim, table_pages, biased;
  KvRotary rotary;
};

using KvAppendKernel = void(KvAppendArguments);
extern KvAppendKernel* kv_append_kernel;

}  // namespace tersor
