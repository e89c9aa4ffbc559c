// Fresh keys and values to the raw pages of a paged cache, in the order of tile/kv_layout.h.
//
//   A warp takes one token of one sequence and head: it finds the token's page, then each lane moves four channels at a
//   time. Four channels of a key are one 8-byte piece of the page; the values of a channel lie beside those of other
//   tokens, so they are stored 2 bytes at a time.
//
//   The table already counts the fresh tokens: they are the last `tokens` of each sequence. Pages hold at most 64, so a
//   token's page is not past the one that full pages would give, and mostly that one: entries are read 32 at once from
//   there backwards.
//
//   Pages of a biased cache hold a float32 for each token behind the keys, which a lane stores.
//
//   No shared memory. Limits: the 2-byte stores, a sector each, make long prompts cost some 16 times their bytes of
//   values in L2; tokens whose page is packed are left out.
//
// gate: registers 64
// gate: wants LDG.E.64.CONSTANT STG.E.64 STG.E.U16
#include "kernels/kv_append.h"

#include "ptx/math.h"
#include "ptx/ptx.h"
#include "tile/kv_codes.h"

namespace tersor {
namespace {

__global__ void __launch_bounds__(32 * kKvAppendWarps) kv_append(const KvAppendArguments a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int sequence = blockIdx.z, head = blockIdx.y;
  const int token = blockIdx.x * kKvAppendWarps + warp;
  if (token >= a.tokens) return;
  const KvPage* table = a.table + int64_t(sequence) * a.table_pages;
  const int pages = ptx::load_global_constant(a.pages + sequence);
  if (pages <= 0) return;
  const KvPage last = ptx::load_global_constant(table + pages - 1);
  const int behind = a.tokens - 1 - token;  // tokens that follow it in its sequence
  const int position = last.position + last.tokens - 1 - behind;

  // Lane 0 has the page that full pages would give, lane 31 the one 31 before.
  KvPage page = {};
  int before = behind / kKvTokens;
  bool found = false;
  for (; !found && before < pages; before += 32) {
    const int entry = pages - 1 - before - lane;
    KvPage mine = {};
    if (entry >= 0) mine = ptx::load_global_constant(table + entry);
    const bool holds = entry >= 0 && mine.position <= position && position < mine.position + mine.tokens;
    const uint32_t lanes = ptx::ballot(holds);
    found = lanes != 0;
    const int from = found ? ptx::count_bits((lanes & (0u - lanes)) - 1) : 0;
    page.address = ptx::shuffle(mine.address, from);
    page.position = ptx::shuffle(mine.position, from);
    const uint32_t bits = ptx::shuffle(uint32_t(mine.key_bits) | uint32_t(mine.value_bits) << 8, from);
    page.key_bits = uint8_t(bits);
    page.value_bits = uint8_t(bits >> 8);
  }
  if (!found || page.key_bits != 16 || page.value_bits != 16) return;

  ptx::region("store");
  const int slot = position - page.position;
  char* keys = reinterpret_cast<char*>(page.address) + int64_t(head) * kv_page_bytes(a.dim, 16, 16, {}, a.biased);
  char* values = keys + kv_values_at(a.dim, 16, {}, a.biased);
  if (a.biased && lane == 0) {
    const int64_t at = (int64_t(sequence) * a.kv_heads + head) * a.tokens + token;
    const float bias = a.bias != nullptr ? ptx::load_global_constant(a.bias + at) : 0.0f;
    ptx::store_global(reinterpret_cast<float*>(keys + kv_key_bytes(a.dim, 16)) + slot, bias);
  }
  const auto row = [&](const void* numbers, const int64_t (&strides)[3]) {
    return static_cast<const uint16_t*>(numbers) + sequence * strides[0] + head * strides[1] + token * strides[2];
  };
  using Two = ptx::Vec<uint32_t, 2>;
  const uint16_t *key = row(a.keys, a.key_strides), *value = row(a.values, a.value_strides);
  for (int channel = 4 * lane; channel < a.dim; channel += 128) {
    const Two k = kv_load_four(key, channel, a.rotary.halves ? a.rotary.pairs : 0);
    const Two v = ptx::load_global_constant(reinterpret_cast<const Two*>(value + channel));
    ptx::store_global(reinterpret_cast<Two*>(keys + kv_raw_key_offset(slot, channel)), k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::store_global(reinterpret_cast<uint16_t*>(values + kv_raw_value_offset(slot, channel + i)),
                        uint16_t(v[i / 2] >> (16 * (i % 2))));
    }
  }
}

const bool entered = (kv_append_kernel = kv_append, true);

}  // namespace
}  // namespace tersor
