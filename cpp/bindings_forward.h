// Functions of the C ABI as functions of Python, from their types alone: pointers are integers, 0 for absent; structs
// are lists of their fields in order; errors are exceptions (bindings.h).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings.h"

namespace forward_detail {

template <class Parameter>
using Argument = std::conditional_t<std::is_pointer_v<Parameter>, Address, Parameter>;

template <class Parameter>
Parameter passed(Argument<Parameter> value) {
  if constexpr (std::is_pointer_v<Parameter>) {
    return reinterpret_cast<Parameter>(value);
  } else {
    return value;
  }
}

template <class... Parameters, std::size_t... I>
auto planned(int (*f)(Parameters...), std::index_sequence<I...>) {
  using All = std::tuple<Parameters...>;
  return [f](Argument<std::tuple_element_t<I, All>>... values) {
    int64_t ranges = 0, partial_bytes = 0, counter_bytes = 0;
    check(f(passed<std::tuple_element_t<I, All>>(values)..., &ranges, &partial_bytes, &counter_bytes));
    return pybind11::make_tuple(ranges, partial_bytes, counter_bytes);
  };
}

}  // namespace forward_detail

// f(arguments...).
template <class... Parameters>
auto forwarded(int (*f)(Parameters...)) {
  return [f](forward_detail::Argument<Parameters>... values) {
    check(f(forward_detail::passed<Parameters>(values)...));
  };
}

// f(arguments..., &ranges, &partial_bytes, &counter_bytes) as a function that returns the three.
template <class... Parameters>
auto planned(int (*f)(Parameters...)) {
  return forward_detail::planned(f, std::make_index_sequence<sizeof...(Parameters) - 3>());
}

using Numbers = std::vector<int64_t>;

// A struct of int64 and pointers from its fields.
template <class T>
T fields(const Numbers& numbers) {
  T made{};
  if (numbers.size() * sizeof(int64_t) != sizeof(T)) throw pybind11::value_error("found another number of fields");
  std::memcpy(&made, numbers.data(), sizeof(T));
  return made;
}
