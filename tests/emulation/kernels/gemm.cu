// y[m, n] = sum over k of x[m, k] * w[n, k], float16 in, float32 out: m <= 16 rows, n a multiple of 32, k of 16.
// One warp per 8 columns, two stages of cp.async for x: small, but with every kind of synchronisation that the
// host run must get right.
#include "dispatch/launch.h"
#include "ptx/ptx.h"

namespace tersor {
namespace {

constexpr int warps = 4;

__global__ void gemm(const uint16_t* x, const uint16_t* w, float* y, int m, int n, int k) {
  const int lane = ptx::lane_index(), warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4, column = (blockIdx.x * warps + warp) * 8;
  const ptx::shared_t tile = ptx::dynamic_shared();
  float d[4] = {0, 0, 0, 0};
  const auto load = [&](int stage, int k0) {
    if (threadIdx.x < 32) {
      const int row = threadIdx.x / 2, half = threadIdx.x % 2;
      // Rows are 48 bytes apart, so that ldmatrix meets no bank twice.
      ptx::cp_async_16(tile + stage * 768 + row * 48 + half * 16, x + (row < m ? row * k + k0 + half * 8 : 0),
                       row < m ? 16 : 0);
    }
    ptx::cp_async_commit();
  };
  load(0, 0);
  ptx::region("main loop");
  for (int k0 = 0, stage = 0; k0 < k; k0 += 16, stage ^= 1) {
    if (k0 + 16 < k)
      load(stage ^ 1, k0 + 16);
    else
      ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    ptx::barrier();  // the tile is there
    uint32_t a[4], b[2];
    ptx::ldmatrix_x4(a, tile + stage * 768 + lane % 16 * 48 + lane / 16 * 16);
    const uint16_t* row = w + (column + g) * k + k0 + t * 2;
    b[0] = ptx::load_global_constant(reinterpret_cast<const uint32_t*>(row));
    b[1] = ptx::load_global_constant(reinterpret_cast<const uint32_t*>(row + 8));
    ptx::mma_m16n8k16_f16(d, a, b);
    ptx::barrier();  // the tile may be overwritten
  }
  ptx::region("epilogue");
  for (int i = 0; i < 2; ++i)
    if (g + 8 * i < m)
      ptx::store_global(reinterpret_cast<ptx::Vec<float, 2>*>(y + (g + 8 * i) * n + column + t * 2),
                        ptx::Vec<float, 2>{{d[2 * i], d[2 * i + 1]}});
}

}  // namespace
}  // namespace tersor

extern "C" int launch_gemm(const uint16_t* x, const uint16_t* w, float* y, int m, int n, int k) {
  return tersor::launch(tersor::gemm, dim3(n / (8 * tersor::warps)), dim3(32 * tersor::warps), 2 * 768, nullptr, x, w,
                        y, m, n, k);
}
