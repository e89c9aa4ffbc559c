// What the machine's GPUs are, through the static CUDA runtime. No driver is needed to load this
// code: without one cudaGetDeviceCount fails, and the answer is that there is no device.
#include <cuda_runtime_api.h>

#include <cstring>

#include "tersor.h"

extern "C" int tersor_cuda_device_count(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // clear it, so that a later call does not report this one's error
    return 0;
  }
  return count;
}

extern "C" int tersor_cuda_device(int index, tersor_cuda_device_info* info) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
    cudaGetLastError();
    return TERSOR_INVALID;
  }
  std::memset(info, 0, sizeof *info);
  std::strncpy(info->name, properties.name, sizeof info->name - 1);
  info->major = properties.major;
  info->minor = properties.minor;
  info->multiprocessors = properties.multiProcessorCount;
  info->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  info->shared_memory_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  info->l2_bytes = properties.l2CacheSize;
  return TERSOR_OK;
}
