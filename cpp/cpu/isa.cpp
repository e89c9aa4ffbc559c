// The table of one instruction set (compiled once for each).
#include "cpu/isa.h"

namespace tersor::TERSOR_ISA {

#if defined(TERSOR_WITH_int_linear_a8)
constexpr IntLinearFunction a8 = int_linear_a8;
#else
constexpr IntLinearFunction a8 = nullptr;
#endif

const IsaKernels kernels = {TERSOR_ISA_NAME, int_linear_exact, a8, int_fit, gram, rms_norm,
                            kv_append, kv_pack, kv_attention, kv_mass, kv_encode, kv_decode, floor_read, floor_fp32,
                            floor_int8, floor_bf16};

}  // namespace tersor::TERSOR_ISA
