// The parts of mgrpo._packing that have their own files.
#pragma once

#include <pybind11/pybind11.h>

namespace mgrpo::bindings {

void bind_arena(pybind11::module_& module);
void bind_fill(pybind11::module_& module);
void bind_lists(pybind11::module_& module);
void bind_tree(pybind11::module_& module);

}  // namespace mgrpo::bindings
