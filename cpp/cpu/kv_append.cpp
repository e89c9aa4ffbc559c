// Writing a cache: fresh tokens into raw pages, token by token, or whole pages of them into packed ones.
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/kv_pack.h"

namespace tersor::TERSOR_ISA {
namespace {

// Tokens [begin, end) of a sequence's head into slots from `slot` on.
template <class Word>
void write_raw(const tersor_kv& kv, const tersor_kv_tokens& fresh, int64_t sequence, int64_t head, int64_t begin,
               int64_t end, int64_t slot, char* page, const KvOffsets& at) {
  const int64_t* ks = fresh.key_strides;
  const int64_t* vs = fresh.value_strides;
  const Word* keys = static_cast<const Word*>(fresh.keys) + sequence * ks[0] + head * ks[1];
  const Word* values = static_cast<const Word*>(fresh.values) + sequence * vs[0] + head * vs[1];
  Word* to_keys = reinterpret_cast<Word*>(page);
  Word* to_values = reinterpret_cast<Word*>(page + at.values);
  if (kv.biased) {
    float* bias = reinterpret_cast<float*>(page + at.bias) + slot;
    if (fresh.bias) {
      std::memcpy(bias, fresh.bias + (sequence * kv.kv_heads + head) * fresh.tokens + begin,
                  (end - begin) * sizeof(float));
    } else {
      std::memset(bias, 0, (end - begin) * sizeof(float));
    }
  }
  for (int64_t t = begin; t < end; ++t, ++slot) {
    Word* column = to_keys + slot / 16 * kv.key_dim * 16 + slot % 16;
    for (int64_t d = 0; d < kv.key_dim; ++d) column[d * 16] = keys[t * ks[2] + d];
    std::memcpy(to_values + slot * kv.value_dim, values + t * vs[2], kv.value_dim * sizeof(Word));
  }
}

}  // namespace

int kv_append(const KvAppendArgs& args) {
  const tersor_kv& kv = *args.kv;
  const tersor_kv_tokens& fresh = *args.fresh;
  const int64_t heads = kv.batch * kv.kv_heads;
  const int workers = kv_useful_threads(heads * fresh.tokens * (kv.key_dim + kv.value_dim), args.threads);
  bool packs = false;
  int64_t last = args.page;
  for (int64_t left = fresh.tokens, slot = args.slot; left > 0; ++last, slot = 0) {
    packs = packs || kv_page(kv, last)[1];
    left -= kv_page(kv, last)[0] - slot;
  }
  const KvOffsets raw = kv_offsets(kv, 0);
  bool failed[256] = {};
  parallel_for(workers, [&](int index) {
    Scratch memory;
    PackScratch scratch;
    if (packs && !scratch.allocate(kv, memory)) {
      failed[index] = true;
      return;
    }
    const Range mine = split(heads, workers, index);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t sequence = i / kv.kv_heads, head = i % kv.kv_heads;
      int64_t done = 0, slot = args.slot;
      for (int64_t p = args.page; p < last; ++p, slot = 0) {
        const int64_t* row = kv_page(kv, p);
        const int64_t count = row[0] - slot;
        char* page = kv_address(row, sequence) + head * (row[1] ? kv_offsets(kv, row[1]) : raw).bytes;
        char* target = row[1] ? scratch.raw : page;
        if (kv.dtype == TERSOR_FLOAT32) {
          write_raw<uint32_t>(kv, fresh, sequence, head, done, done + count, slot, target, raw);
        } else {
          write_raw<uint16_t>(kv, fresh, sequence, head, done, done + count, slot, target, raw);
        }
        if (row[1]) kv_pack_page(kv, row[1], scratch.raw, page, scratch);
        done += count;
      }
    }
  });
  for (int i = 0; i < workers; ++i) {
    if (failed[i]) return fail(TERSOR_NO_MEMORY, "no memory to pack a page of the cache");
  }
  return TERSOR_OK;
}

}  // namespace tersor::TERSOR_ISA
