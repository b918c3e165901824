#include "arena.hpp"

#include <algorithm>
#include <utility>

#include "arrays.hpp"
#include "parts.hpp"

namespace mgrpo::bindings {

Slab::Slab(const py::object& memory, size_t capacity) : capacity_(capacity) {
  if (PyObject_GetBuffer(memory.ptr(), &buffer_, PyBUF_WRITABLE) != 0) {
    PyErr_Clear();
    refuse("allocate must return a writable contiguous buffer, got ", describe(memory));
  }
  const auto size = static_cast<size_t>(buffer_.len);
  if (size < capacity + kSlack) {
    PyBuffer_Release(&buffer_);
    refuse("allocate returned a buffer of ", size, " bytes, expected at least the ", capacity + kSlack, " asked for");
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer_.buf);
  data_ = static_cast<std::byte*>(buffer_.buf) + ((kPage - address % kPage) % kPage);
}

Slab::~Slab() { PyBuffer_Release(&buffer_); }

bool Slab::overlaps(const Slab& other) const {
  return data_ < other.data_ + other.capacity_ && other.data_ < data_ + capacity_;
}

Arena::Arena(py::object allocate) : allocate_(std::move(allocate)) {
  require(allocate_.is_none() || PyCallable_Check(allocate_.ptr()), "allocate must be callable or None, got ",
          describe(allocate_));
}

std::shared_ptr<Slab> Arena::take(size_t bytes) {
  const auto is_free = [](const auto& slab) { return slab.use_count() == 1; };
  std::shared_ptr<Slab> best;
  size_t outgrown = 0;
  for (const auto& slab : slabs_) {
    if (!is_free(slab)) continue;
    outgrown = std::max(outgrown, slab->capacity());
    if (slab->capacity() >= bytes && (!best || slab->capacity() < best->capacity())) best = slab;
  }
  if (best) return best;
  drop_free();
  auto fresh = allocate(std::max(bytes, outgrown + outgrown / 2));
  for (const auto& slab : slabs_) {
    require(!fresh->overlaps(*slab), "allocate returned memory that an earlier result still refers to");
  }
  slabs_.push_back(fresh);
  return fresh;
}

size_t Arena::held() const {
  size_t total = 0;
  for (const auto& slab : slabs_) total += slab->capacity();
  return total;
}

std::shared_ptr<Slab> Arena::allocate(size_t capacity) const {
  const auto size = static_cast<py::ssize_t>(capacity + Slab::kSlack);
  if (allocate_.is_none()) return std::make_shared<Slab>(py::array_t<uint8_t>(size), capacity);
  return std::make_shared<Slab>(allocate_(size), capacity);
}

/// Slabs leave the list before they are destroyed: destroying a Python buffer can run any code, also this arena's.
void Arena::drop_free() {
  const auto used = [](const auto& slab) { return slab.use_count() > 1; };
  const auto free = std::partition(slabs_.begin(), slabs_.end(), used);
  const std::vector<std::shared_ptr<Slab>> dropped(std::make_move_iterator(free),
                                                   std::make_move_iterator(slabs_.end()));
  slabs_.erase(free, slabs_.end());
}

Arena& arena_or(Arena& fresh, const py::object& given) {
  if (given.is_none()) return fresh;
  require(py::isinstance<Arena>(given), "arena must be an Arena or None, got ", describe(given));
  const auto* instance = reinterpret_cast<py::detail::instance*>(given.ptr());
  require(instance->simple_holder_constructed, "arena was made by Arena.__new__ and never initialised");
  return given.cast<Arena&>();
}

py::capsule keep(std::shared_ptr<Slab> slab) {
  auto* kept = new std::shared_ptr<Slab>(std::move(slab));
  return py::capsule(kept, [](void* pointer) { delete static_cast<std::shared_ptr<Slab>*>(pointer); });
}

void bind_arena(py::module_& module) {
  py::class_<Arena>(module, "Arena", R"(Arena(allocate=None)

Hold memory for `fill` and `tree_fill`. A later call reuses it once no array of an earlier call is left; memory that an
array still refers to is never overwritten. It holds as many slabs as were in use at one time, each as large as the
largest request; a slab that is too small is replaced by one at least half as large again.

allocate: called with a number of bytes, returns a writable buffer of that size or more, such as pinned memory; None for
numpy's. The arena cannot see reads after the last reference to an array is gone, such as a running copy to a GPU.
Raises ValueError if allocate is not callable, or returns something else, too little, or memory still in use.)")
      .def(py::init<py::object>(), py::arg("allocate") = py::none())
      .def_property_readonly("held", &Arena::held, "Bytes that it holds, in use or not.");
}

}  // namespace mgrpo::bindings
