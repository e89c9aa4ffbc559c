/* The C ABI of a cache whose memory is all there from the start, beside tersor_kv.h: what advances its table on the
 * device, so that a captured step runs again without the host. */
#ifndef TERSOR_KV_STATIC_CUDA_H
#define TERSOR_KV_STATIC_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Sequence b of `batch` has its first sink_pages pages, raw for good, at sinks; a ring of raw_pages at raw and, where
 * key_bits or value_bits is below 16, one of packed_pages at packed: page p after the sinks is raw at place
 * (p - sink_pages) % raw_pages, packed at (p - sink_pages) % packed_pages. Regions are [batch, pages, raw_bytes or
 * packed_bytes]. table and pages are those of a tersor_cuda_kv_cache with table_pages entries a sequence; format is
 * that of packed entries.
 *
 * state [batch, 2]: tokens of each sequence, and how many steps did not fit. A full page is packed once `recent` tokens
 * follow it. A step has at most `most` tokens, a sequence max_tokens. jobs [batch, job_pages, 2] are for kv_pack;
 * job_pages is at least most / 64, rounded up. */
typedef struct tersor_cuda_kv_static {
  void* table;
  int32_t *pages, *state;
  int64_t* jobs;
  void *sinks, *raw, *packed;
  int64_t batch, table_pages, job_pages, sink_pages, raw_pages, packed_pages, raw_bytes, packed_bytes;
  int64_t key_bits, value_bits, format, recent, most, max_tokens;
} tersor_cuda_kv_static;

/* Counts `tokens` fresh tokens of each sequence, which kv_append writes next and kv_attention reads: pages that were
 * old enough before are read packed from now on, and pages that are now become jobs for kv_pack after attention (0, 0:
 * none). A sequence that would have more than max_tokens stays as it is and counts the step as one that did not fit.
 * With 0 tokens, the table follows a state that was lowered, as long as no page has taken the place of one that is raw
 * then. */
int tersor_cuda_kv_advance(const tersor_cuda_kv_static* cache, int64_t tokens, void* stream);

#ifdef __cplusplus
}
#endif
#endif
