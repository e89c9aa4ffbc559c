// What the kernel that advances a static cache (kv_advance.cu) and its launcher (dispatch/kv_advance.cu) agree on.
#pragma once

#include <cstdint>

#include "tile/kv_layout.h"

namespace tersor {

struct KvAdvanceArguments {
  KvPage* table;    // [batch, table_pages]
  int32_t* pages;   // [batch]
  int32_t* state;   // [batch, 2]: tokens, steps that did not fit
  int64_t* jobs;    // [batch, job_pages, 2]
  int64_t sinks, raw, packed;           // addresses of [batch, pages, bytes]
  int64_t raw_bytes, packed_bytes;      // of a page of one sequence
  int table_pages, job_pages, sink_pages, raw_pages, packed_pages;
  int tokens, recent, most, max_tokens;
  uint8_t key_bits, value_bits, format;
};

using KvAdvanceKernel = void(KvAdvanceArguments);
extern KvAdvanceKernel* kv_advance_kernel;

}  // namespace tersor
