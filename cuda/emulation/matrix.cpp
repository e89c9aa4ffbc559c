// Host versions of the warp-wide instructions and of arithmetic on 16-bit floats.
#include <cmath>

#include "emulation/internal.h"

namespace tersor {
namespace emulation {
namespace {

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float bf16_to_float(uint32_t bits) { return bits_to_float(bits << 16); }

// The double nearest to a * b + c, odd in the last bit where that is inexact: a second rounding, to fewer than
// 52 bits, then gives what one rounding of the exact value gives. The product must be exact.
double fma_to_odd(double a, double b, double c) {
  const double p = a * b, s = p + c;
  if (!(std::fabs(s) <= 1.7e308)) return s;  // infinite or NaN
  const double v = s - p, error = (p - (s - v)) + (c - v);
  if (error == 0) return s;
  uint64_t bits;
  std::memcpy(&bits, &s, 8);
  if ((bits & 1) == 0) bits += (error > 0) == (s > 0) ? 1 : -1;
  double odd;
  std::memcpy(&odd, &bits, 8);
  return odd;
}

// To a 16-bit float of `fraction` stored fraction bits and exponents from `lowest`, to nearest even.
uint32_t round_to_16(double value, int fraction, int lowest, uint32_t infinity) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return sign | infinity;
  if (magnitude == 0) return sign;
  int exponent = std::ilogb(magnitude);
  if (exponent < lowest) exponent = lowest;  // subnormal: the same spacing as the lowest normals
  const double units = std::nearbyint(std::ldexp(magnitude, fraction - exponent));  // the default mode: to even
  const uint32_t significand = static_cast<uint32_t>(units);
  // Carries from the significand run into the exponent field, as they should.
  const uint32_t bits = (static_cast<uint32_t>(exponent - lowest) << fraction) + significand;
  return sign | (bits < infinity ? bits : infinity);
}

uint32_t round_to(Format16 format, double value) {
  return format == f16 ? round_to_16(value, 10, -14, 0x7c00) : round_to_16(value, 7, -126, 0x7f80);
}

float to_float(Format16 format, uint32_t bits) { return format == f16 ? f16_to_float(bits) : bf16_to_float(bits); }

// ---- fragments -------------------------------------------------------------------------------------------
// in[lane]: a (4 words), b (4), metadata; out[lane]: d (4).
struct Shape {
  int bits;   // of an element
  int k;      // columns of A as multiplied
  bool sparse;
};
constexpr Shape shapes[mma_kinds] = {{16, 16, false}, {16, 16, false}, {8, 32, false}, {4, 64, false},
                                     {1, 256, false}, {16, 32, true},  {16, 32, true}, {8, 64, true}};

template <int bits, class Element, class T>
void unpack_a(const Warp& warp, int columns, const Element& element, T* a) {  // a[16][columns]
  constexpr int e = 32 / bits;
  constexpr uint32_t mask = bits == 32 ? ~0u : (1u << bits) - 1;
  for (int lane = 0; lane < 32; ++lane)
    for (int reg = 0; reg < 4; ++reg) {
      T* row = a + (lane / 4 + 8 * (reg & 1)) * columns + lane % 4 * e + (reg >> 1) * (columns / 2);
      for (int i = 0; i < e; ++i) row[i] = element(warp.in[lane][reg] >> (bits * i) & mask);
    }
}

template <int bits, class Element, class T>
void unpack_b(const Warp& warp, int rows, const Element& element, T* b) {  // b[rows][8]
  constexpr int e = 32 / bits;
  constexpr uint32_t mask = (1u << bits) - 1;
  for (int lane = 0; lane < 32; ++lane)
    for (int reg = 0; reg < rows / (4 * e); ++reg)
      for (int i = 0; i < e; ++i)
        b[(lane % 4 * e + reg * 4 * e + i) * 8 + lane / 4] = element(warp.in[lane][4 + reg] >> (bits * i) & mask);
}

template <class T>
void multiply(Warp& warp, int k, const T* a, const T* b) {
  T c[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      std::memcpy(&c[lane / 4 + 8 * (i >> 1)][lane % 4 * 2 + (i & 1)], &warp.out[lane][i], 4);
  for (int m = 0; m < 16; ++m)
    for (int i = 0; i < k; ++i) {
      const T x = a[m * k + i];
      for (int n = 0; n < 8; ++n) c[m][n] += x * b[i * 8 + n];
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      T& value = c[lane / 4 + 8 * (i >> 1)][lane % 4 * 2 + (i & 1)];
      if (value != value) {
        warp.out[lane][i] = 0x7fffffff;
      } else {
        std::memcpy(&warp.out[lane][i], &value, 4);
      }
    }
}

// Which lane's metadata, from which bit on, holds the 2-bit indices of row `row` from stored column `column`
// (a multiple of 8) on. PTX ISA, "Matrix fragments for multiply-accumulate operation with sparse matrix A".
struct Source {
  int lane, bit;
};
Source metadata_16(int row, int column, int selector) {  // m16n8k32 of 16-bit elements
  return {row % 8 * 4 + selector * 2 + column / 8, row / 8 * 16};
}
Source metadata_8(int row, int column) {  // m16n8k64 of 8-bit elements
  return {row % 8 * 4 + column / 16 * 2 + row / 8, column / 8 % 2 * 16};
}

// Spreads stored columns (half of k) to the columns that the metadata names.
template <class T>
void expand(Warp& warp, int k, bool wide, int selector, const T* stored, T* a) {
  std::memset(a, 0, sizeof(T) * 16 * static_cast<size_t>(k));
  for (int row = 0; row < 16; ++row)
    for (int pair = 0; pair < k / 4; ++pair) {
      const int column = pair * 2;
      const Source source = wide ? metadata_16(row, column & ~7, selector) : metadata_8(row, column & ~7);
      const uint32_t indices = warp.in[source.lane][8] >> (source.bit + 2 * (column & 7)) & 15;
      const int first = indices & 3, second = indices >> 2;
      if (first >= second)
        violation("sparse mma: row %d, columns %d to %d: metadata of lane %d has indices %d, %d; strictly ascending "
                  "ones are wanted", row, pair * 4, pair * 4 + 3, source.lane, first, second);
      a[row * k + pair * 4 + first] = stored[row * (k / 2) + column];
      a[row * k + pair * 4 + second] = stored[row * (k / 2) + column + 1];
    }
}

int32_t sign_extend(uint32_t value, int bits) {
  return static_cast<int32_t>(value << (32 - bits)) >> (32 - bits);
}

void multiply_b1(Warp& warp) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      uint32_t& d = warp.out[m % 8 * 4 + n / 2][m / 8 * 2 + n % 2];
      for (int t = 0; t < 4; ++t)
        for (int half = 0; half < 2; ++half)
          d += static_cast<uint32_t>(
              __builtin_popcount(warp.in[m % 8 * 4 + t][half * 2 + m / 8] & warp.in[n * 4 + t][4 + half]));
    }
}

void finish_mma(Warp& warp) {
  const Mma kind = static_cast<Mma>(warp.detail >> 1);
  const int selector = warp.detail & 1;
  const Shape shape = shapes[static_cast<int>(kind)];
  const int k = shape.k, stored = shape.sparse ? k / 2 : k;
  count_mma(kind);
  if (kind == Mma::m16n8k256_b1) return multiply_b1(warp);
  if (shape.bits == 16) {
    alignas(64) float a[16 * 32], b[32 * 8], packed[16 * 16];
    float* target = shape.sparse ? packed : a;
    if (kind == Mma::m16n8k16_f16 || kind == Mma::sp_m16n8k32_f16) {
      unpack_a<16>(warp, stored, f16_to_float, target);
      unpack_b<16>(warp, k, f16_to_float, b);
    } else {
      unpack_a<16>(warp, stored, bf16_to_float, target);
      unpack_b<16>(warp, k, bf16_to_float, b);
    }
    if (shape.sparse) expand(warp, k, true, selector, packed, a);
    multiply(warp, k, a, b);
    return;
  }
  // Unsigned arithmetic: it wraps as the machine's does.
  alignas(64) uint32_t a[16 * 64], b[64 * 8], packed[16 * 32];
  uint32_t* target = shape.sparse ? packed : a;
  if (shape.bits == 8) {
    const auto element = [](uint32_t v) { return static_cast<uint32_t>(sign_extend(v, 8)); };
    unpack_a<8>(warp, stored, element, target);
    unpack_b<8>(warp, k, element, b);
  } else {
    const auto element = [](uint32_t v) { return static_cast<uint32_t>(sign_extend(v, 4)); };
    unpack_a<4>(warp, stored, element, target);
    unpack_b<4>(warp, k, element, b);
  }
  if (shape.sparse) expand(warp, k, false, 0, packed, a);
  // c is compared with itself for NaN in `multiply`, which integers never are.
  multiply(warp, k, a, b);
}

void finish_load_matrix(Warp& warp) {
  const int count = static_cast<int>(warp.detail >> 1);
  const bool transposed = warp.detail & 1;
  uint32_t rows[32];
  for (int i = 0; i < count; ++i) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      Thread& owner = warp.block->threads[warp.first + i * 8 + r];
      rows[i * 8 + r] = warp.in[i * 8 + r][0];
      std::memcpy(matrix[r], shared_row(owner, rows[i * 8 + r]), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = transposed ? matrix[t][g] : matrix[g][t];
      const uint32_t high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
      warp.out[lane][i] = low | high << 16;
    }
  }
  count_matrix_rows(rows, count * 8);
}

}  // namespace

float f16_to_float(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16;
  const uint32_t magnitude = (bits & 0x7fff) << 13;
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | (magnitude + 0x70000000u));  // Inf, NaN
  // At the top of fp32's fields the exponent is too small by 112.
  uint32_t scaled_bits;
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);
  std::memcpy(&scaled_bits, &scaled, 4);
  return bits_to_float(sign | scaled_bits);
}

uint32_t pack(Format16 format, float low, float high) { return round_to(format, low) | round_to(format, high) << 16; }

uint32_t fma_pair(Format16 format, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const double x = to_float(format, a >> shift & 0xffff), y = to_float(format, b >> shift & 0xffff),
                 z = to_float(format, c >> shift & 0xffff);
    result |= round_to(format, fma_to_odd(x, y, z)) << shift;
  }
  return result;
}

void mma(Mma kind, void* d, const uint32_t* a, const uint32_t* b, uint32_t metadata, int selector) {
  Warp& warp = *current->warp;
  const int lane = current->lane;
  const Shape& shape = shapes[static_cast<int>(kind)];
  std::memcpy(&warp.in[lane][0], a, 16);
  std::memcpy(&warp.in[lane][4], b, shape.sparse ? 16 : 8);
  warp.in[lane][8] = metadata;
  std::memcpy(warp.out[lane], d, 16);
  collective(Collective::mma, static_cast<uint32_t>(kind) << 1 | static_cast<uint32_t>(selector), finish_mma);
  std::memcpy(d, warp.out[lane], 16);
}

void load_matrix(uint32_t* registers, int count, uint32_t row_address, bool transposed) {
  Warp& warp = *current->warp;
  const int lane = current->lane;
  warp.in[lane][0] = row_address;
  collective(Collective::load_matrix, static_cast<uint32_t>(count) << 1 | (transposed ? 1u : 0u), finish_load_matrix);
  std::memcpy(registers, warp.out[lane], 4 * static_cast<size_t>(count));
}

void shuffle_bytes(void* value, int bytes, int from) {
  Warp& warp = *current->warp;
  const int lane = current->lane;
  std::memcpy(warp.in[lane], value, bytes);
  warp.in[lane][4] = static_cast<uint32_t>(from);
  collective(Collective::shuffle, static_cast<uint32_t>(bytes), [](Warp& w) {
    for (int i = 0; i < 32; ++i) std::memcpy(w.out[i], w.in[w.in[i][4]], 8);
  });
  std::memcpy(value, warp.out[lane], bytes);
}

uint32_t ballot(bool predicate) {
  Warp& warp = *current->warp;
  warp.in[current->lane][0] = predicate;
  collective(Collective::ballot, 0, [](Warp& w) {
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= w.in[i][0] << i;
    for (int i = 0; i < 32; ++i) w.out[i][0] = mask;
  });
  return warp.out[current->lane][0];
}

}  // namespace emulation
}  // namespace tersor
