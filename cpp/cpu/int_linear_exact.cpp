// Integer weights times activations as they are (act_bits 16), compiled once per instruction set.
//
// Few rows (m <= kFused): one pass over the packed stream. Codes become operands in registers and are
// used at once for all rows; the stream of a tile is sequential and prefetched, so m = 1 runs at the
// speed of memory or of the decode, whichever is slower.
//
// Very few rows of 16-bit values, where converting codes is what costs most: products of integers instead
// (int_linear_limbs in int_linear_a8.cpp).
//
// More rows: panels. A tile's codes for 8 blocks of k become operands in a buffer that stays in L1
// (16 KiB), and a register-blocked microkernel runs all strips of rows over it. Rows beyond 240 come in
// row blocks, so that a row block's activations for 8 blocks of k stay in L2.
//
//   w = (code - zero_point) * scale. Sums run over codes (or codes minus a centre) inside a segment of
//   at most 256 k; then sum * scale is added to the result in fp32. What the zero point takes away is
//   applied block by block (few rows) or once per segment on centred codes (panels): the terms never
//   grow far beyond the result, so a mean in x does not cancel badly.
//
// The order of every sum depends on m, never on the number of threads.
//
// AVX-512 inner loops, predicted, not measured (llvm-mca 19, Zen 4/5 model, which issues 512-bit operations
// in two halves; vdpbf16ps counted as an FMA, because that model has no sound figure for it), in cycles:
//   4-bit block (16 rows of weights x 32 k, 256 bytes), bf16: m = 1: 40   4: 121   8: 242   16: 479
//   1 row, other widths: 3-bit block (192 bytes) 44, 8-bit block (512 bytes) 71
//   microkernel, 12 rows x 32 weight rows x 8 k: 144 for 96 vdpbf16ps
// None of these loops spills. The tests run this source for AVX-512 under emulation.
#include <utility>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/exact_activations.h"
#include "cpu/int_scales_vector.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int kRowBlock = 240;
constexpr int kTileGroup = 8;            // tiles whose sums are kept while k is walked
constexpr int64_t kPanelFloats = kSegmentBlocks * 32 * 16;
constexpr int64_t kPrefetch = 8192;      // bytes ahead in the weight stream
constexpr int64_t kWorkPerThread = 1 << 19;  // weights x rows below which another thread costs more

// The steps of a block, to unroll flat: a recursion would be inlined again at each of its levels.
template <class A>
using AllSteps = std::make_integer_sequence<int, A::kSteps>;

// Everything about one tile of one projection.
struct Tile {
  const uint8_t* weights;
  const char* scales;
  const uint8_t* zero_points;  // or null
  const tersor_projection* projection;
  int64_t row;  // of the weight
};

// All tiles of all projections, numbered through.
struct Tiles {
  const IntLinearArgs& args;
  IntShape shape;
  int64_t total = 0;
  explicit Tiles(const IntLinearArgs& a) : args(a), shape(int_shape(0, a.k, a.bits, a.group_size)) {
    for (int i = 0; i < a.count; ++i) total += div_up(a.projections[i].n, kTileRows);
  }
  Tile operator[](int64_t index) const {
    const tersor_projection* p = args.projections;
    while (index >= div_up(p->n, kTileRows)) index -= div_up((p++)->n, kTileRows);
    return {p->qweight + index * shape.tile_bytes(),
            static_cast<const char*>(p->scales) + index * scale_tile_bytes(args.scale_dtype, shape.groups),
            p->zero_points ? p->zero_points + index * shape.groups * kTileRows : nullptr, p, index * kTileRows};
  }
};

// y[row, tile] = sums + bias, rounded once.
void finish(const IntLinearArgs& args, const Tile& tile, int64_t row, f32 sums) {
  const tersor_projection& p = *tile.projection;
  const int64_t left = p.n - tile.row, size = dtype_size(args.x_dtype);
  const int count = left < kTileRows ? static_cast<int>(left) : kTileRows;
  if (p.bias) {
    const char* bias = static_cast<const char*>(p.bias) + tile.row * size;
    alignas(64) char padded[kTileRows * 4] = {};
    if (count < kTileRows) bias = static_cast<const char*>(std::memcpy(padded, bias, count * size));
    sums = add(sums, load_as(bias, args.x_dtype));
  }
  store_as(static_cast<char*>(p.y) + (row * p.ldy + tile.row) * size, args.x_dtype, sums, count);
}

// centre - zero_point for the 16 rows of a group: what each unit of x's sum adds.
TERSOR_INLINE f32 correction(const Tile& tile, int64_t group, int bits, int centre) {
  if (!tile.zero_points) return splat(static_cast<float>(centre - (1 << (bits - 1))));
  return sub(splat(static_cast<float>(centre)), load_u8(tile.zero_points + group * kTileRows));
}

TERSOR_INLINE f32 load_scales(const Tiles& tiles, const Tile& tile, int64_t group) {
  return group_scales(tile.scales, tiles.args.scale_dtype, tiles.shape.groups, group);
}

// --- few rows --------------------------------------------------------------------------------------

// Independent sums per row, to hide the latency of an FMA when there are few rows.
constexpr int chains(int rows) {
  return kChains >= 4 * rows ? 4 : kChains >= 2 * rows ? 2 : 1;  // powers of two, for exact parts of a sum
}

template <class A, int bits, int rows, int step>
TERSOR_INLINE void fused_step(f32 (&acc)[rows][chains(rows)], const uint8_t* block, const typename A::Element* a,
                              const typename A::template Table<bits>& table) {
  const typename A::Operand w = A::template decode<bits, step>(block, table);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    f32& sum = acc[r][step % chains(rows)];
    sum = A::madd(sum, w, A::broadcast(a[step * rows + r]));
  }
}

template <class A, int bits, int rows, int... steps>
TERSOR_INLINE void fused_block(f32 (&acc)[rows][chains(rows)], const uint8_t* block, const typename A::Element* a,
                               const typename A::template Table<bits>& table, std::integer_sequence<int, steps...>) {
  (fused_step<A, bits, rows, steps>(acc, block, a, table), ...);
}

template <class A, int bits, int rows>
void fused(int m, const Tiles& tiles, const Activations<A>& x, int64_t first, int64_t last) {
  const Segments segments(tiles.shape);
  const typename A::template Table<bits> table;
  for (int64_t index = first; index < last; ++index) {
    const Tile tile = tiles[index];
    const bool corrected = tile.zero_points || A::centre(bits) != 1 << (bits - 1);
    f32 total[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) total[r] = zero();
    for (int64_t segment = 0; segment < segments.count; ++segment) {
      const int64_t group = segments.group(segment);
      const f32 scale = load_scales(tiles, tile, group);
      const f32 unit = correction(tile, group, bits, A::centre(bits));
      f32 acc[rows][chains(rows)];
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < chains(rows); ++c) acc[r][c] = zero();
      }
      const int64_t end = segments.end(segment);
      for (int64_t block = segments.begin(segment); block < end; ++block) {
        const uint8_t* codes = tile.weights + block * 64 * bits;
#pragma GCC unroll 8
        for (int i = 0; i < bits; ++i) __builtin_prefetch(codes + kPrefetch + 64 * i);
        if constexpr (!A::kPairs) {
#pragma GCC unroll 16
          for (int r = 0; r < rows; ++r) {
            // Every chain takes its part, so that none of them grows on its own.
            const f32 part = splat(x.block_sums[block * rows + r] * (1.0f / chains(rows)));
            for (int c = 0; c < chains(rows); ++c) acc[r][c] = fma(unit, part, acc[r][c]);
          }
        }
        fused_block<A, bits, rows>(acc, codes, x.elements + block * A::kSteps * rows, table, AllSteps<A>());
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        f32 sum = acc[r][0];
        for (int c = 1; c < chains(rows); ++c) sum = add(sum, acc[r][c]);
        if (A::kPairs && corrected) sum = fma(unit, splat(x.segment_sums[segment * rows + r]), sum);
        total[r] = fma(scale, sum, total[r]);
      }
    }
    for (int r = 0; r < m; ++r) finish(tiles.args, tile, r, total[r]);
  }
}

// Compiled for 1 to 6, 8, 12 and 16 rows; what is added to fill a strip are rows of zeros.
constexpr int fused_rows(int m) { return m <= 6 ? m : m <= 8 ? 8 : (m + 3) / 4 * 4; }
constexpr int fewer_fused_rows(int rows) { return rows > 8 ? rows - 4 : rows == 8 ? 6 : rows - 1; }

template <class A, int bits, int rows>
void fused_for(int m, const Tiles& tiles, const Activations<A>& x, int64_t first, int64_t last) {
  if (fused_rows(m) == rows) return fused<A, bits, rows>(m, tiles, x, first, last);
  if constexpr (rows > 1) fused_for<A, bits, fewer_fused_rows(rows)>(m, tiles, x, first, last);
}

// --- panels ----------------------------------------------------------------------------------------

template <class A, int bits, int... steps>
TERSOR_INLINE void panel_block(const uint8_t* block, float* panel, const typename A::template Table<bits>& table,
                               std::integer_sequence<int, steps...>) {
  (A::store_weights(panel + 16 * steps, A::template decode_panel<bits, steps>(block, table)), ...);
}

template <class A, int bits>
void fill_panel(const uint8_t* codes, int64_t blocks, float* panel) {
  const typename A::template Table<bits> table;
  for (int64_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 8
    for (int i = 0; i < bits; ++i) __builtin_prefetch(codes + 4096 + 64 * i);
    panel_block<A, bits>(codes, panel, table, AllSteps<A>());
    codes += 64 * bits;
    panel += 16 * A::kSteps;
  }
}

// One segment of `rows` rows x `tiles` tiles: sums += scale * (a . panel + unit * sum of x).
template <class A, int rows, int tiles>
void micro(const float* panel, const typename A::Element* a, int64_t steps, const float* scales, const float* units,
           const float* x_sums, float* sums, int64_t tile_stride) {
  f32 acc[rows][tiles];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < tiles; ++t) acc[r][t] = zero();
  }
#pragma GCC unroll 4
  for (int64_t step = 0; step < steps; ++step) {
    typename A::Operand w[tiles];
#pragma GCC unroll 2
    for (int t = 0; t < tiles; ++t) w[t] = A::load_weights(panel + t * kPanelFloats + 16 * step);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const typename A::Operand b = A::broadcast(a[step * rows + r]);
#pragma GCC unroll 2
      for (int t = 0; t < tiles; ++t) acc[r][t] = A::madd(acc[r][t], w[t], b);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < tiles; ++t) {
      f32 sum = acc[r][t];
      if (units) sum = fma(load(units + 16 * t), splat(x_sums[r]), sum);
      float* to = sums + t * tile_stride + 16 * r;
      store(to, fma(load(scales + 16 * t), sum, load(to)));
    }
  }
}

template <class A>
using Micro = void (*)(const float*, const typename A::Element*, int64_t, const float*, const float*, const float*,
                       float*, int64_t);

template <class A, int tiles, int rows = kPanelRows>
Micro<A> micro_for(int m) {
  if (m == rows) return micro<A, rows, tiles>;
  if constexpr (rows > 1) return micro_for<A, tiles, rows - 1>(m);
  return nullptr;
}

// What one thread needs for panels, and the strips it walks.
template <class A>
struct PanelJob {
  const Tiles& tiles;
  const Activations<A>& x;
  void (*fill)(const uint8_t*, int64_t, float*);
  int panel_centre;
  int64_t first_row, rows, strips;  // of the row block
  Micro<A> kernels[kPanelTiles][kPanelRows + 1];

  static size_t floats() {
    return kPanelTiles * (kPanelFloats + 2 * kSegmentBlocks * 16) + kTileGroup * kRowBlock * 16;
  }

  void run(float* buffer, Range tile_range, Range strip_range) const {
    float* const panel = buffer;
    float* const scales = panel + kPanelTiles * kPanelFloats;       // [segment][tile][16]
    float* const units = scales + kPanelTiles * kSegmentBlocks * 16;
    float* const sums = units + kPanelTiles * kSegmentBlocks * 16;  // [tile][row][16]
    const int64_t top = split(rows, strips, strip_range.begin).begin;
    const int64_t bottom = split(rows, strips, strip_range.end - 1).end;
    const int64_t tile_stride = (bottom - top) * 16;
    const Segments segments(tiles.shape);
    for (int64_t base = tile_range.begin; base < tile_range.end; base += kTileGroup) {
      const int64_t group_tiles = tile_range.end - base < kTileGroup ? tile_range.end - base : kTileGroup;
      std::memset(sums, 0, sizeof(float) * group_tiles * tile_stride);
      for (int64_t s0 = 0, s1; s0 < segments.count; s0 = s1) {
        // As many whole segments as fit the panel.
        const int64_t b0 = segments.begin(s0);
        for (s1 = s0 + 1; s1 < segments.count && segments.end(s1) - b0 <= kSegmentBlocks; ++s1) {
        }
        for (int64_t t = 0; t < group_tiles; t += kPanelTiles) {
          const int width = group_tiles - t < kPanelTiles ? 1 : kPanelTiles;
          const bool corrected = load_panel(base + t, width, segments, s0, s1, panel, scales, units);
          for (int64_t strip = strip_range.begin; strip < strip_range.end; ++strip) {
            const Range range = split(rows, strips, strip);
            const int height = static_cast<int>(range.end - range.begin);
            const Micro<A> kernel = kernels[width - 1][height];
            for (int64_t s = s0; s < s1; ++s) {
              const int64_t begin = segments.begin(s), steps = (segments.end(s) - begin) * A::kSteps;
              kernel(panel + (begin - b0) * A::kSteps * 16, x.strip(range.begin) + begin * A::kSteps * height, steps,
                     scales + (s - s0) * kPanelTiles * 16, corrected ? units + (s - s0) * kPanelTiles * 16 : nullptr,
                     x.strip_segment_sums(range.begin) + s * height, sums + t * tile_stride + (range.begin - top) * 16,
                     tile_stride);
            }
          }
        }
      }
      for (int64_t t = 0; t < group_tiles; ++t) {
        const Tile tile = tiles[base + t];
        for (int64_t row = top; row < bottom; ++row) {
          finish(tiles.args, tile, first_row + row, load(sums + t * tile_stride + (row - top) * 16));
        }
      }
    }
  }

  bool load_panel(int64_t index, int width, const Segments& segments, int64_t s0, int64_t s1, float* panel,
                  float* scales, float* units) const {
    bool corrected = false;
    for (int w = 0; w < width; ++w) {
      const Tile tile = tiles[index + w];
      const int64_t b0 = segments.begin(s0);
      fill(tile.weights + b0 * 64 * tiles.args.bits, segments.end(s1 - 1) - b0, panel + w * kPanelFloats);
      corrected |= tile.zero_points || panel_centre != 1 << (tiles.args.bits - 1);
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t at = ((s - s0) * kPanelTiles + w) * 16, group = segments.group(s);
        store(scales + at, load_scales(tiles, tile, group));
        store(units + at, correction(tile, group, tiles.args.bits, panel_centre));
      }
    }
    return corrected;
  }
};

// --- one call --------------------------------------------------------------------------------------

// Lays out scratch memory for `rows` rows of activations.
template <class A>
struct Plan {
  Scratch scratch;
  Activations<A> x;
  float* buffers = nullptr;

  bool allocate(int64_t rows, const IntShape& shape, int64_t segments, size_t buffer_floats) {
    const size_t elements = rows * shape.blocks * A::kSteps, block_sums = rows * shape.blocks;
    scratch.reserve<typename A::Element>(elements);
    scratch.reserve<float>(block_sums);
    scratch.reserve<float>(rows * segments);
    scratch.reserve<float>(buffer_floats);
    if (!scratch.allocate()) return false;
    x.elements = scratch.take<typename A::Element>(elements);
    x.block_sums = scratch.take<float>(block_sums);
    x.segment_sums = scratch.take<float>(rows * segments);
    buffers = scratch.take<float>(buffer_floats);
    x.blocks = shape.blocks;
    x.segments = segments;
    return true;
  }
};

template <class A, int bits>
void prepare(const Activations<A>& x, const IntLinearArgs& args, const Segments& segments, int64_t first_row,
             int64_t rows, int64_t strips) {
  // Below about 64k values one thread is done before others wake up.
  const int64_t parts = rows * args.k < 65536 ? 1 : args.threads;
  const int64_t pieces = strips >= parts ? 1 : segments.count < parts ? segments.count : parts;
  parallel_for(static_cast<int>(parts), [&](int index) {
    const Range mine = split(strips * pieces, static_cast<int>(parts), index);
    for (int64_t item = mine.begin; item < mine.end; ++item) {
      const Range range = split(rows, strips, item / pieces);
      const Range part = split(segments.count, pieces, item % pieces);
      prepare_strip<A, bits>(x, args, segments, range.begin, static_cast<int>(range.end - range.begin), first_row,
                             part.begin, part.end);
    }
  });
}

template <class A, int bits>
int run(const IntLinearArgs& args) {
  const Tiles tiles(args);
  const Segments segments(tiles.shape);
  const int64_t work = tiles.total * 16 * args.k * args.m;
  int64_t threads = work / kWorkPerThread + 1;
  if (threads > args.threads) threads = args.threads;
  Plan<A> plan;

  if (args.m <= A::kFused) {
    const int rows = fused_rows(static_cast<int>(args.m));
    if (!plan.allocate(rows, tiles.shape, segments.count, 0)) {
      return fail(TERSOR_NO_MEMORY, "no memory to prepare activations of %lld x %lld", (long long)args.m,
                  (long long)args.k);
    }
    prepare<A, bits>(plan.x, args, segments, 0, rows, 1);
    const int parts = static_cast<int>(threads < tiles.total ? threads : tiles.total);
    parallel_for(parts, [&](int index) {
      const Range mine = split(tiles.total, parts, index);
      fused_for<A, bits, A::kFused>(static_cast<int>(args.m), tiles, plan.x, mine.begin, mine.end);
    });
    return TERSOR_OK;
  }

  const int64_t row_blocks = div_up(args.m, kRowBlock), most_rows = div_up(args.m, row_blocks);
  const int64_t pairs = div_up(tiles.total, kPanelTiles);
  const int across = static_cast<int>(threads < pairs ? threads : pairs);
  const int64_t most_strips = div_up(most_rows, kPanelRows);
  const int64_t wanted_down = threads / across;
  const int down = static_cast<int>(wanted_down < most_strips ? wanted_down : most_strips);
  if (!plan.allocate(most_rows, tiles.shape, segments.count, across * down * PanelJob<A>::floats())) {
    return fail(TERSOR_NO_MEMORY, "no memory to prepare activations of %lld x %lld", (long long)most_rows,
                (long long)args.k);
  }
  PanelJob<A> job{tiles, plan.x, fill_panel<A, bits>, A::panel_centre(bits), 0, 0, 0, {}};
  for (int rows = 1; rows <= kPanelRows; ++rows) {
    job.kernels[0][rows] = micro_for<A, 1>(rows);
    job.kernels[kPanelTiles - 1][rows] = micro_for<A, kPanelTiles>(rows);
  }
  for (int64_t block = 0; block < row_blocks; ++block) {
    const Range range = split(args.m, row_blocks, block);
    job.first_row = range.begin;
    job.rows = range.end - range.begin;
    job.strips = div_up(job.rows, kPanelRows);
    prepare<A, bits>(plan.x, args, segments, range.begin, job.rows, job.strips);
    parallel_for(across * down, [&](int index) {
      job.run(plan.buffers + index * PanelJob<A>::floats(), split(tiles.total, across, index % across),
              split(job.strips, down, index / across));
    });
  }
  return TERSOR_OK;
}

template <class A>
int run_bits(const IntLinearArgs& args) {
  switch (args.bits) {
    case 2: return run<A, 2>(args);
    case 3: return run<A, 3>(args);
    case 4: return run<A, 4>(args);
    case 5: return run<A, 5>(args);
    case 6: return run<A, 6>(args);
    case 7: return run<A, 7>(args);
    default: return run<A, 8>(args);
  }
}

}  // namespace

int int_linear_exact(const IntLinearArgs& args) {
  int status;
  if (int_linear_limbs(args, &status)) return status;
#if defined(TERSOR_SIMD_BF16)
  if (args.x_dtype == TERSOR_BFLOAT16) return run_bits<Bf16>(args);
#endif
  return run_bits<Float>(args);
}

}  // namespace tersor::TERSOR_ISA
