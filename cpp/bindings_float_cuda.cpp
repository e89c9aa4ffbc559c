// The part of tersor._C for small floats on CUDA (cuda/tersor_float.h). Pointers are integers, 0 for absent; `stream`
// is a cudaStream_t as an integer, and nothing here waits for it. No logic here.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "tersor.h"
#include "tersor_float.h"

namespace py = pybind11;

void define_float_cuda(py::module_& module) {
  module.def(
      "cuda_float_linear_plan",
      [](int64_t m, int64_t n, int64_t k, int element, int scale_kind, int multiprocessors,
         int64_t shared_memory_per_multiprocessor) {
        int64_t ranges = 0, partial_bytes = 0, counter_bytes = 0;
        check(tersor_cuda_float_linear_plan(m, n, k, element, scale_kind, multiprocessors,
                                            shared_memory_per_multiprocessor, &ranges, &partial_bytes,
                                            &counter_bytes));
        return py::make_tuple(ranges, partial_bytes, counter_bytes);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("element"), py::arg("scale_kind"), py::arg("multiprocessors"),
      py::arg("shared_memory_per_multiprocessor"), "(ranges, bytes of partials, bytes of counters) on a device");
  module.def(
      "cuda_float_linear",
      [](Address x, int x_dtype, int64_t m, int64_t k, int64_t ldx, Address codes, int element, Address scales,
         int scale_kind, int64_t scale_rows, int64_t group, Address global, Address bias, Address y, int64_t n,
         int64_t ldy, int64_t ranges, Address partials, Address counters, Address stream) {
        check(tersor_cuda_float_linear(pointer(x), x_dtype, m, k, ldx, pointer<const uint8_t>(codes), element,
                                       pointer(scales), scale_kind, scale_rows, group, pointer<const float>(global),
                                       pointer(bias), pointer(y), n, ldy, ranges, pointer<float>(partials),
                                       pointer<uint32_t>(counters), pointer(stream)));
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"), py::arg("ldx"), py::arg("codes"),
      py::arg("element"), py::arg("scales"), py::arg("scale_kind"), py::arg("scale_rows"), py::arg("group"),
      py::arg("global_scale"), py::arg("bias"), py::arg("y"), py::arg("n"), py::arg("ldy"), py::arg("ranges"),
      py::arg("partials"), py::arg("counters"), py::arg("stream"),
      "y[m, n] = x[m, k] @ (values * scales)^T + bias on a GPU; see cuda/tersor_float.h");
  module.def(
      "cuda_fp8_rows",
      [](Address x, int x_dtype, int64_t m, int64_t k, int64_t ldx, Address top, int64_t groups, bool interleaved,
         Address codes, Address scales, Address values, Address stream) {
        check(tersor_cuda_fp8_rows(pointer(x), x_dtype, m, k, ldx, pointer<const float>(top), groups, interleaved,
                                   pointer<uint8_t>(codes), pointer<float>(scales), pointer(values), pointer(stream)));
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"), py::arg("ldx"), py::arg("top"), py::arg("groups"),
      py::arg("interleaved"), py::arg("codes"), py::arg("scales"), py::arg("values"), py::arg("stream"),
      "rows rounded to e4m3 on a GPU");
  module.def(
      "cuda_fp8_linear_plan",
      [](int64_t m, int64_t n, int64_t k, int weight, int multiprocessors, int64_t shared_memory_per_multiprocessor) {
        int64_t ranges = 0, partial_bytes = 0, counter_bytes = 0;
        check(tersor_cuda_fp8_linear_plan(m, n, k, weight, multiprocessors, shared_memory_per_multiprocessor, &ranges,
                                          &partial_bytes, &counter_bytes));
        return py::make_tuple(ranges, partial_bytes, counter_bytes);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("weight"), py::arg("multiprocessors"),
      py::arg("shared_memory_per_multiprocessor"), "(ranges, bytes of partials, bytes of counters) on a device");
  module.def(
      "cuda_fp8_linear",
      [](Address x, Address x_scales, int64_t x_groups, int64_t m, int64_t k, Address codes, int weight, Address scales,
         int scale_dtype, Address scale_multiplier, int64_t scale_rows, int64_t group, Address bias, int y_dtype,
         Address y, int64_t n, int64_t ldy, int64_t ranges, Address partials, Address counters, Address stream) {
        check(tersor_cuda_fp8_linear(pointer<const uint8_t>(x), pointer<const float>(x_scales), x_groups, m, k,
                                     pointer<const uint8_t>(codes), weight, pointer(scales), scale_dtype,
                                     pointer<const float>(scale_multiplier), scale_rows, group, pointer(bias), y_dtype,
                                     pointer(y), n, ldy, ranges, pointer<float>(partials),
                                     pointer<uint32_t>(counters), pointer(stream)));
      },
      py::arg("x"), py::arg("x_scales"), py::arg("x_groups"), py::arg("m"), py::arg("k"), py::arg("codes"),
      py::arg("weight"), py::arg("scales"), py::arg("scale_dtype"), py::arg("scale_multiplier"),
      py::arg("scale_rows"), py::arg("group"), py::arg("bias"), py::arg("y_dtype"), py::arg("y"), py::arg("n"),
      py::arg("ldy"), py::arg("ranges"), py::arg("partials"), py::arg("counters"), py::arg("stream"),
      "e4m3 rows times 4-bit integers or e4m3 on a GPU; see cuda/tersor_float.h");
  module.def(
      "cuda_block_rows",
      [](Address x, int x_dtype, int64_t m, int64_t k, int64_t ldx, int kind, Address global, Address codes,
         Address scales, Address values, Address stream) {
        check(tersor_cuda_block_rows(pointer(x), x_dtype, m, k, ldx, kind, pointer<const float>(global),
                                     pointer<uint8_t>(codes), pointer<uint8_t>(scales), pointer(values),
                                     pointer(stream)));
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"), py::arg("ldx"), py::arg("kind"),
      py::arg("global_scale"), py::arg("codes"), py::arg("scales"), py::arg("values"), py::arg("stream"),
      "rows rounded to MXFP4, NVFP4, MXFP8 or MXFP6 on a GPU");
  module.def(
      "cuda_fp4_linear_plan",
      [](int64_t m, int64_t n, int64_t k, int kind, int multiprocessors, int64_t shared_memory_per_multiprocessor) {
        int64_t ranges = 0, partial_bytes = 0, counter_bytes = 0;
        check(tersor_cuda_fp4_linear_plan(m, n, k, kind, multiprocessors, shared_memory_per_multiprocessor, &ranges,
                                          &partial_bytes, &counter_bytes));
        return py::make_tuple(ranges, partial_bytes, counter_bytes);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("kind"), py::arg("multiprocessors"),
      py::arg("shared_memory_per_multiprocessor"), "(ranges, bytes of partials, bytes of counters) on a device");
  module.def(
      "cuda_fp4_linear",
      [](Address x, Address x_scales, Address x_global, int64_t m, int64_t k, Address codes, Address scales,
         Address global, int kind, Address bias, int y_dtype, Address y, int64_t n, int64_t ldy, int64_t ranges,
         Address partials, Address counters, Address stream) {
        check(tersor_cuda_fp4_linear(pointer<const uint8_t>(x), pointer<const uint8_t>(x_scales),
                                     pointer<const float>(x_global), m, k, pointer<const uint8_t>(codes),
                                     pointer<const uint8_t>(scales), pointer<const float>(global), kind, pointer(bias),
                                     y_dtype, pointer(y), n, ldy, ranges, pointer<float>(partials),
                                     pointer<uint32_t>(counters), pointer(stream)));
      },
      py::arg("x"), py::arg("x_scales"), py::arg("x_global"), py::arg("m"), py::arg("k"), py::arg("codes"),
      py::arg("scales"), py::arg("global_scale"), py::arg("kind"), py::arg("bias"), py::arg("y_dtype"), py::arg("y"),
      py::arg("n"), py::arg("ldy"), py::arg("ranges"), py::arg("partials"), py::arg("counters"), py::arg("stream"),
      "MXFP4 or NVFP4 rows times weights of the same kind on a GPU; see cuda/tersor_float.h");
  module.def(
      "cuda_mx_linear_plan",
      [](int64_t m, int64_t n, int64_t k, int weight, int multiprocessors, int64_t shared_memory_per_multiprocessor) {
        int64_t ranges = 0, partial_bytes = 0, counter_bytes = 0;
        check(tersor_cuda_mx_linear_plan(m, n, k, weight, multiprocessors, shared_memory_per_multiprocessor, &ranges,
                                         &partial_bytes, &counter_bytes));
        return py::make_tuple(ranges, partial_bytes, counter_bytes);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("weight"), py::arg("multiprocessors"),
      py::arg("shared_memory_per_multiprocessor"), "(ranges, bytes of partials, bytes of counters) on a device");
  module.def(
      "cuda_mx_linear",
      [](Address x, Address x_scales, int input, int64_t m, int64_t k, Address codes, int weight, Address scales,
         Address bias, int y_dtype, Address y, int64_t n, int64_t ldy, int64_t ranges, Address partials,
         Address counters, Address stream) {
        check(tersor_cuda_mx_linear(pointer<const uint8_t>(x), pointer<const uint8_t>(x_scales), input, m, k,
                                    pointer<const uint8_t>(codes), weight, pointer<const uint8_t>(scales),
                                    pointer(bias), y_dtype, pointer(y), n, ldy, ranges, pointer<float>(partials),
                                    pointer<uint32_t>(counters), pointer(stream)));
      },
      py::arg("x"), py::arg("x_scales"), py::arg("input"), py::arg("m"), py::arg("k"), py::arg("codes"),
      py::arg("weight"), py::arg("scales"), py::arg("bias"), py::arg("y_dtype"), py::arg("y"), py::arg("n"),
      py::arg("ldy"), py::arg("ranges"), py::arg("partials"), py::arg("counters"), py::arg("stream"),
      "MXFP8 or MXFP6 rows times MXFP8, MXFP6 or MXFP4 weights on a GPU; see cuda/tersor_float.h");
}
