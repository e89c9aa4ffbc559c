// One warp-wide load of shared memory at a distance of `stride` words from lane to lane.
#include "dispatch/launch.h"
#include "ptx/ptx.h"

namespace tersor {
namespace {

__global__ void banks(uint32_t* out, int stride, int width) {
  const int lane = ptx::lane_index();
  const ptx::shared_t tile = ptx::dynamic_shared(), mine = tile + lane * stride * 4;
  for (int i = lane; i < 1280; i += 32) ptx::store_shared(tile + i * 4, static_cast<uint32_t>(i));
  ptx::sync_warp();
  ptx::region("measured");
  uint32_t value;
  if (width == 4)
    value = ptx::load_shared<uint32_t>(mine);
  else if (width == 8)
    value = ptx::load_shared<ptx::Vec<uint32_t, 2>>(mine)[0];
  else
    value = ptx::load_shared<ptx::Vec<uint32_t, 4>>(mine)[0];
  ptx::region("");
  ptx::store_global(out + lane, value);
}

}  // namespace
}  // namespace tersor

extern "C" int launch_banks(uint32_t* out, int stride, int width) {
  return tersor::launch(tersor::banks, dim3(1), dim3(32), 5120, nullptr, out, stride, width);
}
