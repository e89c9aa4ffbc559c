// One warp, one product of small floats: in is a[32][4], b[32][2], d[32][4], scales of a [32] and of b [32].
#include "dispatch/launch.h"
#include "ptx/bits.h"
#include "ptx/matrix_float.h"
#include "ptx/matrix_fp4.h"
#include "ptx/matrix_mx.h"

using namespace tersor;

template <int kind>
__global__ void product(const uint32_t* in, float* out) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = ptx::load_global_constant(in + 4 * lane + i);
  for (int i = 0; i < 2; ++i) b[i] = ptx::load_global_constant(in + 128 + 2 * lane + i);
  for (int i = 0; i < 4; ++i) d[i] = ptx::bits_to_float(ptx::load_global_constant(in + 192 + 4 * lane + i));
  const uint32_t of_a = ptx::load_global_constant(in + 320 + lane), of_b = ptx::load_global_constant(in + 352 + lane);
  if constexpr (kind == 0) ptx::mma_m16n8k32_e4m3(d, a, b);
  if constexpr (kind == 1) ptx::mma_m16n8k64_mxf4(d, a, b, of_a, of_b);
  if constexpr (kind == 2) ptx::mma_m16n8k64_nvf4(d, a, b, of_a, of_b);
  // From 3 on, mixed elements: those of A, those of B, and which byte of the scales counts.
  if constexpr (kind >= 3) ptx::mma_m16n8k32_mx<(kind - 3) % 3, (kind - 3) / 3, (kind - 3) % 4>(d, a, b, of_a, of_b);
  for (int i = 0; i < 4; ++i) ptx::store_global(out + 4 * lane + i, d[i]);
}

extern "C" int product_of(const uint32_t* in, float* out, int64_t kind) {
  void (*const kernels[])(const uint32_t*, float*) = {product<0>, product<1>, product<2>, product<3>, product<4>,
                                                      product<5>, product<6>, product<7>, product<8>};
  return launch(kernels[kind], dim3(1), dim3(32), 0, nullptr, in, out);
}
