// tersor._C: the C ABI as Python functions. Pointers are integers (0 = absent), sizes and strides count
// elements, dtype codes are 0 float32, 1 bfloat16, 2 float16. No logic here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <vector>

#include "bindings.h"
#include "common/huge_pages.h"
#include "tersor.h"

namespace py = pybind11;

void define_float(py::module_& module);  // bindings_float.cpp

namespace {

tersor_projection projection(Address qweight, Address scales, Address zero_points, Address bias, Address y, int64_t n,
                             int64_t ldy) {
  return {pointer<const uint8_t>(qweight), pointer<const void>(scales), pointer<const uint8_t>(zero_points),
          pointer<const void>(bias),       pointer<void>(y),            n, ldy};
}

using ProjectionTuple = std::tuple<Address, Address, Address, Address, Address, int64_t, int64_t>;

// Activations that are given by their bits alone have the usual options.
tersor_input taken(int bits) {
  tersor_input input{};
  input.bits = bits;
  input.group = 32;
  input.clip = 1;
  return input;
}
const tersor_input& taken(const tersor_input& input) { return input; }

void define_input(py::module_& module) {
  py::class_<tersor_input>(module, "Input", "how activations are taken; see tersor_input in cpp/tersor.h")
      .def(py::init([](int64_t bits, int64_t group, float clip, bool symmetric, Address scales, Address block_bits,
                       Address norm_weight, float epsilon, Address index, Address signs, int64_t rows, int64_t columns,
                       Address left, Address right, bool butterflies, float hadamard_scale) {
             tersor_input input{};
             input.bits = bits;
             input.group = group;
             input.asymmetric = !symmetric;
             input.scales = pointer<const float>(scales);
             input.block_bits = pointer<const uint8_t>(block_bits);
             input.norm_weight = pointer<const void>(norm_weight);
             input.index = pointer<const int32_t>(index);
             input.signs = pointer<const float>(signs);
             input.rows = rows;
             input.columns = columns;
             input.left = pointer<const float>(left);
             input.right = pointer<const float>(right);
             input.butterflies = butterflies;
             input.clip = clip;
             input.epsilon = epsilon;
             input.hadamard_scale = hadamard_scale;
             return input;
           }),
           py::arg("bits"), py::arg("group") = 32, py::arg("clip") = 1.0f, py::arg("symmetric") = true,
           py::arg("scales") = 0, py::arg("block_bits") = 0, py::arg("norm_weight") = 0, py::arg("epsilon") = 0.0f,
           py::arg("index") = 0, py::arg("signs") = 0, py::arg("rows") = 1, py::arg("columns") = 1, py::arg("left") = 0,
           py::arg("right") = 0, py::arg("butterflies") = false, py::arg("hadamard_scale") = 1.0f);
  module.def(
      "int_linear_fused",
      [](Address x, int x_dtype, int64_t m, int64_t k, int64_t ldx, Address other, int64_t ldother,
         const std::vector<ProjectionTuple>& projections, int scale_dtype, int bits, int64_t group_size,
         const tersor_input& given, int threads) {
        std::vector<tersor_projection> list;
        list.reserve(projections.size());
        for (const ProjectionTuple& tuple : projections) list.push_back(std::apply(projection, tuple));
        tersor_input input = given;
        input.other = pointer<const void>(other);
        input.ldother = ldother;
        run([&] {
          return tersor_int_linear(pointer(x), x_dtype, m, k, ldx, list.data(), static_cast<int>(list.size()),
                                   scale_dtype, bits, group_size, &input, threads);
        });
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"), py::arg("ldx"), py::arg("other"),
      py::arg("ldother"), py::arg("projections"), py::arg("scale_dtype"), py::arg("bits"), py::arg("group_size"),
      py::arg("input"), py::arg("threads"), "int_linear_multi of rows that go through the input's steps first");
}

// Activations: their bits, or an Input.
template <class Activations>
void define_int_linear(py::module_& module) {
  module.def(
      "int_linear",
      [](Address x, int x_dtype, int64_t m, int64_t k, int64_t ldx, Address qweight, Address scales, int scale_dtype,
         Address zero_points, Address bias, Address y, int64_t n, int64_t ldy, int bits, int64_t group_size,
         Activations act_bits, int threads) {
        const tersor_projection p = projection(qweight, scales, zero_points, bias, y, n, ldy);
        const tersor_input& input = taken(act_bits);
        run([&] {
          return tersor_int_linear(pointer(x), x_dtype, m, k, ldx, &p, 1, scale_dtype, bits, group_size, &input,
                                   threads);
        });
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"), py::arg("ldx"), py::arg("qweight"),
      py::arg("scales"), py::arg("scale_dtype"), py::arg("zero_points"), py::arg("bias"), py::arg("y"), py::arg("n"),
      py::arg("ldy"), py::arg("bits"), py::arg("group_size"), py::arg("act_bits"), py::arg("threads"),
      "y[m, n] = x[m, k] @ ((codes - zero_points) * scales)^T + bias");

  module.def(
      "int_linear_multi",
      [](Address x, int x_dtype, int64_t m, int64_t k, int64_t ldx, const std::vector<ProjectionTuple>& projections,
         int scale_dtype, int bits, int64_t group_size, Activations act_bits, int threads) {
        std::vector<tersor_projection> list;
        list.reserve(projections.size());
        for (const ProjectionTuple& tuple : projections) list.push_back(std::apply(projection, tuple));
        const tersor_input& input = taken(act_bits);
        run([&] {
          return tersor_int_linear(pointer(x), x_dtype, m, k, ldx, list.data(), static_cast<int>(list.size()),
                                   scale_dtype, bits, group_size, &input, threads);
        });
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"), py::arg("ldx"), py::arg("projections"),
      py::arg("scale_dtype"), py::arg("bits"), py::arg("group_size"), py::arg("act_bits"), py::arg("threads"),
      "int_linear for several weights of one input in one parallel region; each projection is a tuple "
      "(qweight, scales, zero_points, bias, y, n, ldy)");

  module.def(
      "int_linear_grouped",
      [](Address x, int x_dtype, int64_t rows, int64_t k, int64_t ldx, Address ends, int64_t experts, Address qweight,
         Address scales, int scale_dtype, Address zero_points, Address bias, Address y, int64_t n, int64_t ldy,
         int bits, int64_t group_size, Activations act_bits, int threads) {
        const tersor_projection weights = projection(qweight, scales, zero_points, bias, y, n, ldy);
        const tersor_input& input = taken(act_bits);
        run([&] {
          return tersor_int_linear_grouped(pointer(x), x_dtype, rows, k, ldx, pointer<const int32_t>(ends), experts,
                                           &weights, scale_dtype, bits, group_size, &input, threads);
        });
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("rows"), py::arg("k"), py::arg("ldx"), py::arg("ends"),
      py::arg("experts"), py::arg("qweight"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zero_points"),
      py::arg("bias"), py::arg("y"), py::arg("n"), py::arg("ldy"), py::arg("bits"), py::arg("group_size"),
      py::arg("act_bits"), py::arg("threads"), "int_linear for rows sorted by expert, each with its expert's weight");
}

py::dict describe_device(int index) {
  tersor_cuda_device_info info;
  check(tersor_cuda_device(index, &info));
  py::dict result;
  result["name"] = info.name;
  result["capability"] = py::make_tuple(info.major, info.minor);
  result["multiprocessors"] = info.multiprocessors;
  result["memory_bytes"] = info.memory_bytes;
  result["shared_memory_per_block"] = info.shared_memory_per_block;
  result["l2_bytes"] = info.l2_bytes;
  return result;
}

using Strides = std::array<int64_t, 3>;

tersor_kv_tokens kv_tokens(Address keys, Address values, int64_t tokens, const Strides& key_strides,
                           const Strides& value_strides, Address bias) {
  tersor_kv_tokens fresh{pointer(keys), pointer(values), tokens, {}, {}, pointer<const float>(bias)};
  std::copy(key_strides.begin(), key_strides.end(), fresh.key_strides);
  std::copy(value_strides.begin(), value_strides.end(), fresh.value_strides);
  return fresh;
}

// The codec of the cache: `streams` is the address of rows of 12 int64, the fields of tersor_kv_stream.
void define_kv_codec(py::module_& module) {
  static_assert(sizeof(tersor_kv_stream) == 12 * 8, "Python writes the fields as int64");
  module.def("kv_encode_room", [](int64_t tokens, int64_t dim) {
    const int64_t room = tersor_kv_encode_room(tokens, dim);
    check(room < 0 ? TERSOR_INVALID : TERSOR_OK);
    return room;
  }, py::arg("tokens"), py::arg("dim"), "bytes that a stream takes at most");
  module.def("kv_encode", [](Address streams, int64_t count, int threads) {
    run([&] { return tersor_kv_encode(pointer<tersor_kv_stream>(streams), count, threads); });
  }, py::arg("streams"), py::arg("count"), py::arg("threads"), "values to bytes; writes each stream's size");
  module.def("kv_decode", [](Address streams, int64_t count, int threads) {
    run([&] { return tersor_kv_decode(pointer<const tersor_kv_stream>(streams), count, threads); });
  }, py::arg("streams"), py::arg("count"), py::arg("threads"), "bytes to values; ValueError for a damaged stream");
  module.def("kv_codec_table", [](int index) {
    std::vector<uint16_t> frequencies(256);
    check(tersor_kv_codec_table(index, frequencies.data()));
    return frequencies;
  }, py::arg("index"), "frequencies of the symbols 0 to 127, the escape, -127 to -1, out of 4096");
}

// A layer's cache, with its formats. The memory of the table and of the rotary table belongs to the caller.
struct Kv {
  tersor_kv view{};
  std::vector<tersor_kv_format> formats;
  std::vector<std::vector<int8_t>> levels;

  // Of each format: the ten numbers of tersor_kv_format, then levels of keys and of values where they are given.
  Kv(int64_t batch, int64_t kv_heads, int64_t key_dim, int64_t value_dim, int dtype, int64_t page_tokens, bool biased,
     const std::vector<std::vector<int64_t>>& given, int64_t rotary_dim, bool interleaved, Address rotary) {
    levels.reserve(2 * given.size());  // formats point to its elements
    for (const std::vector<int64_t>& n : given) {
      if (n.size() < 10) throw py::value_error("formats: at least 10 numbers are accepted for each");
      tersor_kv_format f{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], nullptr, nullptr};
      size_t at = 10;
      const int64_t codings[2] = {f.key_coding, f.value_coding}, bits[2] = {f.key_bits, f.value_bits};
      const int8_t** tables[2] = {&f.key_levels, &f.value_levels};
      for (int part = 0; part < 2; ++part) {
        if (codings[part] != TERSOR_KV_LEVELS || bits[part] < 2 || bits[part] > 4) continue;
        const size_t count = size_t(1) << bits[part];
        if (n.size() < at + count) throw py::value_error("formats: levels are missing");
        levels.emplace_back(n.begin() + at, n.begin() + at + count);
        *tables[part] = levels.back().data();
        at += count;
      }
      formats.push_back(f);
    }
    view = {batch, kv_heads, key_dim, value_dim, dtype, page_tokens, biased, rotary_dim, interleaved,
            pointer<const float>(rotary), static_cast<int64_t>(formats.size()), formats.data(), 0, nullptr};
  }
  Kv(const Kv&) = delete;
};

tersor_kv_query kv_query(Address q, int64_t heads, int64_t queries, const Strides& strides, Address log_sum_exp,
                         int64_t first, int64_t position, Address positions, int64_t window, bool causal, Address mask,
                         const std::array<int64_t, 4>& mask_strides, int64_t mask_first, int64_t mask_tokens,
                         float scale, float softcap) {
  tersor_kv_query query{};
  query.q = pointer(q);
  query.heads = heads;
  query.queries = queries;
  std::copy(strides.begin(), strides.end(), query.strides);
  query.log_sum_exp = pointer<float>(log_sum_exp);
  query.first = first;
  query.position = position;
  query.positions = pointer<const int64_t>(positions);
  query.window = window;
  query.causal = causal;
  query.mask = pointer<const uint8_t>(mask);
  std::copy(mask_strides.begin(), mask_strides.end(), query.mask_strides);
  query.mask_first = mask_first;
  query.mask_tokens = mask_tokens;
  query.scale = scale;
  query.softcap = softcap;
  return query;
}

void define_kv(py::module_& module) {
  py::class_<Kv>(module, "Kv", "the cache of one layer as the kernels see it; see tersor_kv in cpp/tersor.h")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int, int64_t, bool, const std::vector<std::vector<int64_t>>&,
                    int64_t, bool, Address>(),
           py::arg("batch"), py::arg("kv_heads"), py::arg("key_dim"), py::arg("value_dim"), py::arg("dtype"),
           py::arg("page_tokens"), py::arg("biased"), py::arg("formats"), py::arg("rotary_dim"),
           py::arg("interleaved"), py::arg("rotary"))
      .def("page_bytes",
           [](const Kv& kv, int64_t kind) {
             const int64_t bytes = tersor_kv_page_bytes(&kv.view, kind);
             check(bytes < 0 ? TERSOR_INVALID : TERSOR_OK);
             return bytes;
           },
           py::arg("kind"), "bytes of a page for one sequence and one head")
      .def("set_table",
           [](Kv& kv, Address table, int64_t pages) {
             kv.view.table = pointer<const int64_t>(table);
             kv.view.pages = pages;
           },
           py::arg("table"), py::arg("pages"))
      .def("append",
           [](const Kv& kv, int64_t page, int64_t slot, Address keys, Address values, int64_t tokens,
              const Strides& key_strides, const Strides& value_strides, Address bias, int threads) {
             const tersor_kv_tokens fresh = kv_tokens(keys, values, tokens, key_strides, value_strides, bias);
             run([&] { return tersor_kv_append(&kv.view, page, slot, &fresh, threads); });
           },
           py::arg("page"), py::arg("slot"), py::arg("keys"), py::arg("values"), py::arg("tokens"),
           py::arg("key_strides"), py::arg("value_strides"), py::arg("bias"), py::arg("threads"))
      .def("pack",
           [](const Kv& kv, int64_t kind, const std::vector<int64_t>& raw, const std::vector<int64_t>& packed,
              int threads) {
             if (static_cast<int64_t>(raw.size()) != kv.view.batch || raw.size() != packed.size()) {
               throw py::value_error("raw and packed: one address for each sequence is accepted");
             }
             run([&] { return tersor_kv_pack(&kv.view, kind, raw.data(), packed.data(), threads); });
           },
           py::arg("kind"), py::arg("raw"), py::arg("packed"), py::arg("threads"))
      .def("mass",
           [](const Kv& kv, Address q, int64_t heads, int64_t queries, const Strides& strides, Address log_sum_exp,
              int64_t first, int64_t position, Address positions, int64_t window, bool causal, Address mask,
              const std::array<int64_t, 4>& mask_strides, int64_t mask_first, int64_t mask_tokens, float scale,
              float softcap, Address mass, int threads) {
             const tersor_kv_query query =
                 kv_query(q, heads, queries, strides, log_sum_exp, first, position, positions, window, causal, mask,
                          mask_strides, mask_first, mask_tokens, scale, softcap);
             run([&] { return tersor_kv_mass(&kv.view, &query, pointer<float>(mass), threads); });
           },
           py::arg("q"), py::arg("heads"), py::arg("queries"), py::arg("strides"), py::arg("log_sum_exp"),
           py::arg("first"), py::arg("position"), py::arg("positions"), py::arg("window"), py::arg("causal"),
           py::arg("mask"), py::arg("mask_strides"), py::arg("mask_first"), py::arg("mask_tokens"), py::arg("scale"),
           py::arg("softcap"), py::arg("mass"), py::arg("threads"), "what queries' weights give each token")
      .def("attention",
           [](const Kv& kv, Address q, int64_t heads, int64_t queries, const Strides& strides, Address out,
              Address log_sum_exp, int64_t first, int64_t position, Address positions, int64_t window, bool causal,
              Address mask, const std::array<int64_t, 4>& mask_strides, int64_t mask_first, int64_t mask_tokens,
              Address sinks, float scale, float softcap, int64_t page, int64_t slot, Address keys, Address values,
              int64_t tokens, const Strides& key_strides, const Strides& value_strides, Address bias, int threads) {
             tersor_kv_query query =
                 kv_query(q, heads, queries, strides, log_sum_exp, first, position, positions, window, causal, mask,
                          mask_strides, mask_first, mask_tokens, scale, softcap);
             query.out = pointer(out);
             query.sinks = pointer<const float>(sinks);
             const tersor_kv_tokens fresh = kv_tokens(keys, values, tokens, key_strides, value_strides, bias);
             run([&] { return tersor_kv_attention(&kv.view, &query, page, slot, tokens ? &fresh : nullptr, threads); });
           },
           py::arg("q"), py::arg("heads"), py::arg("queries"), py::arg("strides"), py::arg("out"),
           py::arg("log_sum_exp"), py::arg("first"), py::arg("position"), py::arg("positions"), py::arg("window"),
           py::arg("causal"), py::arg("mask"), py::arg("mask_strides"), py::arg("mask_first"), py::arg("mask_tokens"),
           py::arg("sinks"), py::arg("scale"), py::arg("softcap"), py::arg("page"), py::arg("slot"), py::arg("keys"),
           py::arg("values"), py::arg("tokens"), py::arg("key_strides"), py::arg("value_strides"), py::arg("bias"),
           py::arg("threads"),
           "attention over the cache, after appending `tokens` fresh tokens from slot `slot` of page `page` on");
}

}  // namespace

#if !defined(TERSOR_HAVE_CUDA)
extern "C" int tersor_cuda_device_count(void) { return 0; }
extern "C" int tersor_cuda_device(int, tersor_cuda_device_info*) { return TERSOR_INVALID; }
constexpr bool has_cuda_build = false;
#else
constexpr bool has_cuda_build = true;

void define_float_cuda(py::module_& module);       // bindings_float_cuda.cpp
void define_kv_cuda(py::module_& module);          // bindings_kv_cuda.cpp
void define_lowbit_gemm_cuda(py::module_& module);  // bindings_lowbit_gemm_cuda.cpp
void define_rows_cuda(py::module_& module);  // bindings_rows_cuda.cpp

namespace {

// Work for a GPU: `stream` is a cudaStream_t as an integer; nothing here waits for it.
void define_cuda(py::module_& module) {
  module.def(
      "cuda_int_linear_plan",
      [](int64_t m, int64_t n, int64_t k, int bits, int64_t group_size, int scale_dtype, bool has_zero_points,
         int multiprocessors, int64_t shared_memory_per_multiprocessor) {
        int64_t ranges = 0, partial_bytes = 0, counter_bytes = 0;
        check(tersor_cuda_int_linear_plan(m, n, k, bits, group_size, scale_dtype, has_zero_points, multiprocessors,
                                          shared_memory_per_multiprocessor, &ranges));
        check(tersor_cuda_int_linear_workspace(m, n, ranges, &partial_bytes, &counter_bytes));
        return py::make_tuple(ranges, partial_bytes, counter_bytes);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group_size"), py::arg("scale_dtype"),
      py::arg("has_zero_points"), py::arg("multiprocessors"), py::arg("shared_memory_per_multiprocessor"),
      "(ranges, bytes of partials, bytes of counters) for cuda_int_linear on a device");
  module.def(
      "cuda_int_linear",
      [](Address x, int x_dtype, int64_t m, int64_t k, int64_t ldx, Address qweight, Address scales, int scale_dtype,
         Address zero_points, Address bias, Address y, int64_t n, int64_t ldy, int bits, int64_t group_size,
         int64_t ranges, Address partials, Address counters, Address stream) {
        check(tersor_cuda_int_linear(pointer(x), x_dtype, m, k, ldx, pointer<const uint8_t>(qweight), pointer(scales),
                                     scale_dtype, pointer<const uint8_t>(zero_points), pointer(bias), pointer(y), n,
                                     ldy, bits, group_size, ranges, pointer<float>(partials),
                                     pointer<uint32_t>(counters), pointer(stream)));
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("m"), py::arg("k"), py::arg("ldx"), py::arg("qweight"),
      py::arg("scales"), py::arg("scale_dtype"), py::arg("zero_points"), py::arg("bias"), py::arg("y"), py::arg("n"),
      py::arg("ldy"), py::arg("bits"), py::arg("group_size"), py::arg("ranges"), py::arg("partials"),
      py::arg("counters"), py::arg("stream"), "int_linear with 16-bit activations on a GPU");
  module.def(
      "cuda_int_linear_grouped_plan",
      [](int64_t rows, int64_t n, int64_t k, int bits, int64_t group_size, int scale_dtype, bool has_zero_points,
         int64_t experts, int multiprocessors, int64_t shared_memory_per_multiprocessor) {
        int64_t ranges = 0, partial_bytes = 0, counter_bytes = 0;
        check(tersor_cuda_int_linear_grouped_plan(rows, n, k, bits, group_size, scale_dtype, has_zero_points, experts,
                                                  multiprocessors, shared_memory_per_multiprocessor, &ranges,
                                                  &partial_bytes, &counter_bytes));
        return py::make_tuple(ranges, partial_bytes, counter_bytes);
      },
      py::arg("rows"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("group_size"), py::arg("scale_dtype"),
      py::arg("has_zero_points"), py::arg("experts"), py::arg("multiprocessors"),
      py::arg("shared_memory_per_multiprocessor"),
      "(ranges, bytes of partials, bytes of counters) for cuda_int_linear_grouped on a device");
  module.def(
      "cuda_int_linear_grouped",
      [](Address x, int x_dtype, int64_t rows, int64_t k, int64_t ldx, Address ends, int64_t experts, Address qweight,
         Address scales, int scale_dtype, Address zero_points, Address bias, Address y, int64_t n, int64_t ldy,
         int bits, int64_t group_size, int64_t ranges, Address partials, Address counters, Address stream) {
        check(tersor_cuda_int_linear_grouped(
            pointer(x), x_dtype, rows, k, ldx, pointer<const int32_t>(ends), experts, pointer<const uint8_t>(qweight),
            pointer(scales), scale_dtype, pointer<const uint8_t>(zero_points), pointer(bias), pointer(y), n, ldy, bits,
            group_size, ranges, pointer<float>(partials), pointer<uint32_t>(counters), pointer(stream)));
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("rows"), py::arg("k"), py::arg("ldx"), py::arg("ends"),
      py::arg("experts"), py::arg("qweight"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zero_points"),
      py::arg("bias"), py::arg("y"), py::arg("n"), py::arg("ldy"), py::arg("bits"), py::arg("group_size"),
      py::arg("ranges"), py::arg("partials"), py::arg("counters"), py::arg("stream"),
      "int_linear_grouped with 16-bit activations on a GPU");
  module.def(
      "cuda_int_dequantize",
      [](Address qweight, Address scales, int scale_dtype, Address zero_points, int64_t n, int64_t k, int bits,
         int64_t group_size, Address out, int out_dtype, Address stream) {
        check(tersor_cuda_int_dequantize(pointer<const uint8_t>(qweight), pointer(scales), scale_dtype,
                                         pointer<const uint8_t>(zero_points), n, k, bits, group_size, pointer(out),
                                         out_dtype, pointer(stream)));
      },
      py::arg("qweight"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zero_points"), py::arg("n"),
      py::arg("k"), py::arg("bits"), py::arg("group_size"), py::arg("out"), py::arg("out_dtype"), py::arg("stream"),
      "int_dequantize on a GPU");
}

}  // namespace
#endif

PYBIND11_MODULE(_C, module) {
  module.doc() = "tersor's native core; see cpp/tersor.h";
  module.attr("version") = TERSOR_VERSION;
  module.attr("has_cuda_build") = has_cuda_build;

  define_input(module);
  define_int_linear<int>(module);
  define_int_linear<const tersor_input&>(module);
  define_float(module);

  module.def(
      "int_pack",
      [](Address codes, int64_t n, int64_t k, int bits, Address qweight, int threads) {
        run([&] {
          return tersor_int_pack(pointer<const uint8_t>(codes), n, k, bits, pointer<uint8_t>(qweight), threads);
        });
      },
      py::arg("codes"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("qweight"), py::arg("threads"),
      "codes uint8 [n, k] -> qweight uint8 [ceil(n/16), ceil(k/32), 64*bits]");

  module.def(
      "int_unpack",
      [](Address qweight, int64_t n, int64_t k, int bits, Address codes, int threads) {
        run([&] {
          return tersor_int_unpack(pointer<const uint8_t>(qweight), n, k, bits, pointer<uint8_t>(codes), threads);
        });
      },
      py::arg("qweight"), py::arg("n"), py::arg("k"), py::arg("bits"), py::arg("codes"), py::arg("threads"),
      "the inverse of int_pack");

  module.def(
      "int_dequantize",
      [](Address qweight, Address scales, int scale_dtype, Address zero_points, int64_t n, int64_t k, int bits,
         int64_t group_size, Address out, int out_dtype, int threads) {
        run([&] {
          return tersor_int_dequantize(pointer<const uint8_t>(qweight), pointer<const void>(scales), scale_dtype,
                                       pointer<const uint8_t>(zero_points), n, k, bits, group_size, pointer(out),
                                       out_dtype, threads);
        });
      },
      py::arg("qweight"), py::arg("scales"), py::arg("scale_dtype"), py::arg("zero_points"), py::arg("n"),
      py::arg("k"), py::arg("bits"), py::arg("group_size"), py::arg("out"), py::arg("out_dtype"), py::arg("threads"),
      "out[n, k] = (codes - zero_points) * scales");

  module.def(
      "int_fit",
      [](Address w, int64_t n, int64_t k, int64_t ldw, Address importance, int bits, int64_t group_size, bool symmetric,
         int steps, int scale_dtype, Address scales, Address zero_points, int threads) {
        run([&] {
          return tersor_int_fit(pointer<const float>(w), n, k, ldw, pointer<const float>(importance), bits, group_size,
                                symmetric, steps, scale_dtype, pointer<float>(scales), pointer<float>(zero_points),
                                threads);
        });
      },
      py::arg("w"), py::arg("n"), py::arg("k"), py::arg("ldw"), py::arg("importance"), py::arg("bits"),
      py::arg("group_size"), py::arg("symmetric"), py::arg("steps"), py::arg("scale_dtype"), py::arg("scales"),
      py::arg("zero_points"), py::arg("threads"), "scales and zero points of w[n, k] from (clipped) group ranges");

  module.def(
      "gram",
      [](Address x, int x_dtype, int64_t tokens, int64_t k, int64_t ldx, Address gram, int threads) {
        run([&] { return tersor_gram(pointer(x), x_dtype, tokens, k, ldx, pointer<float>(gram), threads); });
      },
      py::arg("x"), py::arg("x_dtype"), py::arg("tokens"), py::arg("k"), py::arg("ldx"), py::arg("gram"),
      py::arg("threads"), "gram[k, k] += x^T x on and above the diagonal");

  module.def(
      "rms_norm",
      [](Address x, Address weight, Address y, int dtype, int64_t rows, int64_t k, int64_t ldx, float epsilon,
         int threads) {
        run([&] {
          return tersor_rms_norm(pointer(x), pointer(weight), pointer(y), dtype, rows, k, ldx, epsilon, threads);
        });
      },
      py::arg("x"), py::arg("weight"), py::arg("y"), py::arg("dtype"), py::arg("rows"), py::arg("k"), py::arg("ldx"),
      py::arg("epsilon"), py::arg("threads"), "y = weight * round(x / sqrt(mean(x^2) + epsilon))");

  module.def("isa", [] { return std::string(tersor_current_isa()); }, "the instruction set in use");
  module.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; const char* name = tersor_isa_name(i); ++i) names.push_back(name);
        return names;
      },
      "the instruction sets that can run here, best first");
  module.def(
      "set_isa", [](const std::string& name) { check(tersor_set_isa(name.c_str())); }, py::arg("name"),
      "use one of isas(); ValueError for any other name");
  module.def("threading", [] { return std::string(tersor_threading()); },
             "\"openmp\": the runtime already in the process; \"pool\": our own threads");
  module.def(
      "huge_pages",
      [](uintptr_t data, size_t bytes) {
        py::gil_scoped_release release;
        return tersor::huge_pages(reinterpret_cast<void*>(data), bytes);
      },
      py::arg("data"), py::arg("bytes"), "asks the system for large pages; the bytes that it may have put in such");
  module.def(
      "machine_floors",
      [](int threads, double seconds) {
        tersor_floors floors{};
        run([&] { return tersor_machine_floors(threads, seconds, &floors); });
        py::dict result;
        result["read_gbs"] = floors.read_gbs;
        result["fp32_gflops"] = floors.fp32_gflops;
        result["int8_gops"] = floors.int8_gops;
        result["bf16_gflops"] = floors.bf16_gflops;
        return result;
      },
      py::arg("threads") = 1, py::arg("seconds") = 0.3,
      "measured limits of this machine: GB/s read from memory and 1e9 operations/s; 0 where it has no such "
      "instruction");
  define_kv(module);
  define_kv_codec(module);
#if defined(TERSOR_HAVE_CUDA)
  define_cuda(module);
  define_kv_cuda(module);
  define_float_cuda(module);
  define_lowbit_gemm_cuda(module);
  define_rows_cuda(module);
#endif
  module.def(
      "cuda_devices",
      [] {
        py::list devices;
        const int count = tersor_cuda_device_count();
        for (int i = 0; i < count; ++i) devices.append(describe_device(i));
        return devices;
      },
      "one dict per GPU; empty without a GPU, a driver or the CUDA part");
}
