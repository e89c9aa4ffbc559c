// Integer weights times activations rounded to integers (act_bits 4, 6, 8), compiled once per instruction set.
//
//   y[m, n] = sum over groups g of scale[n, g] * sum over blocks b in g of
//             x_scale[m, b] * sum over k in b of (code - zero_point[n, g]) * q[m, k]   + bias[n]
//
// The sums over a block of 32 k are exact integers with the centre 2^(bits-1) for the zero point; what an
// asymmetric zero point differs from it is applied once per segment in fp32. Lanes are the 16 output rows
// of a tile, so nothing is ever added across lanes; an activation dword is broadcast to all of them.
//
//   x --quantize--> strips of rows --+
//                                    |  microkernel: strip x tiles, 16 blocks of k, integer sums in registers
//   packed codes --------------------+--> few rows: decoded in registers, once per strip, as the stream passes
//   packed codes --unpack--> bytes --+--> more rows: decoded once into 8 KiB per tile that stay in L1
//
// Cycles of the innermost loops, one block of 32 k (m = 1: of one tile; strips: of 8 rows x 2 tiles):
//                          m = 1, bits 2   3   4   5   6   7   8   m = 4, 4 bits   8 x 2, decoding / unpacked
//   AVX-512, predicted               17  25  15  23  21  28  11              45          170 / 161
//   AVX2, measured on Zen 3          22  41  23  40  43  65  42              60            - / -
// Predicted by llvm-mca 19 for Sapphire Rapids, without cache misses; its model issues one 512-bit vpdpbusd
// a cycle. With two a cycle (Zen 5) 8 x 2 is bound by 128 of them + 16 fma on two pipes: 72 cycles, 89 % of
// the int8 peak, of which decoding or unpacking takes a little. AVX2, 4 rows x 1 tile over unpacked bytes:
// 56 cycles measured, bound by vpmaddubsw + vpaddw (1.6 pairs a cycle at most there, which alone take 40).
//
// Scales in two levels (int_scales.h) with one activation scale a token: the group's integer scale joins the integer
// sums, which run over all of k, and floats scale them once (int_linear_a8_two_level.h). Otherwise the product of both
// levels is the scale.
//
// Every path does the same operations on one row of int8 activations in the same order: its result depends neither on
// the other rows nor on the threads. Exact 16-bit activations of one or two rows come here as limbs.
#include "common/scratch.h"
#include "common/status.h"
#include "cpu/int_linear_a8_two_level.h"
#include "cpu/isa.h"
#include "cpu/row_transform.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr int64_t kWorkPerThread = 1 << 19;   // weights x rows below which another thread costs more
constexpr int64_t kPanelBytes = 1 << 20;      // activations that stay in the last-level cache
constexpr int64_t kUnpackedTile = kChunkBlocks * 512;

// Tiles next to each other in one projection, which one microkernel takes.
struct TileGroup {
  const tersor_projection* projection;
  int64_t first;
  int count;
};

// The tile groups of all projections, numbered through.
struct TileGroups {
  const IntLinearArgs& args;
  int size;
  int64_t total = 0;
  TileGroups(const IntLinearArgs& a, int group_size) : args(a), size(group_size) {
    for (int i = 0; i < a.count; ++i) total += of(a.projections[i]);
  }
  int64_t of(const tersor_projection& p) const { return div_up(div_up(p.n, kTileRows), size); }
  TileGroup operator[](int64_t index) const {
    const tersor_projection* p = args.projections;
    while (index >= of(*p)) index -= of(*p++);
    const int64_t left = div_up(p->n, kTileRows) - index * size;
    return {p, index * size, static_cast<int>(left < size ? left : size)};
  }
};

// y = sum of limbs of result + bias for `rows` tokens of a tile group; result is [rows][limbs][tiles][16].
void finish(const IntLinearArgs& args, const TileGroup& tiles, int64_t row, int64_t rows, int limbs,
            const float* result) {
  const tersor_projection& p = *tiles.projection;
  const int64_t size = dtype_size(args.x_dtype);
  for (int n = 0; n < tiles.count; ++n) {
    const int64_t column = (tiles.first + n) * kTileRows, left = p.n - column;
    const int count = left < kTileRows ? static_cast<int>(left) : kTileRows;
    f32 bias = zero();
    if (p.bias) {
      alignas(64) char padded[kTileRows * 4] = {};
      std::memcpy(padded, static_cast<const char*>(p.bias) + column * size, count * size);
      bias = load_as(padded, args.x_dtype);
    }
    char* y = static_cast<char*>(p.y) + (row * p.ldy + column) * size;
    for (int64_t r = 0; r < rows; ++r, y += p.ldy * size) {
      const float* limb = result + (r * limbs * tiles.count + n) * kTileRows;
      f32 sum = load(limb);
      for (int l = 1; l < limbs; ++l) sum = add(sum, load(limb + l * tiles.count * kTileRows));
      store_as(y, args.x_dtype, add(sum, bias), count);
    }
  }
}

// The microkernel for each height of a strip, from `least` to `rows`; null where there is none.
template <bool two_level, int kind, int stored, int tiles, bool stream, int least, int rows>
void fill_kernels(Micro* kernels) {
  if constexpr (two_level) {
    kernels[rows] = micro_two_level<kind, stored, rows, tiles, stream>;
  } else {
    kernels[rows] = micro<kind, stored, rows, tiles, stream>;
  }
  if constexpr (rows > least) fill_kernels<two_level, kind, stored, tiles, stream, least, rows - 1>(kernels);
}

enum class Path {
  kFewRows,  // one strip and one tile at a time: one sequential stream, decoded in registers
  kDecode,   // strips x kA8PanelTiles, decoded in registers for each strip
  kPanel,    // strips x kA8PanelTiles over unpacked bytes
};

// The lowest strip that the last two paths can meet.
constexpr int least_height() {
  int least = kA8PanelRows;
  for (int m = kA8DecodeRows + 1; m <= kA8PanelRows * kA8PanelRows; ++m) {
    const int height = m / ((m + kA8PanelRows - 1) / kA8PanelRows);
    if (height < least) least = height;
  }
  return least;
}
constexpr int kLeastHeight = least_height();

constexpr Path path_for(int64_t m, int bits) {
  if (m <= kA8DecodeRows) return Path::kFewRows;
  return m <= kA8PanelRows * a8_decode_strips(bits) ? Path::kDecode : Path::kPanel;
}

// `two_level`: integer sums over all of k.
template <int bits, bool two_level>
struct Job {
  static constexpr int kind = dot_kind(bits);
  using Dot = Int8Dot<kind>;
  static constexpr bool unpacked = bits == 8;  // its codes are bytes as they lie

  const IntLinearArgs& args;
  const QuantizedRows<Dot>& x;
  const TileGroups& groups;
  Path path;
  int64_t row_parts;  // the strips are cut into this many parts; a part x a tile group is one item of work
  // By strip height: codes in memory, unpacked codes, unpacked codes of a tile group that is not full.
  Micro stream[kA8PanelRows + 1] = {}, panel[kA8PanelRows + 1] = {}, tail[kA8PanelRows + 1] = {};

  Job(const IntLinearArgs& a, const QuantizedRows<Dot>& q, const TileGroups& g, Path p, int64_t parts)
      : args(a), x(q), groups(g), path(p), row_parts(parts) {
    if (path == Path::kFewRows) {
      fill_kernels<two_level, kind, bits, 1, true, 1, kA8DecodeRows>(stream);
      return;
    }
    fill_kernels<two_level, kind, 8, kA8PanelTiles, false, kLeastHeight, kA8PanelRows>(panel);
    fill_kernels<two_level, kind, 8, 1, false, kLeastHeight, kA8PanelRows>(tail);
    if constexpr (a8_decode_strips(bits) > 0 || unpacked) {
      fill_kernels<two_level, kind, bits, kA8PanelTiles, true, kLeastHeight, kA8PanelRows>(stream);
    }
  }

  Range part_strips(int64_t part) const { return split(x.strips, row_parts, part); }
  Range part_rows(int64_t part) const {
    const Range strips = part_strips(part);
    return {x.strip(strips.begin).begin, x.strip(strips.end - 1).end};
  }
  int64_t most_rows() const {
    int64_t most = 0;
    for (int64_t part = 0; part < row_parts; ++part) {
      const Range rows = part_rows(part);
      if (rows.end - rows.begin > most) most = rows.end - rows.begin;
    }
    return most;
  }
  size_t result_floats() const { return size_t(most_rows()) * groups.size * kTileRows; }

  // Items [first, last), ordered by part, then by tile group.
  void run(int64_t first, int64_t last, float* result, uint8_t* bytes) const {
    for (int64_t item = first; item < last; ++item) {
      const TileGroup tiles = groups[item % groups.total];
      const Range strips = part_strips(item / groups.total), rows = part_rows(item / groups.total);
      std::memset(result, 0, sizeof(float) * (rows.end - rows.begin) * tiles.count * kTileRows);
      multiply(tiles, strips, rows.begin, result, bytes);
      finish(args, tiles, rows.begin / x.limbs, (rows.end - rows.begin) / x.limbs, x.limbs, result);
    }
  }

  void multiply(const TileGroup& tiles, Range strips, int64_t first_row, float* result, uint8_t* bytes) const {
    const IntShape& shape = x.shape;
    const tersor_projection& p = *tiles.projection;
    const int64_t group = tiles.first * shape.groups * kTileRows;
    const bool whole = tiles.count == groups.size;
    const uint8_t* weights = p.qweight + tiles.first * shape.tile_bytes();
    const bool unpacks = !unpacked && (path == Path::kPanel || (path == Path::kDecode && !whole));
    const int64_t step = path == Path::kFewRows ? shape.blocks : kChunkBlocks;
    for (int64_t begin = 0; begin < shape.blocks; begin += step) {
      const int64_t end = begin + step < shape.blocks ? begin + step : shape.blocks;
      const uint8_t* codes = weights + begin * 64 * bits;
      if (unpacks) {
        for (int n = 0; n < tiles.count; ++n) {
          unpack<bits>(codes + n * shape.tile_bytes(), end - begin, bytes + n * kUnpackedTile);
        }
      }
      for (int64_t index = strips.begin; index < strips.end; ++index) {
        const Range strip = x.strip(index);
        const int64_t height = strip.end - strip.begin, segment = segments_before(shape, begin);
        const bool streams = !unpacks && whole && (path != Path::kPanel || index == strips.begin);
        const Micro kernel = (streams ? stream : whole ? panel : tail)[height];
        kernel({shape, begin, end, segment, unpacks ? bytes : codes, unpacks ? kUnpackedTile : shape.tile_bytes(),
                x.strip_records(strip, begin), x.strip_sums(strip, 0),
                static_cast<const char*>(p.scales) + tiles.first * scale_tile_bytes(args.scale_dtype, shape.groups),
                p.zero_points ? p.zero_points + group : nullptr, args.scale_dtype,
                result + (strip.begin - first_row) * tiles.count * kTileRows});
      }
    }
  }
};

// limbs > 1: 16-bit activations as they are, for as many tokens as make one strip.
template <int bits, bool two_level>
int run(const IntLinearArgs& args, int limbs) {
  const IntShape shape = int_shape(0, args.k, bits, args.group_size);
  const Path path = path_for(args.m * limbs, bits);
  const TileGroups groups(args, path == Path::kFewRows ? 1 : kA8PanelTiles);
  QuantizedRows<Int8Dot<dot_kind(bits)>> x(shape, *args.input, args.m, limbs,
                                              path == Path::kFewRows ? kA8DecodeRows : kA8PanelRows, two_level);

  int64_t weights = 0;
  for (int i = 0; i < args.count; ++i) weights += args.projections[i].n * args.k;
  const int64_t useful = 1 + weights * args.m / kWorkPerThread;
  int threads = useful < args.threads ? static_cast<int>(useful) : args.threads;

  // Rows are cut so that a part's activations stay in cache, and that there is work for every thread.
  int64_t parts = div_up(args.m * shape.blocks * int64_t(sizeof(uint32_t)) * x.record, kPanelBytes);
  if (threads > 1 && parts * groups.total < 8 * threads) parts = div_up(8 * threads, groups.total);
  if (parts > x.strips) parts = x.strips;

  const Job<bits, two_level> job(args, x, groups, path, parts);
  const int64_t items = parts * groups.total;
  if (items < threads) threads = static_cast<int>(items);
  Scratch scratch;
  scratch.reserve<uint32_t>(x.record_count());
  scratch.reserve<float>(x.sum_count());
  const size_t result_floats = job.result_floats();
  const size_t panel_bytes = path == Path::kFewRows ? 0 : groups.size * kUnpackedTile;
  scratch.reserve<float>(threads * result_floats);
  scratch.reserve<uint8_t>(threads * panel_bytes);
  const RowQuantizer quantizer(args);
  scratch.reserve<char>(quantizer.threads(threads) * quantizer.bytes());
  if (!scratch.allocate()) return fail(TERSOR_NO_MEMORY, "no memory for the quantized activations");
  x.records = scratch.take<uint32_t>(x.record_count());
  x.sums = scratch.take<float>(x.sum_count());

  float* const results = scratch.take<float>(threads * result_floats);
  uint8_t* const bytes = scratch.take<uint8_t>(threads * panel_bytes);
  quantizer.run(x, threads, scratch.take<char>(quantizer.threads(threads) * quantizer.bytes()));
  parallel_for(threads, [&](int index) {
    const Range range = split(items, threads, index);
    job.run(range.begin, range.end, results + index * result_floats, bytes + index * panel_bytes);
  });
  return TERSOR_OK;
}

// Whether integers hold the sums of scales in two levels over all of k.
bool sums_of_integers(const IntLinearArgs& args) {
  const tersor_input& in = *args.input;
  return args.scale_dtype == kTwoLevelScales && in.bits < 16 && !in.block_bits && args.k <= kTwoLevelColumns &&
         RowScales(in, args.k).groups() == 1;
}

template <int bits>
int run_scales(const IntLinearArgs& args, int limbs) {
  if constexpr (bits <= kTwoLevelBits) {
    if (sums_of_integers(args)) return run<bits, true>(args, limbs);
  }
  return run<bits, false>(args, limbs);
}

int run_bits(const IntLinearArgs& args, int limbs) {
  switch (args.bits) {
    case 2: return run_scales<2>(args, limbs);
    case 3: return run_scales<3>(args, limbs);
    case 4: return run_scales<4>(args, limbs);
    case 5: return run_scales<5>(args, limbs);
    case 6: return run_scales<6>(args, limbs);
    case 7: return run_scales<7>(args, limbs);
    default: return run_scales<8>(args, limbs);
  }
}

// How many limbs leave of no block's values more than shows beside their own rounding to 16 bits: two, unless the
// largest of a block is far above the others' mean; 0 when three are too few.
int limbs_for(const IntLinearArgs& args) {
  const int64_t size = dtype_size(args.x_dtype);
  const float most = args.x_dtype == TERSOR_FLOAT16 ? 8.0f : 32.0f;
  int limbs = 2;
  for (int64_t token = 0; token < args.m; ++token) {
    const char* x = static_cast<const char*>(args.x) + token * args.ldx * size;
    for (int64_t k = 0; k < args.k; k += kBlockK) {
      f32 low, high;
      load_block(x, args.x_dtype, k, args.k, &low, &high);
      const i32 a = magnitude(low), b = magnitude(high);
      const float top = bits_to_float(reduce_max(max_i32(a, b)));
      const float others = reduce_add(add(as_f32(a), as_f32(b))) - top;
      const float ratio = top * (kBlockK - 1) / most;
      if (ratio > others && others > 0) limbs = kMostLimbs;
      if (ratio > others * 128 && others > 0) return 0;
    }
  }
  return limbs;
}

}  // namespace

int int_linear_a8(const IntLinearArgs& args) {
  return run_bits(args, args.input->asymmetric && args.input->bits == 8 ? 2 : 1);
}

// Exact activations as limbs: false, and nothing done, where the arithmetic of floats is to do it.
bool int_linear_limbs(const IntLinearArgs& args, int* status) {
  if (args.m * 2 > kLimbRows || args.bits > kLimbBits || args.x_dtype == TERSOR_FLOAT32) return false;
  const int limbs = limbs_for(args);
  if (limbs == 0 || args.m * limbs > kLimbRows) return false;
  *status = run_bits(args, limbs);
  return true;
}

}  // namespace tersor::TERSOR_ISA
