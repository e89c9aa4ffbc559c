// What the kernel of attention mass (kv_mass.cu) and its launcher (dispatch/kv_attention.cu) agree on.
#pragma once

#include "kernels/sm80_kv_attention.h"

namespace tersor {

struct KvMassArguments {
  KvAttentionArguments query;  // log_sum_exp is read; out, sinks, partials and counters are not used
  float* mass;                 // [batch, kv_heads, tokens], zeros before
  int tokens;
};

using KvMassKernel = void(KvMassArguments);
// For each head dimension; null for what was not built.
extern KvMassKernel* kv_mass_kernels[257];

}  // namespace tersor
