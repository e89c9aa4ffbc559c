// What the CUDA parts of tersor._C share: pointers and structs from integers, errors from status codes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "tersor.h"

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

static inline void check(int status) {
  if (status == TERSOR_OK) return;
  if (status == TERSOR_CUDA_ERROR) throw std::runtime_error(tersor_last_error());
  throw pybind11::value_error(tersor_last_error());
}
