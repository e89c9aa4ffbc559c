#include "common/status.h"
#include "cpu/isa.h"

namespace tersor::TERSOR_ISA {

int int_linear_exact(const IntLinearArgs&) {
  return fail(TERSOR_INVALID, "act_bits 16 has no kernel for " TERSOR_ISA_NAME " in this build");
}

}  // namespace tersor::TERSOR_ISA
