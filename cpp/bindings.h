// What the parts of tersor._C share: pointers from integers, errors from status codes, calls without the lock.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>

#include "tersor.h"

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void check(int status) {
  if (status == TERSOR_OK) return;
  if (status == TERSOR_NO_MEMORY) throw std::bad_alloc();
  if (status == TERSOR_CUDA_ERROR) throw std::runtime_error(tersor_last_error());
  throw pybind11::value_error(tersor_last_error());
}

// Runs a call of the C ABI without the interpreter's lock.
template <class Call>
void run(const Call& call) {
  int status;
  {
    pybind11::gil_scoped_release release;
    status = call();
  }
  check(status);
}
