// The part of tersor._C for small floats on CUDA (cuda/tersor_float.h). Pointers are integers, 0 for absent; `stream`
// is a cudaStream_t as an integer, and nothing here waits for it. No logic here.
#include <pybind11/pybind11.h>

#include "bindings_forward.h"
#include "tersor.h"
#include "tersor_float.h"

namespace py = pybind11;

void define_float_cuda(py::module_& module) {
  module.def(
      "cuda_float_linear_plan", planned(tersor_cuda_float_linear_plan), py::arg("m"), py::arg("n"), py::arg("k"),
      py::arg("element"), py::arg("scale_kind"), py::arg("multiprocessors"),
      py::arg("shared_memory_per_multiprocessor"), "(ranges, bytes of partials, bytes of counters) on a device");
  module.def(
      "cuda_float_linear", forwarded(tersor_cuda_float_linear), py::arg("x"), py::arg("x_dtype"), py::arg("m"),
      py::arg("k"), py::arg("ldx"), py::arg("codes"), py::arg("element"), py::arg("scales"), py::arg("scale_kind"),
      py::arg("scale_rows"), py::arg("group"), py::arg("global_scale"), py::arg("bias"), py::arg("y"), py::arg("n"),
      py::arg("ldy"), py::arg("ranges"), py::arg("partials"), py::arg("counters"), py::arg("stream"),
      "y[m, n] = x[m, k] @ (values * scales)^T + bias on a GPU; see cuda/tersor_float.h");
  module.def(
      "cuda_fp8_rows", forwarded(tersor_cuda_fp8_rows), py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"),
      py::arg("ldx"), py::arg("top"), py::arg("groups"), py::arg("interleaved"), py::arg("codes"), py::arg("scales"),
      py::arg("values"), py::arg("stream"), "rows rounded to e4m3 on a GPU");
  module.def(
      "cuda_fp8_linear_plan", planned(tersor_cuda_fp8_linear_plan), py::arg("m"), py::arg("n"), py::arg("k"),
      py::arg("weight"), py::arg("multiprocessors"), py::arg("shared_memory_per_multiprocessor"),
      "(ranges, bytes of partials, bytes of counters) on a device");
  module.def(
      "cuda_fp8_linear", forwarded(tersor_cuda_fp8_linear), py::arg("x"), py::arg("x_scales"), py::arg("x_groups"),
      py::arg("m"), py::arg("k"), py::arg("codes"), py::arg("weight"), py::arg("scales"), py::arg("scale_dtype"),
      py::arg("scale_multiplier"), py::arg("scale_rows"), py::arg("group"), py::arg("bias"), py::arg("y_dtype"),
      py::arg("y"), py::arg("n"), py::arg("ldy"), py::arg("ranges"), py::arg("partials"), py::arg("counters"),
      py::arg("stream"), "e4m3 rows times 4-bit integers or e4m3 on a GPU; see cuda/tersor_float.h");
  module.def(
      "cuda_block_rows", forwarded(tersor_cuda_block_rows), py::arg("x"), py::arg("x_dtype"), py::arg("m"),
      py::arg("k"), py::arg("ldx"), py::arg("kind"), py::arg("global_scale"), py::arg("codes"), py::arg("scales"),
      py::arg("values"), py::arg("stream"), "rows rounded to MXFP4, NVFP4, MXFP8 or MXFP6 on a GPU");
  module.def(
      "cuda_fp4_linear_plan", planned(tersor_cuda_fp4_linear_plan), py::arg("m"), py::arg("n"), py::arg("k"),
      py::arg("kind"), py::arg("multiprocessors"), py::arg("shared_memory_per_multiprocessor"),
      "(ranges, bytes of partials, bytes of counters) on a device");
  module.def(
      "cuda_fp4_linear", forwarded(tersor_cuda_fp4_linear), py::arg("x"), py::arg("x_scales"), py::arg("x_global"),
      py::arg("m"), py::arg("k"), py::arg("codes"), py::arg("scales"), py::arg("global_scale"), py::arg("kind"),
      py::arg("bias"), py::arg("y_dtype"), py::arg("y"), py::arg("n"), py::arg("ldy"), py::arg("ranges"),
      py::arg("partials"), py::arg("counters"), py::arg("stream"),
      "MXFP4 or NVFP4 rows times weights of the same kind on a GPU; see cuda/tersor_float.h");
  module.def(
      "cuda_mx_linear_plan", planned(tersor_cuda_mx_linear_plan), py::arg("m"), py::arg("n"), py::arg("k"),
      py::arg("weight"), py::arg("multiprocessors"), py::arg("shared_memory_per_multiprocessor"),
      "(ranges, bytes of partials, bytes of counters) on a device");
  module.def(
      "cuda_mx_linear", forwarded(tersor_cuda_mx_linear), py::arg("x"), py::arg("x_scales"), py::arg("input"),
      py::arg("m"), py::arg("k"), py::arg("codes"), py::arg("weight"), py::arg("scales"), py::arg("bias"),
      py::arg("y_dtype"), py::arg("y"), py::arg("n"), py::arg("ldy"), py::arg("ranges"), py::arg("partials"),
      py::arg("counters"), py::arg("stream"),
      "MXFP8 or MXFP6 rows times MXFP8, MXFP6 or MXFP4 weights on a GPU; see cuda/tersor_float.h");
}
