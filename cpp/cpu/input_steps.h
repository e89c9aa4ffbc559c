// What calls check of the steps of a tersor_input before a row goes through them (row_transform.h).
#pragma once

#include "common/status.h"
#include "tersor.h"

namespace tersor {

// The first step that does not fit rows of k values, in words.
inline int check_steps(const tersor_input& in, int64_t k) {
  for (int64_t i = 0; in.index && i < k; ++i) {
    if (in.index[i] < 0 || in.index[i] >= k) {
      return fail(TERSOR_INVALID, "index[%lld] is %d; accepted: 0 to %lld", (long long)i, in.index[i],
                  (long long)k - 1);
    }
  }
  if ((in.left || in.right || in.butterflies) &&
      (in.rows < 1 || in.columns < 1 || in.rows > k || in.columns > k || k % (in.rows * in.columns))) {
    return fail(TERSOR_INVALID, "rows and columns are %lld and %lld; accepted: sizes whose product divides k = %lld",
                (long long)in.rows, (long long)in.columns, (long long)k);
  }
  if (in.butterflies && (in.right || in.columns < 16 || (in.columns & (in.columns - 1)))) {
    return fail(TERSOR_INVALID, "columns is %lld for butterflies; accepted: powers of two from 16 on, without right",
                (long long)in.columns);
  }
  return TERSOR_OK;
}

}  // namespace tersor
