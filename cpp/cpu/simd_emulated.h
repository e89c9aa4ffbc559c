// The AVX-512 intrinsics that simd_avx512.h and the kernels use, through SIMDe: for tests on machines
// without AVX-512, never shipped.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
