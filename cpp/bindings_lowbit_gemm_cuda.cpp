// The part of tersor._C for products of low-bit activations on CUDA (tersor.h). Pointers are integers, 0 for absent;
// `stream` is a cudaStream_t as an integer, and nothing here waits for it. No logic here.
#include <pybind11/pybind11.h>

#include "bindings_forward.h"
#include "tersor.h"

namespace py = pybind11;

void define_lowbit_gemm_cuda(py::module_& module) {
  module.def(
      "cuda_lowbit_linear_plan", planned(tersor_cuda_lowbit_linear_plan), py::arg("m"), py::arg("n"), py::arg("k"),
      py::arg("bits"), py::arg("group_size"), py::arg("scale_dtype"), py::arg("has_zero_points"), py::arg("act_group"),
      py::arg("act_has_zero_points"), py::arg("width"), py::arg("multiprocessors"),
      py::arg("shared_memory_per_multiprocessor"),
      "(ranges, bytes of partials, bytes of counters) for cuda_lowbit_linear on a device");
  module.def(
      "cuda_lowbit_linear", forwarded(tersor_cuda_lowbit_linear), py::arg("codes"), py::arg("width"),
      py::arg("row_bytes"), py::arg("act_scales"), py::arg("act_scale_stride"), py::arg("sums"),
      py::arg("act_zero_points"), py::arg("stage_starts"), py::arg("row_cost"), py::arg("act_group"), py::arg("m"),
      py::arg("k"), py::arg("qweight"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zero_points"),
      py::arg("bias"), py::arg("residual"), py::arg("ldr"), py::arg("y"), py::arg("y_dtype"), py::arg("n"),
      py::arg("ldy"), py::arg("bits"), py::arg("group_size"), py::arg("ranges"), py::arg("partials"),
      py::arg("counters"), py::arg("stream"), "integer product of low-bit activations and integer weights on a GPU");
  module.def(
      "cuda_lowbit_linear_grouped_plan", planned(tersor_cuda_lowbit_linear_grouped_plan), py::arg("rows"), py::arg("n"),
      py::arg("k"), py::arg("bits"), py::arg("group_size"), py::arg("scale_dtype"), py::arg("has_zero_points"),
      py::arg("act_group"), py::arg("act_has_zero_points"), py::arg("experts"), py::arg("multiprocessors"),
      py::arg("shared_memory_per_multiprocessor"),
      "(ranges, bytes of partials, bytes of counters) for cuda_lowbit_linear_grouped on a device");
  module.def(
      "cuda_lowbit_linear_grouped", forwarded(tersor_cuda_lowbit_linear_grouped), py::arg("codes"),
      py::arg("row_bytes"), py::arg("act_scales"), py::arg("act_scale_stride"), py::arg("sums"),
      py::arg("act_zero_points"), py::arg("act_group"), py::arg("rows"), py::arg("k"), py::arg("ends"),
      py::arg("experts"), py::arg("qweight"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zero_points"),
      py::arg("bias"), py::arg("y"), py::arg("y_dtype"), py::arg("n"), py::arg("ldy"), py::arg("bits"),
      py::arg("group_size"), py::arg("ranges"), py::arg("partials"), py::arg("counters"), py::arg("stream"),
      "cuda_lowbit_linear for rows sorted by expert, each with its expert's weight");
}
