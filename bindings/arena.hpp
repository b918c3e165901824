// Memory that fills take again and again: faulting fresh pages in costs more than writing to them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace mgrpo::bindings {

/// A writable buffer of Python's, held as long as anything refers to it.
class Slab {
 public:
  /// Throws std::invalid_argument unless `memory` is a writable contiguous buffer of at least `capacity` bytes, and
  /// kSlack more to begin at a page.
  Slab(const pybind11::object& memory, size_t capacity);
  ~Slab();
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  std::byte* data() const { return data_; }
  size_t capacity() const { return capacity_; }
  bool overlaps(const Slab& other) const;

  static constexpr size_t kPage = 4096, kSlack = kPage - 1;

 private:
  Py_buffer buffer_;
  std::byte* data_;
  size_t capacity_;
};

/// Slabs, each taken again once nothing else refers to it. Used with the GIL held.
class Arena {
 public:
  /// `allocate`: a Python callable that gives a writable buffer of so many bytes; None for numpy's own memory.
  explicit Arena(pybind11::object allocate = pybind11::none());

  /// A slab of `bytes` or more that nobody uses: the smallest that does, else a new one in place of those too small.
  std::shared_ptr<Slab> take(size_t bytes);

  size_t held() const;

 private:
  std::shared_ptr<Slab> allocate(size_t capacity) const;
  void drop_free();

  pybind11::object allocate_;
  std::vector<std::shared_ptr<Slab>> slabs_;
};

/// The arena that was given, else `fresh`, whose memory is new.
Arena& arena_or(Arena& fresh, const pybind11::object& given);

/// Lays columns out one after another, each at a cache line's start. Without memory it only adds them up.
class Columns {
 public:
  explicit Columns(std::byte* memory) : memory_(memory) {}

  template <class T>
  T* add(int64_t entries) {
    const size_t begin = used_;
    used_ += (entries * sizeof(T) + kLine - 1) / kLine * kLine;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + begin);
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kLine = 64;
  std::byte* memory_;
  size_t used_ = 0;
};

/// What keeps a slab from being taken again, as long as an array over a part of it lives.
pybind11::capsule keep(std::shared_ptr<Slab> slab);

/// An array over a part of a slab that `slab` keeps.
template <class T>
pybind11::array_t<T> part(T* column, int64_t begin, int64_t size, const pybind11::capsule& slab) {
  return pybind11::array_t<T>(static_cast<pybind11::ssize_t>(size), column + begin, slab);
}

}  // namespace mgrpo::bindings
