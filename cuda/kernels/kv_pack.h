// What the kernel that packs pages of a cache (kv_pack.cu) and its launcher (dispatch/kv_append.cu) agree on.
#pragma once

#include <cstdint>

#include "tile/kv_layout.h"

namespace tersor {

constexpr int kKvPackWarps = 4;

// Shared memory of pages of formats: two choosers (tile/kv_choose.h), a bit for each number of keys and of
// values, levels of both.
constexpr int kKvTakenBytes = 64 * 256 / 8;
constexpr int kKvPackShared = 2 * 12 * 512 + 2 * kKvTakenBytes + 2 * 128;

struct KvPackArguments {
  const int64_t* jobs;  // [count, 2]: addresses of a raw page and of its packed one
  int dim, key_bits, value_bits, is_bfloat16, biased;
  KvFormat format;
  KvRotary rotary;
};

using KvPackKernel = void(KvPackArguments);
extern KvPackKernel *kv_pack_kernel, *kv_pack_formats_kernel;  // for plain pages, and for all others

}  // namespace tersor
