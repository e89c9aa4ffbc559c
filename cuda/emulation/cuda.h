// Stands in for the CUDA toolkit when g++ compiles a kernel (g++ -include emulation/cuda.h): the
// qualifiers, the built-in variables and dim3. Memory and instructions are in ptx/.
#pragma once

#if !defined(TERSOR_EMULATION)
#define TERSOR_EMULATION 1
#endif

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Shared memory is the dynamic kind alone, reached by address: that is how it is checked.
#define __shared__ static_assert(false, "use ptx::dynamic_shared() instead of __shared__ arrays");

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct CUstream_st*;

// Of the thread that runs now.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
