// The one way in which launchers start a kernel: on a device under nvcc, as fibers on the host under g++.
// Both return 0 or an error: a cudaError_t on a device, 1 on the host (emulation_error() has the sentence).
#pragma once

#include <cstddef>

#if defined(TERSOR_EMULATION)
#include "emulation/runtime.h"
#else
#include <cuda_runtime.h>

#include <utility>
#endif

namespace tersor {

#if defined(TERSOR_EMULATION)

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A... arguments) {
  return emulation::launch(grid, block, shared_bytes, false, kernel, arguments...);
}

template <class... P, class... A>
int launch_resident(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A... arguments) {
  return emulation::launch(grid, block, shared_bytes, true, kernel, arguments...);
}

#else

namespace launch_detail {

// More than 48 KB of dynamic shared memory must be asked for.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  cudaFuncAttributes present;  // never lowered: another thread may be about to launch with what it asked for
  const cudaError_t error = cudaFuncGetAttributes(&present, kernel);
  if (error != cudaSuccess) return error;
  if (static_cast<size_t>(present.maxDynamicSharedSizeBytes) >= bytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class... P>
int start(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, bool resident,
          P... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared(function, shared_bytes);
  if (error == cudaSuccess) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., nullptr};
    error = resident ? cudaLaunchCooperativeKernel(function, grid, block, pointers, shared_bytes, stream)
                     : cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream);
  }
  if (error != cudaSuccess) cudaGetLastError();  // clear it: the next call must not report this one's error
  return static_cast<int>(error);
}

}  // namespace launch_detail

// grid x block threads with shared_bytes of dynamic shared memory, on `stream`. Arguments convert to the
// kernel's parameter types.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  return launch_detail::start<P...>(kernel, grid, block, shared_bytes, stream, false, static_cast<P>(arguments)...);
}

// The same for a kernel whose blocks wait for one another: all of them are resident at once, or the launch fails.
template <class... P, class... A>
int launch_resident(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                    A... arguments) {
  return launch_detail::start<P...>(kernel, grid, block, shared_bytes, stream, true, static_cast<P>(arguments)...);
}

#endif

}  // namespace tersor
