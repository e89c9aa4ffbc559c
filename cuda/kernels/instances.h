// Which instance of a kernel multiplies 8, 16, 32 or 64 tokens at once, for the tables that launchers look into.
#pragma once

#include <type_traits>

#include "tile/number.h"

namespace tersor {

// of(tiles): the address of the instance for `tiles` tiles of 8 tokens, a std::integral_constant. Null for others.
template <class Kernel, class Of>
Kernel* instance_for(int token_tiles, const Of& of) {
  switch (token_tiles) {
    case 1: return of(std::integral_constant<int, 1>());
    case 2: return of(std::integral_constant<int, 2>());
    case 4: return of(std::integral_constant<int, 4>());
    case 8: return of(std::integral_constant<int, 8>());
    default: return nullptr;
  }
}

// The same for kernels with 16-bit results: of(type, tiles), type a BFloat16 or Float16.
template <class Kernel, class Of>
Kernel* instance_for(bool is_bfloat16, int token_tiles, const Of& of) {
  if (is_bfloat16) return instance_for<Kernel>(token_tiles, [&](auto tiles) { return of(BFloat16(), tiles); });
  return instance_for<Kernel>(token_tiles, [&](auto tiles) { return of(Float16(), tiles); });
}

}  // namespace tersor
