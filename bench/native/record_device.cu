// Memory and launches for bench/record_ptx.py: host words in, one launcher, host words out.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace {

char message[512] = "";

int failed(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return 0;
  std::snprintf(message, sizeof message, "%s: %s", what, cudaGetErrorString(error));
  cudaGetLastError();
  return 1;
}

}  // namespace

extern "C" const char* record_message() { return message; }

extern "C" int record_device(char* name, int* major, int* minor) {
  cudaDeviceProp properties;
  if (failed("device 0", cudaGetDeviceProperties(&properties, 0))) return 1;
  std::snprintf(name, 256, "%s", properties.name);
  *major = properties.major;
  *minor = properties.minor;
  return 0;
}

// Both buffers start zeroed beyond what is copied, as the host run's do.
extern "C" int record_run(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                          int (*launcher)(const uint32_t*, uint32_t*, int), int n) {
  uint32_t *device_in = nullptr, *device_out = nullptr;
  int status = failed(name, cudaMalloc(&device_in, in_bytes)) || failed(name, cudaMalloc(&device_out, out_bytes)) ||
               failed(name, cudaMemcpy(device_in, in, in_bytes, cudaMemcpyHostToDevice)) ||
               failed(name, cudaMemset(device_out, 0, out_bytes)) ||
               failed(name, static_cast<cudaError_t>(launcher(device_in, device_out, n))) ||
               failed(name, cudaDeviceSynchronize()) ||
               failed(name, cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost));
  cudaFree(device_in);
  cudaFree(device_out);
  return status;
}
