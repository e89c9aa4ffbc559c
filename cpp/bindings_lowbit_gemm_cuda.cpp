// The part of tersor._C for products of low-bit activations on CUDA (tersor.h). Pointers are integers, 0 for absent;
// `stream` is a cudaStream_t as an integer, and nothing here waits for it. No logic here.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "tersor.h"

namespace py = pybind11;

void define_lowbit_gemm_cuda(py::module_& module) {
  module.def(
      "cuda_lowbit_linear_plan",
      [](int64_t m, int64_t n, int64_t k, int bits, int64_t group_size, int scale_dtype, bool has_zero_points,
         int64_t act_group, bool act_has_zero_points, int width, int multiprocessors,
         int64_t shared_memory_per_multiprocessor) {
        int64_t ranges = 0, partial_bytes = 0, counter_bytes = 0;
        check(tersor_cuda_lowbit_linear_plan(m, n, k, bits, group_size, scale_dtype, has_zero_points, act_group,
                                             act_has_zero_points, width, multiprocessors,
                                             shared_memory_per_multiprocessor, &ranges, &partial_bytes,
                                             &counter_bytes));
        return py::make_tuple(ranges, partial_bytes, counter_bytes);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group_size"), py::arg("scale_dtype"),
      py::arg("has_zero_points"), py::arg("act_group"), py::arg("act_has_zero_points"), py::arg("width"),
      py::arg("multiprocessors"), py::arg("shared_memory_per_multiprocessor"),
      "(ranges, bytes of partials, bytes of counters) for cuda_lowbit_linear on a device");
  module.def(
      "cuda_lowbit_linear",
      [](Address codes, int width, int64_t row_bytes, Address act_scales, int64_t act_scale_stride, Address sums,
         Address act_zero_points, Address stage_starts, int64_t row_cost, int64_t act_group, int64_t m, int64_t k,
         Address qweight, Address scales, int scale_dtype, Address zero_points, Address bias, Address residual,
         int64_t ldr, Address y, int y_dtype, int64_t n, int64_t ldy, int bits, int64_t group_size, int64_t ranges,
         Address partials, Address counters, Address stream) {
        check(tersor_cuda_lowbit_linear(
            pointer<const uint8_t>(codes), width, row_bytes, pointer<const float>(act_scales), act_scale_stride,
            pointer<const int16_t>(sums), pointer<const int16_t>(act_zero_points),
            pointer<const int32_t>(stage_starts), row_cost, act_group, m, k, pointer<const uint8_t>(qweight),
            pointer(scales), scale_dtype, pointer<const uint8_t>(zero_points), pointer(bias), pointer(residual), ldr,
            pointer(y), y_dtype, n, ldy, bits, group_size, ranges, pointer<uint32_t>(partials),
            pointer<uint32_t>(counters), pointer(stream)));
      },
      py::arg("codes"), py::arg("width"), py::arg("row_bytes"), py::arg("act_scales"), py::arg("act_scale_stride"),
      py::arg("sums"), py::arg("act_zero_points"), py::arg("stage_starts"), py::arg("row_cost"), py::arg("act_group"),
      py::arg("m"), py::arg("k"), py::arg("qweight"), py::arg("scales"), py::arg("scale_dtype"),
      py::arg("zero_points"), py::arg("bias"), py::arg("residual"), py::arg("ldr"), py::arg("y"), py::arg("y_dtype"),
      py::arg("n"), py::arg("ldy"), py::arg("bits"), py::arg("group_size"), py::arg("ranges"), py::arg("partials"),
      py::arg("counters"), py::arg("stream"), "integer product of low-bit activations and integer weights on a GPU");
  module.def(
      "cuda_lowbit_linear_grouped_plan",
      [](int64_t rows, int64_t n, int64_t k, int bits, int64_t group_size, int scale_dtype, bool has_zero_points,
         int64_t act_group, bool act_has_zero_points, int64_t experts, int multiprocessors,
         int64_t shared_memory_per_multiprocessor) {
        int64_t ranges = 0, partial_bytes = 0, counter_bytes = 0;
        check(tersor_cuda_lowbit_linear_grouped_plan(rows, n, k, bits, group_size, scale_dtype, has_zero_points,
                                                     act_group, act_has_zero_points, experts, multiprocessors,
                                                     shared_memory_per_multiprocessor, &ranges, &partial_bytes,
                                                     &counter_bytes));
        return py::make_tuple(ranges, partial_bytes, counter_bytes);
      },
      py::arg("rows"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group_size"), py::arg("scale_dtype"),
      py::arg("has_zero_points"), py::arg("act_group"), py::arg("act_has_zero_points"), py::arg("experts"),
      py::arg("multiprocessors"), py::arg("shared_memory_per_multiprocessor"),
      "(ranges, bytes of partials, bytes of counters) for cuda_lowbit_linear_grouped on a device");
  module.def(
      "cuda_lowbit_linear_grouped",
      [](Address codes, int64_t row_bytes, Address act_scales, int64_t act_scale_stride, Address sums,
         Address act_zero_points, int64_t act_group, int64_t rows, int64_t k, Address ends, int64_t experts,
         Address qweight, Address scales, int scale_dtype, Address zero_points, Address bias, Address y, int y_dtype,
         int64_t n, int64_t ldy, int bits, int64_t group_size, int64_t ranges, Address partials, Address counters,
         Address stream) {
        check(tersor_cuda_lowbit_linear_grouped(
            pointer<const uint8_t>(codes), row_bytes, pointer<const float>(act_scales), act_scale_stride,
            pointer<const int16_t>(sums), pointer<const int16_t>(act_zero_points), act_group, rows, k,
            pointer<const int32_t>(ends), experts, pointer<const uint8_t>(qweight), pointer(scales), scale_dtype,
            pointer<const uint8_t>(zero_points), pointer(bias), pointer(y), y_dtype, n, ldy, bits, group_size, ranges,
            pointer<uint32_t>(partials), pointer<uint32_t>(counters), pointer(stream)));
      },
      py::arg("codes"), py::arg("row_bytes"), py::arg("act_scales"), py::arg("act_scale_stride"), py::arg("sums"),
      py::arg("act_zero_points"), py::arg("act_group"), py::arg("rows"), py::arg("k"), py::arg("ends"),
      py::arg("experts"), py::arg("qweight"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zero_points"),
      py::arg("bias"), py::arg("y"), py::arg("y_dtype"), py::arg("n"), py::arg("ldy"), py::arg("bits"),
      py::arg("group_size"), py::arg("ranges"), py::arg("partials"), py::arg("counters"), py::arg("stream"),
      "cuda_lowbit_linear for rows sorted by expert, each with its expert's weight");
}
