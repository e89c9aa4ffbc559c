// Which instruction set runs: the best that this machine has, unless set_isa names another.
#include <atomic>
#include <cstring>

#include "common/status.h"
#include "cpu/isa.h"

namespace tersor {
namespace {

struct Candidate {
  const IsaKernels* kernels;
  bool (*runnable)();
};

bool always() { return true; }
#if defined(TERSOR_HAVE_AVX2)
// The compiler's run-time support also asks the operating system (XGETBV).
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#if defined(TERSOR_HAVE_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
#endif

// Best first; the emulation last, so that it is never picked by itself.
const Candidate candidates[] = {
#if defined(TERSOR_HAVE_AVX512)
    {&avx512::kernels, has_avx512},
#endif
#if defined(TERSOR_HAVE_AVX2)
    {&avx2::kernels, has_avx2},
#endif
    {&generic::kernels, always},
#if defined(TERSOR_HAVE_AVX512_EMULATED)
    {&avx512_emulated::kernels, has_avx2},
#endif
};

std::atomic<const IsaKernels*> chosen{nullptr};

const IsaKernels* runnable(int index) {
  for (const Candidate& candidate : candidates) {
    if (candidate.runnable() && index-- == 0) return candidate.kernels;
  }
  return nullptr;
}

}  // namespace

const IsaKernels& current_isa() {
  const IsaKernels* kernels = chosen.load(std::memory_order_relaxed);
  if (!kernels) {
    kernels = runnable(0);
    chosen.store(kernels, std::memory_order_relaxed);
  }
  return *kernels;
}

}  // namespace tersor

using namespace tersor;

extern "C" const char* tersor_isa_name(int index) {
  const IsaKernels* kernels = index < 0 ? nullptr : runnable(index);
  return kernels ? kernels->name : nullptr;
}

extern "C" const char* tersor_current_isa(void) { return current_isa().name; }

extern "C" int tersor_set_isa(const char* name) {
  char accepted[128] = "";
  for (int i = 0; const IsaKernels* kernels = runnable(i); ++i) {
    if (std::strcmp(kernels->name, name) == 0) {
      chosen.store(kernels, std::memory_order_relaxed);
      return TERSOR_OK;
    }
    if (i > 0) std::strcat(accepted, ", ");
    std::strcat(accepted, kernels->name);
  }
  return fail(TERSOR_INVALID, "instruction set \"%.40s\" cannot run here; accepted: %s", name, accepted);
}
