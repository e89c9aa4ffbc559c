// What a row of activations goes through before it is rounded (tersor_input): a norm or a gate, a permutation, signs,
// and products with small matrices from the left and right or a fast Hadamard transform. All in fp32, in the buffers of
// the thread that rounds the row right after; no transformed value is seen outside.
//
//   x --norm or gate, index, signs--> [outer][rows][columns] --left--> --right or butterflies--> rounding
//
// Products: strips of kPanelRows rows x 16 columns of sums in registers, one operand broadcast. Columns are padded to
// 16 in the buffers. Of what is broadcast, rows are 2 more than a multiple of 16 apart: else all lie in one bank of the
// cache, which costs a third (measured on Zen 3). Butterflies: the lowest four stages as a product with a Hadamard
// matrix of 16 (within a vector there is nothing to add across lanes), the others two at a time.
#pragma once

#include <cmath>
#include <utility>

#include "cpu/quantize_activations.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kQuantizeSerial = 1 << 15;  // values that one thread rounds alone
constexpr int64_t kSkew = 2;                  // numbers by which a row begins in another bank than the one above it
constexpr int64_t kMostSkewed = 256;          // order of a left matrix that each thread copies to skew it

// e^x, to about 2^-22 of it; 0 and infinity out of range.
TERSOR_INLINE f32 exponential(f32 x) {
  x = limit(x, -100.0f, 88.0f);
  const i32 n = round_to_codes(mul(x, splat(1.44269504f)));
  const f32 whole = to_f32(n);
  // ln 2 in two parts, the first of few bits, so that its product is exact
  const f32 r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), x));
  f32 p = splat(1.0f / 720);
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return mul(p, as_f32(sll<23>(add_i32(n, splat_i32(127)))));
}

// c[r, 0:16] = sum over i < depth of a[r, i] * b[i, 0:16]; only `count` columns are written.
template <int rows>
void product_strip(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                   int count) {
  f32 sum[rows];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) sum[r] = zero();
  for (int64_t i = 0; i < depth; ++i) {
    const f32 column = load(b + i * ldb);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sum[r] = fma(splat(a[r * lda + i]), column, sum[r]);
  }
  if (count == 16) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) store(c + r * ldc, sum[r]);
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) store_as(c + r * ldc, TERSOR_FLOAT32, sum[r], count);
}
using ProductStrip = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, int);
template <int rows>
void fill_products(ProductStrip* strips) {
  strips[rows] = product_strip<rows>;
  if constexpr (rows > 1) fill_products<rows - 1>(strips);
}

// c [m, n] = a [m, depth] b [depth, n]; b has zeros in columns from n to the next multiple of 16.
inline void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t depth, int64_t n,
                    float* c, int64_t ldc) {
  ProductStrip strips[kPanelRows + 1];
  fill_products<kPanelRows>(strips);
  const int64_t parts = div_up(m, kPanelRows);
  for (int64_t column = 0; column < n; column += 16) {
    const int count = n - column < 16 ? static_cast<int>(n - column) : 16;
    for (int64_t part = 0; part < parts; ++part) {
      const Range range = split(m, parts, part);
      float* const to = c + range.begin * ldc + column;
      strips[range.end - range.begin](a + range.begin * lda, lda, b + column, ldb, depth, to, ldc, count);
    }
  }
}

class RowTransform {
 public:
  explicit RowTransform(const IntLinearArgs& args)
      : args_(args), in_(*args.input), matrices_(in_.left || in_.right || in_.butterflies),
        stride_(matrices_ ? div_up(in_.columns, 16) * 16 : 0) {
    if (!in_.butterflies) return;
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) {
        hadamard_[16 * i + j] = __builtin_parity(i & j) ? -in_.hadamard_scale : in_.hadamard_scale;
      }
    }
  }
  bool any() const { return in_.norm_weight || in_.other || in_.index || in_.signs || matrices_; }
  // Floats of each of the two buffers.
  int64_t floats() const {
    if (!any()) return 0;
    const int64_t padded = matrices_ ? args_.k / in_.columns * (stride_ + kSkew) : 0;
    const int64_t whole = div_up(args_.k, kBlockK) * kBlockK;
    return (padded > whole ? padded : whole) + 16;
  }
  // Floats of the left matrix in a thread's memory, and its copy there.
  int64_t left_floats() const { return in_.left && in_.rows <= kMostSkewed ? in_.rows * left_stride() : 0; }
  void copy_left(float* to) const {
    for (int64_t i = 0; left_floats() && i < in_.rows; ++i) {
      std::memcpy(to + i * left_stride(), in_.left + i * in_.rows, sizeof(float) * in_.rows);
    }
  }
  // About how many operations a value takes.
  int64_t work() const { return 2 + (in_.left ? in_.rows / 8 : 0) + (in_.right ? in_.columns / 8 : 0); }

  // The transformed row, k floats in one of the buffers; `left` is what copy_left wrote.
  const float* row(int64_t token, float* a, float* b, const float* left) const {
    read(token, a);
    if (in_.index) {
      for (int64_t i = 0; i < args_.k; ++i) b[i] = a[in_.index[i]];
      std::swap(a, b);
    }
    if (in_.signs) {
      for (int64_t i = 0; i < args_.k; i += 16) store_part(a, i, mul(load_part(a, i), load_part(in_.signs, i)));
    }
    if (!matrices_) return a;
    const int64_t columns = in_.columns, lines = args_.k / columns, outer = lines / in_.rows;
    // What a product broadcasts from: rows that begin in different banks of the cache.
    const int64_t wide = in_.right ? stride_ + kSkew : stride_;
    if (!in_.left && wide != columns) {
      spread(a, b, lines, wide);
      std::swap(a, b);
    } else if (stride_ != columns) {
      spread(a, b, lines, stride_);
      std::swap(a, b);
    }
    if (in_.left) {
      const int64_t ld = left_floats() ? left_stride() : in_.rows;
      for (int64_t i = 0; i < outer; ++i) {
        product(left_floats() ? left : in_.left, ld, a + i * in_.rows * stride_, stride_, in_.rows, in_.rows, stride_,
                b + i * in_.rows * wide, wide);
      }
      std::swap(a, b);
    }
    if (in_.butterflies) return butterflies(a, b);
    if (in_.right) {
      product(a, wide, in_.right, stride_, lines, columns, columns, b, columns);
      return b;
    }
    for (int64_t line = 1; stride_ != columns && line < lines; ++line) {
      std::memmove(a + line * columns, a + line * stride_, sizeof(float) * columns);
    }
    return a;
  }

 private:
  int64_t left_stride() const { return div_up(in_.rows, 16) * 16 + kSkew; }
  // Lines of `columns` numbers, one after another, to lines of a stride, with zeros between.
  void spread(const float* from, float* to, int64_t lines, int64_t stride) const {
    const int64_t columns = in_.columns;
    for (int64_t line = 0; line < lines; ++line) {
      std::memcpy(to + line * stride, from + line * columns, sizeof(float) * columns);
      std::memset(to + line * stride + columns, 0, sizeof(float) * (stride - columns));
    }
  }
  f32 load_part(const float* x, int64_t at) const {
    if (at + 16 <= args_.k) return load(x + at);
    float padded[16] = {};
    std::memcpy(padded, x + at, sizeof(float) * (args_.k - at));
    return load(padded);
  }
  void store_part(float* x, int64_t at, f32 value) const {
    store_as(x + at, TERSOR_FLOAT32, value, args_.k - at < 16 ? static_cast<int>(args_.k - at) : 16);
  }
  f32 load_input(const void* x, int64_t at) const {
    const int size = dtype_size(args_.x_dtype);
    const char* values = static_cast<const char*>(x) + at * size;
    if (at + 16 <= args_.k) return load_as(values, args_.x_dtype);
    alignas(64) char padded[64] = {};
    std::memcpy(padded, values, (args_.k - at) * size);
    return load_as(padded, args_.x_dtype);
  }
  const char* at_row(const void* x, int64_t token, int64_t ld) const {
    return static_cast<const char*>(x) + token * ld * dtype_size(args_.x_dtype);
  }

  // The input as floats, through the norm or the gate.
  void read(int64_t token, float* to) const {
    const char* x = at_row(args_.x, token, args_.ldx);
    const int64_t k = args_.k;
    f32 factor = splat(1.0f);
    if (in_.norm_weight) {
      f32 squares = zero();
      for (int64_t i = 0; i < k; i += 16) {
        const f32 value = load_input(x, i);
        squares = fma(value, value, squares);
      }
      factor = splat(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(k) + in_.epsilon));
    }
    const char* other = in_.other ? at_row(in_.other, token, in_.ldother) : nullptr;
    for (int64_t i = 0; i < k; i += 16) {
      f32 value = load_input(x, i);
      if (in_.norm_weight) value = mul(mul(value, factor), load_input(in_.norm_weight, i));
      if (other) {
        // e^-x as a square, which becomes infinite where it must: then the gate is 0, and NaN for -infinity.
        const f32 half = exponential(mul(value, splat(-0.5f)));
        value = mul(div(value, fma(half, half, splat(1.0f))), load_input(other, i));
      }
      store_part(to, i, value);
    }
  }

  // The Hadamard matrix of `columns` on every line. Columns are a multiple of 16 here.
  const float* butterflies(float* a, float* b) const {
    const int64_t k = args_.k, columns = in_.columns;
    product(a, 16, hadamard_, 16, k / 16, 16, 16, b, 16);
    int64_t half = 16;
    for (; 4 * half <= columns; half *= 4) {
      for (int64_t begin = 0; begin < k; begin += 4 * half) {
        for (int64_t i = begin; i < begin + half; i += 16) {
          const f32 x0 = load(b + i), x1 = load(b + i + half), x2 = load(b + i + 2 * half), x3 = load(b + i + 3 * half);
          const f32 s0 = add(x0, x1), d0 = sub(x0, x1), s1 = add(x2, x3), d1 = sub(x2, x3);
          store(b + i, add(s0, s1));
          store(b + i + half, add(d0, d1));
          store(b + i + 2 * half, sub(s0, s1));
          store(b + i + 3 * half, sub(d0, d1));
        }
      }
    }
    if (half < columns) {
      for (int64_t begin = 0; begin < k; begin += 2 * half) {
        for (int64_t i = begin; i < begin + half; i += 16) {
          const f32 x0 = load(b + i), x1 = load(b + i + half);
          store(b + i, add(x0, x1));
          store(b + i + half, sub(x0, x1));
        }
      }
    }
    return b;
  }

  const IntLinearArgs& args_;
  const tersor_input& in_;
  bool matrices_;
  int64_t stride_;  // of a line in the buffers
  alignas(64) float hadamard_[256];
};

// Rounds all rows of a call.
class RowQuantizer {
 public:
  explicit RowQuantizer(const IntLinearArgs& args)
      : args_(args), transform_(args), scales_(*args.input, args.k),
        by_row_(args.input->bits < 16 && (transform_.any() || !scales_.by_block())) {}
  // Threads that work, and the memory of each.
  int threads(int most) const {
    if (!by_row_ && args_.m * args_.k < kQuantizeSerial) return 1;
    if (by_row_ && args_.m * args_.k * transform_.work() < 2 * kQuantizeSerial) return 1;
    return by_row_ && args_.m < most ? static_cast<int>(args_.m) : most;
  }
  size_t bytes() const {
    if (!by_row_) return 0;
    return align(sizeof(float) * 2 * transform_.floats()) + align(sizeof(float) * transform_.left_floats()) +
           align(sizeof(Quantum) * scales_.groups());
  }

  template <class Rows>
  void run(const Rows& x, int most, char* memory) const {
    const int count = threads(most);
    const int64_t chunks = div_up(x.shape.blocks, kChunkBlocks);
    const int64_t step = args_.ldx * dtype_size(args_.x_dtype);
    const char* values = static_cast<const char*>(args_.x);
    parallel_for(count, [&](int index) {
      if (!by_row_) {
        const Range range = split(args_.m * chunks, count, index);
        for (int64_t i = range.begin; i < range.end; ++i) {
          x.quantize(values + i / chunks * step, args_.x_dtype, i / chunks, i % chunks, nullptr);
        }
        return;
      }
      char* const mine = memory + index * bytes();
      float* const a = reinterpret_cast<float*>(mine);
      float* const left = reinterpret_cast<float*>(mine + align(sizeof(float) * 2 * transform_.floats()));
      Quantum* const quanta = reinterpret_cast<Quantum*>(reinterpret_cast<char*>(left) +
                                                         align(sizeof(float) * transform_.left_floats()));
      transform_.copy_left(left);
      const Range range = split(args_.m, count, index);
      for (int64_t token = range.begin; token < range.end; ++token) {
        const char* row = values + token * step;
        int dtype = args_.x_dtype;
        if (transform_.any()) {
          row = reinterpret_cast<const char*>(transform_.row(token, a, a + transform_.floats(), left));
          dtype = TERSOR_FLOAT32;
        }
        if (!scales_.by_block()) scales_.find(row, dtype, quanta);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          x.quantize(row, dtype, token, chunk, scales_.by_block() ? nullptr : quanta);
        }
      }
    });
  }

 private:
  static size_t align(size_t bytes) { return (bytes + 63) / 64 * 64; }

  const IntLinearArgs& args_;
  RowTransform transform_;
  RowScales scales_;
  bool by_row_;
};

}  // namespace
}  // namespace tersor::TERSOR_ISA
