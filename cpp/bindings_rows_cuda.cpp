// The part of tersor._C that rounds activations on CUDA (cuda/tersor_rows.h). Pointers are integers, 0 for absent;
// `stream` is a cudaStream_t as an integer, and nothing here waits for it; structs are lists of their fields in order.
// No logic here.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "bindings_forward.h"
#include "tersor.h"
#include "tersor_rows.h"

namespace py = pybind11;

void define_rows_cuda(py::module_& module) {
  module.def(
      "cuda_round_rows_shared",
      [](const Numbers& rows, const Numbers& codes) {
        const auto r = fields<tersor_cuda_rows>(rows);
        const auto c = fields<tersor_cuda_codes>(codes);
        return tersor_cuda_round_rows_shared(&r, &c);
      },
      py::arg("rows"), py::arg("codes"), "bytes of shared memory that cuda_round_rows takes; -1 where it refuses");
  module.def(
      "cuda_round_rows",
      [](const Numbers& rows, const Numbers& codes, float clip, float epsilon, float factor, int64_t most_shared,
         Address stream) {
        const auto r = fields<tersor_cuda_rows>(rows);
        const auto c = fields<tersor_cuda_codes>(codes);
        check(tersor_cuda_round_rows(&r, &c, clip, epsilon, factor, most_shared, pointer(stream)));
      },
      py::arg("rows"), py::arg("codes"), py::arg("clip"), py::arg("epsilon"), py::arg("factor"),
      py::arg("most_shared"), py::arg("stream"), "activations to codes and scales, through the steps of rows");
}
