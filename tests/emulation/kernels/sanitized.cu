// A kernel with local arrays, which only AddressSanitizer and UBSan can check; `planted` 1 reads past one,
// 2 shifts by 32. Fibers switch while the arrays live.
#include "dispatch/launch.h"
#include "ptx/ptx.h"

namespace tersor {
namespace {

__global__ void sanitized(uint32_t* out, int planted) {
  const int lane = ptx::lane_index();
  const ptx::shared_t tile = ptx::dynamic_shared();
  uint32_t local[8];
  for (int i = 0; i < 8; ++i) local[i] = ptx::shuffle(static_cast<uint32_t>(lane * 8 + i), lane + 1);
  ptx::store_shared(tile + threadIdx.x * 4, local[lane % 8]);
  ptx::barrier();
  uint32_t value = ptx::load_shared<uint32_t>(tile + (threadIdx.x ^ 32) * 4);
  const uint32_t* volatile past = local + 1;  // hides the array: UBSan would see its bounds first
  if (planted == 1) value += past[lane % 8];
  if (planted == 2) value += 1u << (lane + 1);
  ptx::store_global(out + threadIdx.x, value);
}

}  // namespace
}  // namespace tersor

extern "C" int launch_sanitized(uint32_t* out, int planted) {
  return tersor::launch(tersor::sanitized, dim3(1), dim3(64), 256, nullptr, out, planted);
}
