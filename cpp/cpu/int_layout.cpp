#include "cpu/int_scales.h"

#include <cstring>

#include "common/float16.h"
#include "common/parallel.h"
#include "common/status.h"

namespace tersor {

int check_int_arguments(int64_t n, int64_t k, int bits, int64_t group_size, int threads) {
  if (bits < 2 || bits > 8) return fail(TERSOR_INVALID, "bits is %d; accepted: 2 to 8", bits);
  constexpr int64_t limit = int64_t(1) << 40;
  if (n < 0 || n > limit) return fail(TERSOR_INVALID, "n is %lld; accepted: 0 to 2^40", (long long)n);
  if (k < 1 || k > limit) return fail(TERSOR_INVALID, "k is %lld; accepted: 1 to 2^40", (long long)k);
  if (group_size < 0 || (group_size > 0 && group_size < k && group_size % kBlockK != 0)) {
    return fail(TERSOR_INVALID, "group_size is %lld; accepted: a multiple of 32, or 0 for the whole row",
                (long long)group_size);
  }
  if (threads < 1 || threads > 4096) return fail(TERSOR_INVALID, "threads is %d; accepted: 1 to 4096", threads);
  return TERSOR_OK;
}

namespace {

// One block, with the codes as [16 rows][32 k].
void pack_block(const uint8_t (*codes)[kBlockK], int bits, uint8_t* block) {
  std::memset(block, 0, size_t(64) * bits);
  for (int plane = 0; plane_bits(bits, plane) != 0; ++plane) {
    const int p = plane_bits(bits, plane), low = plane_offset(bits, plane);
    const unsigned mask = (1u << p) - 1;
    uint8_t* base = block + 64 * low;
    for (int k = 0; k < kBlockK; ++k) {
      uint8_t* chunk = base + 64 * chunk_of(k, p) + byte_of(k);
      const int shift = shift_of(k, p) % 8;
      for (int row = 0; row < kTileRows; ++row) chunk[4 * row] |= ((codes[row][k] >> low) & mask) << shift;
    }
  }
}

void unpack_block(const uint8_t* block, int bits, uint8_t (*codes)[kBlockK]) {
  std::memset(codes, 0, size_t(kTileRows) * kBlockK);
  for (int plane = 0; plane_bits(bits, plane) != 0; ++plane) {
    const int p = plane_bits(bits, plane), low = plane_offset(bits, plane);
    const unsigned mask = (1u << p) - 1;
    const uint8_t* base = block + 64 * low;
    for (int k = 0; k < kBlockK; ++k) {
      const uint8_t* chunk = base + 64 * chunk_of(k, p) + byte_of(k);
      const int shift = shift_of(k, p) % 8;
      for (int row = 0; row < kTileRows; ++row) codes[row][k] |= ((chunk[4 * row] >> shift) & mask) << low;
    }
  }
}

template <class Function>
void for_each_tile(const IntShape& shape, int threads, const Function& function) {
  if (threads > shape.tiles) threads = static_cast<int>(shape.tiles);
  parallel_for(threads, [&](int index) {
    const Range range = split(shape.tiles, threads, index);
    for (int64_t tile = range.begin; tile < range.end; ++tile) {
      const int64_t row = tile * kTileRows;
      function(tile, row, static_cast<int>(shape.n - row < kTileRows ? shape.n - row : kTileRows));
    }
  });
}

int columns(const IntShape& shape, int64_t block) {
  const int64_t left = shape.k - block * kBlockK;
  return static_cast<int>(left < kBlockK ? left : kBlockK);
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int tersor_int_pack(const uint8_t* codes, int64_t n, int64_t k, int bits, uint8_t* qweight, int threads) {
  if (int status = check_int_arguments(n, k, bits, 0, threads)) return status;
  if (n == 0) return TERSOR_OK;
  const IntShape shape = int_shape(n, k, bits, 0);
  for_each_tile(shape, threads, [&](int64_t tile, int64_t row, int rows) {
    uint8_t local[kTileRows][kBlockK];
    for (int64_t block = 0; block < shape.blocks; ++block) {
      const int width = columns(shape, block);
      if (rows < kTileRows || width < kBlockK) std::memset(local, 1 << (bits - 1), sizeof local);
      for (int r = 0; r < rows; ++r) std::memcpy(local[r], codes + (row + r) * k + block * kBlockK, width);
      pack_block(local, bits, qweight + tile * shape.tile_bytes() + block * 64 * bits);
    }
  });
  return TERSOR_OK;
}

extern "C" int tersor_int_unpack(const uint8_t* qweight, int64_t n, int64_t k, int bits, uint8_t* codes, int threads) {
  if (int status = check_int_arguments(n, k, bits, 0, threads)) return status;
  if (n == 0) return TERSOR_OK;
  const IntShape shape = int_shape(n, k, bits, 0);
  for_each_tile(shape, threads, [&](int64_t tile, int64_t row, int rows) {
    uint8_t local[kTileRows][kBlockK];
    for (int64_t block = 0; block < shape.blocks; ++block) {
      unpack_block(qweight + tile * shape.tile_bytes() + block * 64 * bits, bits, local);
      for (int r = 0; r < rows; ++r) {
        std::memcpy(codes + (row + r) * k + block * kBlockK, local[r], columns(shape, block));
      }
    }
  });
  return TERSOR_OK;
}

extern "C" int tersor_int_dequantize(const uint8_t* qweight, const void* scales, int scale_dtype,
                                     const uint8_t* zero_points, int64_t n, int64_t k, int bits,
                                     int64_t group_size, void* out, int out_dtype, int threads) {
  if (int status = check_int_arguments(n, k, bits, group_size, threads)) return status;
  if (scale_dtype < 0 || scale_dtype > kTwoLevelScales || out_dtype < 0 || out_dtype > 2) {
    return fail(TERSOR_INVALID,
                "dtype codes are %d (scales) and %d (out); accepted: 0 float32, 1 bfloat16, 2 float16; 3 two levels of "
                "scales",
                scale_dtype, out_dtype);
  }
  if (n == 0) return TERSOR_OK;
  const IntShape shape = int_shape(n, k, bits, group_size);
  for_each_tile(shape, threads, [&](int64_t tile, int64_t row, int rows) {
    uint8_t local[kTileRows][kBlockK];
    const char* tile_scales = static_cast<const char*>(scales) + tile * scale_tile_bytes(scale_dtype, shape.groups);
    for (int64_t block = 0; block < shape.blocks; ++block) {
      unpack_block(qweight + tile * shape.tile_bytes() + block * 64 * bits, bits, local);
      const int64_t of_tile = block / shape.group_blocks, group = (tile * shape.groups + of_tile) * kTileRows;
      const int width = columns(shape, block);
      for (int r = 0; r < rows; ++r) {
        const float scale = group_scale(tile_scales, scale_dtype, shape.groups, of_tile, r);
        const int zero = zero_points ? zero_points[group + r] : 1 << (bits - 1);
        float values[kBlockK];
        for (int c = 0; c < kBlockK; ++c) values[c] = static_cast<float>(local[r][c] - zero) * scale;
        const int64_t at = (row + r) * k + block * kBlockK;
        if (out_dtype == TERSOR_FLOAT32) {
          std::memcpy(static_cast<float*>(out) + at, values, size_t(4) * width);
        } else {
          for (int c = 0; c < width; ++c) store_from_float(out, out_dtype, at + c, values[c]);
        }
      }
    }
  });
  return TERSOR_OK;
}
