// Products with small floats as Python functions: pointers are integers, as in bindings.cpp.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "cpu/float_round.h"

namespace py = pybind11;

void define_float(py::module_& module) {
  module.def(
      "float_round",
      [](Address x, Address y, int dtype, int64_t rows, int64_t k, int64_t ldx, int element, int scale, int64_t group,
         int threads, const tersor_input* given, Address other, int64_t ldother) {
        tersor_input steps = given ? *given : tersor_input{};
        steps.other = pointer<const void>(other);
        steps.ldother = ldother;
        const tersor::FloatRoundArgs arguments{pointer(x), pointer(y), dtype, rows, k, ldx, element, scale, group,
                                               threads, given ? &steps : nullptr};
        run([&] { return tersor_float_round(&arguments); });
      },
      py::arg("x"), py::arg("y"), py::arg("dtype"), py::arg("rows"), py::arg("k"), py::arg("ldx"), py::arg("element"),
      py::arg("scale"), py::arg("group"), py::arg("threads"), py::arg("steps") = nullptr, py::arg("other") = 0,
      py::arg("ldother") = 0,
      "y = element(x / scale) * scale in groups of channels, after the steps of an Input; see cpp/cpu/float_round.h");
  module.def(
      "float_linear",
      [](Address x, int x_dtype, int64_t m, int64_t k, int64_t ldx, Address codes, int element, Address scales,
         int scale_kind, int64_t scale_rows, int64_t group, float global, Address bias, Address y, int64_t n,
         int64_t ldy, int threads) {
        const tersor::FloatLinearArgs arguments{
            pointer(x), x_dtype, m, k, ldx, pointer<const uint8_t>(codes), element, pointer(scales), scale_kind,
            scale_rows, group, global, pointer(bias), pointer(y), n, ldy, threads};
        run([&] { return tersor_float_linear(&arguments); });
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"), py::arg("ldx"), py::arg("codes"),
      py::arg("element"), py::arg("scales"), py::arg("scale_kind"), py::arg("scale_rows"), py::arg("group"),
      py::arg("global_scale"), py::arg("bias"), py::arg("y"), py::arg("n"), py::arg("ldy"), py::arg("threads"),
      "y[m, n] = x[m, k] @ (values * scales)^T + bias; see cpp/cpu/float_linear.h");
  module.def(
      "float_dequantize",
      [](int64_t n, int64_t k, Address codes, int element, Address scales, int scale_kind, int64_t scale_rows,
         int64_t group, float global, Address out, int threads) {
        tersor::FloatLinearArgs arguments{};
        arguments.k = k;
        arguments.n = n;
        arguments.codes = pointer<const uint8_t>(codes);
        arguments.element = element;
        arguments.scales = pointer(scales);
        arguments.scale_kind = scale_kind;
        arguments.scale_rows = scale_rows;
        arguments.group = group;
        arguments.global = global;
        arguments.threads = threads;
        run([&] { return tersor_float_dequantize(&arguments, pointer<float>(out)); });
      },
      py::arg("n"), py::arg("k"), py::arg("codes"), py::arg("element"), py::arg("scales"), py::arg("scale_kind"),
      py::arg("scale_rows"), py::arg("group"), py::arg("global_scale"), py::arg("out"), py::arg("threads"),
      "values * scales as float32 [n, k]");
}
