// Copies lists of lists of Python integers into one flat array: the only input that must be copied, so this is fast.
#include <pybind11/numpy.h>

#include <limits>
#include <span>

#include "check.hpp"
#include "parts.hpp"

namespace mgrpo::bindings {
namespace {

namespace py = pybind11;

/// Returns the items of a list or tuple. They cannot change while no Python code runs, and none runs below.
std::span<PyObject* const> items(py::handle given) {
  return {PySequence_Fast_ITEMS(given.ptr()), static_cast<size_t>(PySequence_Fast_GET_SIZE(given.ptr()))};
}

bool is_sequence(py::handle given) { return PyList_Check(given.ptr()) || PyTuple_Check(given.ptr()); }

const char* type_of(py::handle given) { return Py_TYPE(given.ptr())->tp_name; }

std::vector<int64_t> offsets_of(std::span<PyObject* const> lists_N) {
  std::vector<int64_t> offsets_N1{0};
  offsets_N1.reserve(lists_N.size() + 1);
  for (size_t n = 0; n < lists_N.size(); ++n) {
    require(is_sequence(lists_N[n]), "lists[", n, "] must be a list or tuple of int, got ", type_of(lists_N[n]));
    const auto length = static_cast<int64_t>(items(lists_N[n]).size());
    require(length <= std::numeric_limits<int64_t>::max() - offsets_N1.back(), "lists[", n, "] has ", length,
            " entries: the sum exceeds the largest 64-bit integer");
    offsets_N1.push_back(offsets_N1.back() + length);
  }
  return offsets_N1;
}

/// Accepts only int itself: True is not a token, and objects that convert to an integer would run their own code.
int64_t checked(PyObject* item, size_t n, size_t i) {
  require(PyLong_CheckExact(item), "lists[", n, "][", i, "] must be an int, got ", type_of(item));
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(item, &overflow);
  require(overflow == 0, "lists[", n, "][", i, "] does not fit in int64");
  return value;
}

py::tuple from_lists(const py::object& lists) {
  require(is_sequence(lists), "lists must be a list or tuple of lists, got ", type_of(lists));
  const auto offsets_N1 = offsets_of(items(lists));
  py::array_t<int64_t> values_T(static_cast<py::ssize_t>(offsets_N1.back()));
  const auto lists_N = items(lists);
  int64_t* to = values_T.mutable_data();
  for (size_t n = 0; n < lists_N.size(); ++n) {
    const auto list = items(lists_N[n]);
    for (size_t i = 0; i < list.size(); ++i) *to++ = checked(list[i], n, i);
  }
  return py::make_tuple(values_T, py::array_t<int64_t>(static_cast<py::ssize_t>(offsets_N1.size()), offsets_N1.data()));
}

}  // namespace

void bind_lists(py::module_& module) {
  module.def("from_lists", from_lists, py::arg("lists_N"),
             R"(from_lists(lists_N) -> (values_T, offsets_N1), both int64

Copy a list (or tuple) of N lists (or tuples) of int into one array: list n is
values_T[offsets_N1[n]:offsets_N1[n + 1]].
Raises ValueError, naming the place, for an entry that is not an int (a bool is not one) or does not fit in int64.)");
}

}  // namespace mgrpo::bindings
