// The first two steps of docs/kernels.md: W4A16 with nothing but the arithmetic, then with the fragments. n is a
// multiple of 32, k of 32, m at most 16; f16, 16-bit scales [tiles, groups, 16], no zero points.
#include "dispatch/launch.h"
#include "tile/int_dequantize.h"
#include "tile/int_tile.h"
#include "tile/number.h"

namespace tersor {
namespace {

// Step 1: a thread for each output, one code, one scale and one activation at a time.
__global__ void naive(const uint16_t* x, const uint8_t* qweight, const uint16_t* scales, uint16_t* y, int m, int n,
                      int k, int group_size) {
  const int row = blockIdx.x * 32 + threadIdx.x % 32, token = threadIdx.x / 32;
  if (token >= m) return;
  const int tile = row / 16, blocks = k / 32, groups = k / group_size;
  float sum = 0;
  for (int i = 0; i < k; ++i) {
    // The byte of the row's dword that holds code i, and the code's place in it (int_layout.h).
    const int chunk = lane_chunk(4, i % 32 / 8), shift = pair_shift(4, i % 8 / 2) + 16 * (i % 2);
    const uint8_t* byte = qweight + (int64_t(tile) * blocks + i / 32) * 256 + 64 * chunk + 4 * (row % 16) + shift / 8;
    const int code = ptx::load_global_constant(byte) >> (shift % 8) & 15;
    const uint16_t* of_group = scales + (tile * groups + i / group_size) * 16;
    const float scale = Float16::low(ptx::load_global_constant(of_group + row % 16));
    sum += static_cast<float>(code - 8) * scale * Float16::low(ptx::load_global_constant(x + token * k + i));
  }
  ptx::store_global(y + token * n + row, static_cast<uint16_t>(Float16::pack(sum, 0)));
}

// Step 2: a warp for 32 rows and 16 tokens; what a lane loads from global memory is its fragment.
__global__ void fragments(const uint16_t* x, const uint8_t* qweight, const uint16_t* scales, uint16_t* y, int m, int n,
                          int k, int group_size) {
  const int lane = threadIdx.x, g = lane / 4, c = lane % 4, quad = g % 4;
  const int tile = 2 * blockIdx.x + g / 4, blocks = k / 32, groups = k / group_size;
  float total[2][2][4] = {};
  IntDequantizer<Float16, 4> dequantizer;
  dequantizer.set_zero_points(0x08080808);
  for (int group = 0; group < groups; ++group) {
    float sum[2][2][4] = {};
    for (int block = group * group_size / 32; block < (group + 1) * group_size / 32; ++block) {
      const uint8_t* at = qweight + (int64_t(tile) * blocks + block) * 256;
      IntFragment<4> codes;
      codes.load<false>([&](int offset) {
        return ptx::load_global_constant(reinterpret_cast<const ptx::Vec<uint32_t, 4>*>(at + offset));
      }, c, quad);
      for (int j = 0; j < 2; ++j) {
        uint32_t upper[4], lower[4];
        dequantizer.pairs(upper, codes, 2 * j, c);
        dequantizer.pairs(lower, codes, 2 * j + 1, c);
        for (int t = 0; t < 2; ++t) {
          const int token = 8 * t + g;
          ptx::Vec<uint32_t, 4> piece = {};
          if (token < m) {
            piece = ptx::load_global_constant(
                reinterpret_cast<const ptx::Vec<uint32_t, 4>*>(x + token * k + 32 * block + 8 * c));
          }
          for (int s = 0; s < 2; ++s) {
            const uint32_t weights[4] = {upper[2 * s], lower[2 * s], upper[2 * s + 1], lower[2 * s + 1]};
            const uint32_t tokens[2] = {piece[2 * s], piece[2 * s + 1]};
            Float16::mma(sum[j][t], weights, tokens);
          }
        }
      }
    }
    float scale[4];
    const uint16_t* four = scales + (tile * groups + group) * 16 + 4 * quad;
    load_four(scale, 2, [&](auto type) {
      return ptx::load_global_constant(reinterpret_cast<const decltype(type)*>(four));
    });
    for (int j = 0; j < 2; ++j)
      for (int t = 0; t < 2; ++t)
        for (int i = 0; i < 4; ++i) total[j][t][i] += scale[2 * j + i / 2] * sum[j][t][i];
  }
  for (int t = 0; t < 2; ++t)
    for (int e = 0; e < 2; ++e) {
      const int token = 8 * t + 2 * c + e;
      if (token >= m) continue;
      const ptx::Vec<uint32_t, 2> pairs = {{Float16::pack(total[0][t][e], total[0][t][e + 2]),
                                            Float16::pack(total[1][t][e], total[1][t][e + 2])}};
      ptx::store_global(reinterpret_cast<ptx::Vec<uint32_t, 2>*>(y + token * n + 16 * tile + 4 * quad), pairs);
    }
}

}  // namespace
}  // namespace tersor

using namespace tersor;

extern "C" int step_naive(const uint16_t* x, const uint8_t* qweight, const uint16_t* scales, uint16_t* y, int m, int n,
                          int k, int group_size) {
  return launch(naive, dim3(n / 32), dim3(32 * m), 0, nullptr, x, qweight, scales, y, m, n, k, group_size);
}
extern "C" int step_fragments(const uint16_t* x, const uint8_t* qweight, const uint16_t* scales, uint16_t* y, int m,
                              int n, int k, int group_size) {
  return launch(fragments, dim3(n / 32), dim3(32), 0, nullptr, x, qweight, scales, y, m, n, k, group_size);
}
