// tersor_kv_*: checks what can be checked from sizes, then hands over to the instruction set.
#include "common/status.h"
#include "cpu/isa.h"
#include "cpu/kv_layout.h"

using namespace tersor;

namespace {

bool is_bits(int64_t bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16; }
bool is_dim(int64_t dim) { return dim >= 16 && dim <= 1024 && dim % 16 == 0; }

// Of keys or values of one format.
int check_part(const char* part, int64_t dim, int64_t tokens, int64_t bits, int64_t group, int64_t coding,
               const int8_t* levels, int64_t outliers) {
  if (!is_bits(bits)) return fail(TERSOR_INVALID, "%s_bits is %lld; accepted: 2, 3, 4, 8, 16", part, (long long)bits);
  if (group && (group < 16 || group % 16 || dim % group)) {
    return fail(TERSOR_INVALID, "%s_group is %lld; accepted: multiples of 16 that divide %s_dim = %lld", part,
                (long long)group, part, (long long)dim);
  }
  const bool accepted = coding == TERSOR_KV_UNIFORM || (coding == TERSOR_KV_LEVELS && bits <= 4 && levels) ||
                        (coding == TERSOR_KV_E4M3 && bits == 8);
  if (!accepted) {
    return fail(TERSOR_INVALID, "%s_coding is %lld of %lld bits; accepted: 0, 1 with levels for 2 to 4 bits, 2 for 8 "
                "bits", part, (long long)coding, (long long)bits);
  }
  for (int64_t i = 0; coding == TERSOR_KV_LEVELS && i + 1 < 1 << bits; ++i) {
    if (levels[i] >= levels[i + 1]) return fail(TERSOR_INVALID, "%s_levels do not ascend", part);
  }
  if (outliers < 0 || outliers > 8192 || (outliers && (bits == 16 || tokens * dim > 65536))) {
    return fail(TERSOR_INVALID, "%s_outliers is %lld; accepted: 0 to 8192 of at most 65536 packed numbers", part,
                (long long)outliers);
  }
  return TERSOR_OK;
}

int check_format(const tersor_kv& kv, const tersor_kv_format& f) {
  if (const int status = check_part("key", kv.key_dim, kv.page_tokens, f.key_bits, f.key_group, f.key_coding,
                                    f.key_levels, f.key_outliers)) {
    return status;
  }
  if (!f.value_group || (f.value_separable && f.value_group != kv.value_dim)) {
    return fail(TERSOR_INVALID, "value_group is %lld; accepted: multiples of 16 that divide value_dim = %lld, or that "
                "itself for separable values", (long long)f.value_group, (long long)kv.value_dim);
  }
  if (f.rank < 0 || f.rank > 16) return fail(TERSOR_INVALID, "rank is %lld; accepted: 0 to 16", (long long)f.rank);
  return check_part("value", kv.value_dim, kv.page_tokens, f.value_bits, f.value_group, f.value_coding, f.value_levels,
                    f.value_outliers);
}

int check_layout(const tersor_kv* kv) {
  if (!kv) return fail(TERSOR_INVALID, "kv is absent");
  if (kv->dtype < 0 || kv->dtype > 2) {
    return fail(TERSOR_INVALID, "dtype is %lld; accepted: 0 float32, 1 bfloat16, 2 float16", (long long)kv->dtype);
  }
  if (!is_dim(kv->key_dim) || !is_dim(kv->value_dim)) {
    return fail(TERSOR_INVALID, "key_dim is %lld and value_dim is %lld; accepted: multiples of 16 to 1024",
                (long long)kv->key_dim, (long long)kv->value_dim);
  }
  if (kv->page_tokens < 32 || kv->page_tokens > 256 || kv->page_tokens % 32) {
    return fail(TERSOR_INVALID, "page_tokens is %lld; accepted: multiples of 32 to 256", (long long)kv->page_tokens);
  }
  if (kv->batch < 1 || kv->kv_heads < 1) {
    return fail(TERSOR_INVALID, "batch is %lld and kv_heads is %lld; accepted: 1 or more", (long long)kv->batch,
                (long long)kv->kv_heads);
  }
  if (kv->rotary_dim < 0 || kv->rotary_dim % 2 || kv->rotary_dim > kv->key_dim || (kv->rotary_dim && !kv->rotary)) {
    return fail(TERSOR_INVALID, "rotary_dim is %lld; accepted: even numbers to key_dim = %lld, with a table",
                (long long)kv->rotary_dim, (long long)kv->key_dim);
  }
  if (kv->formats < 0 || kv->formats > 8 || (kv->formats && !kv->format)) {
    return fail(TERSOR_INVALID, "formats is %lld; accepted: 0 to 8", (long long)kv->formats);
  }
  for (int64_t i = 0; i < kv->formats; ++i) {
    if (const int status = check_format(*kv, kv->format[i])) return status;
  }
  return TERSOR_OK;
}

int check_table(const tersor_kv* kv) {
  if (const int status = check_layout(kv)) return status;
  if (kv->pages < 0 || (kv->pages && !kv->table)) {
    return fail(TERSOR_INVALID, "pages is %lld; accepted: 0 or more, with a table", (long long)kv->pages);
  }
  for (int64_t p = 0; p < kv->pages; ++p) {
    const int64_t* row = kv_page(*kv, p);
    if (row[0] < 0 || row[0] > kv->page_tokens || row[1] < 0 || row[1] > kv->formats) {
      return fail(TERSOR_INVALID, "page %lld holds %lld tokens and is of kind %lld; accepted: 0 to %lld, 0 to %lld",
                  (long long)p, (long long)row[0], (long long)row[1], (long long)kv->page_tokens,
                  (long long)kv->formats);
    }
    for (int64_t b = 0; b < kv->batch; ++b) {
      if (!row[2 + b]) return fail(TERSOR_INVALID, "page %lld of sequence %lld is absent", (long long)p, (long long)b);
    }
  }
  return TERSOR_OK;
}

int check_query(const tersor_kv* kv, const tersor_kv_query* query, int threads) {
  if (!query || query->queries < 0 || query->heads < 1 || query->heads % kv->kv_heads) {
    return fail(TERSOR_INVALID, "queries or heads are not accepted: heads are a multiple of kv_heads = %lld",
                (long long)kv->kv_heads);
  }
  if (query->window < 0 || !(query->softcap >= 0)) {
    return fail(TERSOR_INVALID, "window is %lld and softcap is %g; accepted: 0 or more", (long long)query->window,
                query->softcap);
  }
  if (threads < 1) return fail(TERSOR_INVALID, "threads is %d; accepted: 1 or more", threads);
  return TERSOR_OK;
}

int check_append(const tersor_kv* kv, int64_t page, int64_t slot, const tersor_kv_tokens* fresh) {
  if (!fresh || fresh->tokens < 1 || !fresh->keys || !fresh->values) {
    return fail(TERSOR_INVALID, "fresh tokens are absent; accepted: 1 or more");
  }
  if (page < 0 || page >= kv->pages || slot < 0) {
    return fail(TERSOR_INVALID, "page is %lld and slot is %lld; accepted: one of %lld pages", (long long)page,
                (long long)slot, (long long)kv->pages);
  }
  int64_t room = 0, at = slot;
  for (int64_t p = page; p < kv->pages; ++p, at = 0) {
    const int64_t* row = kv_page(*kv, p);
    if (row[0] < at || (row[1] && (at || row[0] != kv->page_tokens))) {
      return fail(TERSOR_INVALID, "page %lld holds %lld tokens and is written from slot %lld; accepted: a raw page, or "
                  "a packed one that is written whole", (long long)p, (long long)row[0], (long long)at);
    }
    room += row[0] - at;
  }
  if (room != fresh->tokens) {
    return fail(TERSOR_INVALID, "the pages from %lld on take %lld tokens; accepted: the %lld fresh ones",
                (long long)page, (long long)room, (long long)fresh->tokens);
  }
  return TERSOR_OK;
}

}  // namespace

extern "C" int64_t tersor_kv_page_bytes(const tersor_kv* kv, int64_t kind) {
  if (check_layout(kv)) return -1;
  if (kind < 0 || kind > kv->formats) {
    fail(TERSOR_INVALID, "kind is %lld; accepted: 0 to %lld", (long long)kind, (long long)kv->formats);
    return -1;
  }
  return kv_offsets(*kv, kind).bytes;
}

extern "C" int tersor_kv_append(const tersor_kv* kv, int64_t page, int64_t slot, const tersor_kv_tokens* fresh,
                                int threads) {
  if (const int status = check_table(kv)) return status;
  if (const int status = check_append(kv, page, slot, fresh)) return status;
  if (threads < 1) return fail(TERSOR_INVALID, "threads is %d; accepted: 1 or more", threads);
  return current_isa().kv_append({kv, page, slot, fresh, threads});
}

extern "C" int tersor_kv_pack(const tersor_kv* kv, int64_t kind, const int64_t* raw, const int64_t* packed,
                              int threads) {
  if (const int status = check_layout(kv)) return status;
  if (kind < 1 || kind > kv->formats) {
    return fail(TERSOR_INVALID, "kind is %lld; accepted: 1 to %lld", (long long)kind, (long long)kv->formats);
  }
  if (!raw || !packed) return fail(TERSOR_INVALID, "raw or packed addresses are absent");
  for (int64_t b = 0; b < kv->batch; ++b) {
    if (!raw[b] || !packed[b]) return fail(TERSOR_INVALID, "the page of sequence %lld is absent", (long long)b);
  }
  if (threads < 1) return fail(TERSOR_INVALID, "threads is %d; accepted: 1 or more", threads);
  return current_isa().kv_pack({kv, kind, raw, packed, threads});
}

extern "C" int tersor_kv_attention(const tersor_kv* kv, const tersor_kv_query* query, int64_t page, int64_t slot,
                                   const tersor_kv_tokens* fresh, int threads) {
  if (const int status = check_table(kv)) return status;
  if (const int status = check_query(kv, query, threads)) return status;
  if (fresh) {
    if (const int status = check_append(kv, page, slot, fresh)) return status;
    if (const int status = current_isa().kv_append({kv, page, slot, fresh, threads})) return status;
  }
  if (query->queries == 0) return TERSOR_OK;
  if (!query->q || !query->out) return fail(TERSOR_INVALID, "q or out is absent");
  return current_isa().kv_attention({kv, query, threads});
}

extern "C" int tersor_kv_mass(const tersor_kv* kv, const tersor_kv_query* query, float* mass, int threads) {
  if (const int status = check_table(kv)) return status;
  if (const int status = check_query(kv, query, threads)) return status;
  if (!query->q || !query->log_sum_exp || !mass) return fail(TERSOR_INVALID, "q, log_sum_exp or mass is absent");
  return current_isa().kv_mass({kv, query, mass, threads});
}
