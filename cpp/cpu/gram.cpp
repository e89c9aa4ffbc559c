// gram += x^T x for x [tokens, k]: what Hessians of layers are made of. Upper triangle, float32 sums.
//
//   x --converted, chunk by chunk--> panels of 16 * kPanelTiles columns   [panel][token][column]
//                                    panels of kPanelRows columns         [panel][token][column]
//   microkernel: one panel of each kind -> kPanelRows x 16 * kPanelTiles sums in registers, over a whole chunk
//
// A chunk's narrow panels of kBlockPanels stay in the L2 cache while its wide panels pass by. Half of the products
// are left out, in steps of a microkernel: what is below the diagonal in a block that meets it is written as well.
//
// AVX2: 6 x 16 sums take 12 registers; a token is 12 fma for 2 loads and 6 broadcasts, bound by the two fma a cycle.
// Measured on Zen 3, 2 threads, k = 4096: 82 % of the fma peak, packing and the result's traffic (read and written once
// per chunk) included; chunks of 256 tokens 75 to 78 %, of 512 70 to 81 %.
#include <atomic>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/int_layout.h"
#include "cpu/isa.h"
#include "cpu/simd.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kChunk = 320;    // tokens: a wide panel of AVX2 takes 20 KiB of L1
constexpr int kBlockPanels = 16;  // narrow panels of one item of work
constexpr int kStripPanels = 32;  // wide panels of one item
constexpr int64_t kWorkPerThread = 1 << 20;  // products below which another thread costs more
constexpr int kWide = 16 * kPanelTiles;

struct Panels {
  float *narrow, *wide;  // [panels][kChunk][kPanelRows], [panels][kChunk][kWide]
  int64_t narrow_count, wide_count;
  const float* narrow_at(int64_t i) const { return narrow + i * kChunk * kPanelRows; }
  const float* wide_at(int64_t i) const { return wide + i * kChunk * kWide; }
};

// Columns of one token, beyond k zeros.
void load_columns(const GramArgs& args, const char* row, int64_t column, float (&to)[kWide]) {
  const int size = dtype_size(args.x_dtype);
  for (int t = 0; t < kPanelTiles; ++t, column += 16) {
    if (column + 16 <= args.k) {
      store(to + 16 * t, load_as(row + column * size, args.x_dtype));
    } else {
      for (int i = 0; i < 16; ++i) {
        to[16 * t + i] = column + i < args.k ? load_as_float(row, args.x_dtype, column + i) : 0;
      }
    }
  }
}

// Wide panel `index` of a chunk, and its columns of the narrow ones.
void pack(const GramArgs& args, const Panels& panels, int64_t index, int64_t first, int64_t tokens) {
  float* wide = panels.wide + index * kChunk * kWide;
  for (int64_t token = 0; token < tokens; ++token) {
    const char* row = static_cast<const char*>(args.x) + (first + token) * args.ldx * dtype_size(args.x_dtype);
    alignas(64) float columns[kWide];
    load_columns(args, row, index * kWide, columns);
    std::memcpy(wide + token * kWide, columns, sizeof columns);
    int64_t column = index * kWide;
    for (int i = 0; i < kWide; ++i, ++column) {
      if (column >= panels.narrow_count * kPanelRows) break;
      panels.narrow[(column / kPanelRows * kChunk + token) * kPanelRows + column % kPanelRows] = columns[i];
    }
  }
}

void micro(const float* narrow, const float* wide, int64_t tokens, float* gram, int64_t ld, int rows, int columns) {
  f32 acc[kPanelRows][kPanelTiles];
#pragma GCC unroll 16
  for (int r = 0; r < kPanelRows; ++r) {
    if (r < rows) __builtin_prefetch(gram + r * ld, 1);
#pragma GCC unroll 2
    for (int t = 0; t < kPanelTiles; ++t) acc[r][t] = zero();
  }
#pragma GCC unroll 4
  for (int64_t token = 0; token < tokens; ++token) {
    f32 b[kPanelTiles];
#pragma GCC unroll 2
    for (int t = 0; t < kPanelTiles; ++t) b[t] = load(wide + 16 * t);
#pragma GCC unroll 16
    for (int r = 0; r < kPanelRows; ++r) {
      const f32 a = splat(narrow[r]);
#pragma GCC unroll 2
      for (int t = 0; t < kPanelTiles; ++t) acc[r][t] = fma(a, b[t], acc[r][t]);
    }
    wide += kWide;
    narrow += kPanelRows;
  }
  const bool whole = rows == kPanelRows && columns == kWide;
#pragma GCC unroll 16
  for (int r = 0; r < kPanelRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 2
    for (int t = 0; t < kPanelTiles; ++t) {
      float* to = gram + r * ld + 16 * t;
      if (whole) {
        store(to, add(load(to), acc[r][t]));
      } else {
        alignas(64) float sums[16];
        store(sums, acc[r][t]);
        for (int i = 0; i < 16 && 16 * t + i < columns; ++i) to[i] += sums[i];
      }
    }
  }
}

// Narrow panels [first, last) times the wide panels of one strip that are not wholly below the diagonal.
void multiply(const GramArgs& args, const Panels& panels, int64_t first, int64_t last, Range strip, int64_t tokens) {
  for (int64_t j = strip.begin; j < strip.end; ++j) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i * kPanelRows, column = j * kWide;
      if (column + kWide <= row) break;
      const int64_t rows = args.k - row < kPanelRows ? args.k - row : kPanelRows;
      const int64_t columns = args.k - column < kWide ? args.k - column : kWide;
      micro(panels.narrow_at(i), panels.wide_at(j), tokens, args.gram + row * args.k + column, args.k,
            static_cast<int>(rows), static_cast<int>(columns));
    }
  }
}

}  // namespace

int gram(const GramArgs& args) {
  Panels panels{nullptr, nullptr, div_up(args.k, kPanelRows), div_up(args.k, kWide)};
  Scratch scratch;
  scratch.reserve<float>(panels.narrow_count * kChunk * kPanelRows);
  scratch.reserve<float>(panels.wide_count * kChunk * kWide);
  if (!scratch.allocate()) return fail(TERSOR_NO_MEMORY, "no memory for the panels of %lld columns", (long long)args.k);
  panels.narrow = scratch.take<float>(panels.narrow_count * kChunk * kPanelRows);
  panels.wide = scratch.take<float>(panels.wide_count * kChunk * kWide);
  // Columns from k on, which no wide panel may reach.
  const size_t narrow_panel = size_t(kChunk) * kPanelRows;
  std::memset(panels.narrow + (panels.narrow_count - 1) * narrow_panel, 0, sizeof(float) * narrow_panel);
  const int64_t useful = 1 + args.tokens * args.k * args.k / kWorkPerThread;
  const int threads = useful < args.threads ? static_cast<int>(useful) : args.threads;
  const int64_t blocks = div_up(panels.narrow_count, kBlockPanels), strips = div_up(panels.wide_count, kStripPanels);
  for (int64_t first = 0; first < args.tokens; first += kChunk) {
    const int64_t tokens = args.tokens - first < kChunk ? args.tokens - first : kChunk;
    parallel_for(threads, [&](int index) {
      const Range mine = split(panels.wide_count, threads, index);
      for (int64_t i = mine.begin; i < mine.end; ++i) pack(args, panels, i, first, tokens);
    });
    std::atomic<int64_t> next{0};  // items are taken as threads come free: those at the diagonal are smaller
    parallel_for(threads, [&](int) {
      for (int64_t item; (item = next.fetch_add(1)) < blocks * strips;) {
        const int64_t i = item / strips * kBlockPanels;
        const int64_t last = i + kBlockPanels < panels.narrow_count ? i + kBlockPanels : panels.narrow_count;
        const int64_t j = item % strips * kStripPanels;
        const int64_t end = j + kStripPanels < panels.wide_count ? j + kStripPanels : panels.wide_count;
        multiply(args, panels, i, last, {j, end}, tokens);
      }
    });
  }
  return TERSOR_OK;
}

}  // namespace tersor::TERSOR_ISA
