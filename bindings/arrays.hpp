// Turns Python's arrays and numbers into what the core takes: checked views, never a silent copy or conversion, and a
// ValueError that says what was given and what was expected.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "check.hpp"

namespace mgrpo::bindings {

namespace py = pybind11;

inline std::string describe(py::handle given) {
  if (!py::isinstance<py::array>(given)) return py::repr(py::type::handle_of(given));
  const auto array = py::reinterpret_borrow<py::array>(given);
  const char* contiguous = array.flags() & py::array::c_style ? "" : ", not contiguous";
  const char* aligned = array.attr("flags").attr("aligned").cast<bool>() ? "" : ", not aligned";
  return py::str("a {} array of shape {}{}{}").format(array.dtype(), array.attr("shape"), contiguous, aligned);
}

template <class T>
bool is_column(py::handle given) {
  if (!py::isinstance<py::array_t<T>>(given)) return false;
  const auto array = py::reinterpret_borrow<py::array>(given);
  const bool aligned = reinterpret_cast<uintptr_t>(array.data()) % alignof(T) == 0;
  return array.ndim() == 1 && aligned && (array.flags() & py::array::c_style);
}

template <class T>
std::span<const T> view(py::handle given) {
  const auto array = py::reinterpret_borrow<py::array>(given);
  return {static_cast<const T*>(array.data()), static_cast<size_t>(array.size())};
}

/// `name` may be anything that can be part of a message.
template <class T, class Name>
std::span<const T> column(const Name& name, const char* expected, py::handle given) {
  if (!is_column<T>(given)) {
    refuse(name, " must be a one-dimensional contiguous array of ", expected, ", got ", describe(given));
  }
  return view<T>(given);
}

inline std::span<const int64_t> integers(const char* name, py::handle given) {
  return column<int64_t>(name, "int64", given);
}

template <class Name>
std::span<const uint8_t> flags(const Name& name, py::handle given) {
  if (is_column<bool>(given)) {
    const auto bools = view<bool>(given);
    return {reinterpret_cast<const uint8_t*>(bools.data()), bools.size()};
  }
  return column<uint8_t>(name, "bool or uint8", given);
}

/// A column of one number per trajectory; as these are few, float32 is converted to float64.
inline std::vector<double> floats(const char* name, py::handle given) {
  if (is_column<float>(given)) {
    const auto values = view<float>(given);
    return {values.begin(), values.end()};
  }
  const auto values = column<double>(name, "float64 or float32", given);
  return {values.begin(), values.end()};
}

template <class T>
T number(const char* name, const char* expected, py::handle given) {
  py::detail::make_caster<T> caster;
  require(caster.load(given, true), name, " must be ", expected, ", got ", std::string(py::repr(given)));
  return py::detail::cast_op<T>(caster);
}

inline int64_t integer(const char* name, py::handle given) { return number<int64_t>(name, "a 64-bit integer", given); }

/// Returns how many threads may share the work; 0: as many as the machine runs at once.
inline int64_t threads_of(py::handle given) {
  constexpr int64_t kMostThreads = 1024;
  const auto threads = integer("threads", given);
  require(threads >= 0 && threads <= kMostThreads, "threads must be from 0 to ", kMostThreads, ", got ", threads);
  return threads;
}

template <class T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace mgrpo::bindings
