// The part of tersor._C for the compressed cache on CUDA (cuda/tersor_kv.h). Pointers are integers, 0 for absent;
// `stream` is a cudaStream_t as an integer, and nothing here waits for it. No logic here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "tersor.h"
#include "tersor_kv.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using Strides = std::array<int64_t, 3>;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(int status) {
  if (status == TERSOR_OK) return;
  if (status == TERSOR_CUDA_ERROR) throw std::runtime_error(tersor_last_error());
  throw py::value_error(tersor_last_error());
}

// A struct of int64 and pointers from its fields.
template <class T>
T fields(const std::vector<int64_t>& numbers) {
  T made{};
  if (numbers.size() * sizeof(int64_t) != sizeof(T)) throw py::value_error("found another number of fields");
  std::memcpy(&made, numbers.data(), sizeof(T));
  return made;
}

}  // namespace

void define_kv_cuda(py::module_& module) {
  module.def(
      "cuda_kv_append",
      [](Address table, Address pages, int64_t batch, int64_t table_pages, int64_t kv_heads, int64_t head_dim,
         Address keys, Address values, int64_t tokens, const Strides& k, const Strides& v, Address stream) {
        check(tersor_cuda_kv_append(pointer(table), pointer<const int32_t>(pages), batch, table_pages, kv_heads,
                                    head_dim, pointer(keys), pointer(values), tokens, k[0], k[1], k[2], v[0], v[1],
                                    v[2], pointer(stream)));
      },
      py::arg("table"), py::arg("pages"), py::arg("batch"), py::arg("table_pages"), py::arg("kv_heads"),
      py::arg("head_dim"), py::arg("keys"), py::arg("values"), py::arg("tokens"), py::arg("key_strides"),
      py::arg("value_strides"), py::arg("stream"), "the last `tokens` tokens of each sequence to their raw pages");
  module.def(
      "cuda_kv_pack",
      [](Address jobs, int64_t count, int64_t kv_heads, int64_t head_dim, int dtype, int64_t key_bits,
         int64_t value_bits, Address stream) {
        check(tersor_cuda_kv_pack(pointer<const int64_t>(jobs), count, kv_heads, head_dim, dtype, key_bits, value_bits,
                                  pointer(stream)));
      },
      py::arg("jobs"), py::arg("count"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("dtype"),
      py::arg("key_bits"), py::arg("value_bits"), py::arg("stream"), "packs full raw pages");
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
      [](const std::vector<int64_t>& cache, const std::vector<int64_t>& query, float scale, float softcap,
         Address stream) {
        const auto c = fields<tersor_cuda_kv_cache>(cache);
        const auto q = fields<tersor_cuda_kv_query>(query);
        check(tersor_cuda_kv_attention(&c, &q, scale, softcap, pointer(stream)));
      },
      py::arg("cache"), py::arg("query"), py::arg("scale"), py::arg("softcap"), py::arg("stream"),
      "attention over a paged cache on a GPU; cache, query: the fields of the structs of cuda/tersor_kv.h in order");
}
