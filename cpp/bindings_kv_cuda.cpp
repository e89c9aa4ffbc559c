// The part of tersor._C for the compressed cache on CUDA (cuda/tersor_kv.h). Pointers are integers, 0 for absent;
// `stream` is a cudaStream_t as an integer, and nothing here waits for it; structs are lists of their fields in order.
// No logic here.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "bindings_forward.h"
#include "tersor.h"
#include "tersor_kv.h"
#include "tersor_kv_static.h"

namespace py = pybind11;

namespace {

// The cache with its formats, one after another, which live as long as `formats`.
tersor_cuda_kv_cache with_formats(const Numbers& cache, const Numbers& formats) {
  auto made = fields<tersor_cuda_kv_cache>(cache);
  if (formats.size() * sizeof(int64_t) != made.formats * sizeof(tersor_cuda_kv_format)) {
    throw py::value_error("found another number of formats");
  }
  made.format = reinterpret_cast<const tersor_cuda_kv_format*>(formats.data());
  return made;
}

}  // namespace

void define_kv_cuda(py::module_& module) {
  module.def(
      "cuda_kv_append",
      [](const Numbers& cache, const Numbers& tokens, Address stream) {
        const auto c = fields<tersor_cuda_kv_cache>(cache);
        const auto t = fields<tersor_cuda_kv_tokens>(tokens);
        check(tersor_cuda_kv_append(&c, &t, pointer(stream)));
      },
      py::arg("cache"), py::arg("tokens"), py::arg("stream"),
      "the last tokens of each sequence to their raw pages; fields of structs in order");
  module.def(
      "cuda_kv_pack",
      [](const Numbers& cache, const Numbers& formats, int64_t format, int64_t key_bits, int64_t value_bits,
         Address jobs, int64_t count, Address stream) {
        const auto c = with_formats(cache, formats);
        check(tersor_cuda_kv_pack(&c, format, key_bits, value_bits, pointer<const int64_t>(jobs), count,
                                  pointer(stream)));
      },
      py::arg("cache"), py::arg("formats"), py::arg("format"), py::arg("key_bits"), py::arg("value_bits"),
      py::arg("jobs"), py::arg("count"), py::arg("stream"), "packs full raw pages");
  module.def(
      "cuda_kv_attention_plan",
      [](int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t queries, int64_t pages,
         int multiprocessors, int64_t shared_memory_per_multiprocessor) {
        int64_t splits = 0, partial_bytes = 0, counter_bytes = 0;
        check(tersor_cuda_kv_attention_plan(batch, heads, kv_heads, head_dim, queries, pages, multiprocessors,
                                            shared_memory_per_multiprocessor, &splits));
        check(tersor_cuda_kv_attention_workspace(batch, heads, kv_heads, head_dim, queries, splits, &partial_bytes,
                                                 &counter_bytes));
        return py::make_tuple(splits, partial_bytes, counter_bytes);
      },
      py::arg("batch"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("queries"),
      py::arg("pages"), py::arg("multiprocessors"), py::arg("shared_memory_per_multiprocessor"),
      "(splits, bytes of partials, bytes of counters) for cuda_kv_attention on a device");
  module.def(
      "cuda_kv_attention",
      [](const Numbers& cache, const Numbers& formats, const Numbers& query, float scale, float softcap,
         Address stream) {
        const auto c = with_formats(cache, formats);
        const auto q = fields<tersor_cuda_kv_query>(query);
        check(tersor_cuda_kv_attention(&c, &q, scale, softcap, pointer(stream)));
      },
      py::arg("cache"), py::arg("formats"), py::arg("query"), py::arg("scale"), py::arg("softcap"), py::arg("stream"),
      "attention over a paged cache on a GPU; cache, query: fields of structs in order");
  module.def(
      "cuda_kv_mass",
      [](const Numbers& cache, const Numbers& formats, const Numbers& query, float scale, float softcap, Address mass,
         int64_t tokens, Address stream) {
        const auto c = with_formats(cache, formats);
        const auto q = fields<tersor_cuda_kv_query>(query);
        check(tersor_cuda_kv_mass(&c, &q, scale, softcap, pointer<float>(mass), tokens, pointer(stream)));
      },
      py::arg("cache"), py::arg("formats"), py::arg("query"), py::arg("scale"), py::arg("softcap"), py::arg("mass"),
      py::arg("tokens"), py::arg("stream"), "attention mass of each token, added to zeros");
  module.def(
      "cuda_kv_advance",
      [](const Numbers& cache, int64_t tokens, Address stream) {
        const auto c = fields<tersor_cuda_kv_static>(cache);
        check(tersor_cuda_kv_advance(&c, tokens, pointer(stream)));
      },
      py::arg("cache"), py::arg("tokens"), py::arg("stream"), "counts a step's tokens in a static cache's table");
}
