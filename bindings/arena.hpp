// Memory that fills reuse: faulting in fresh pages costs more than writing to them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace mgrpo::bindings {

/// Holds a writable Python buffer as long as anything refers to it.
class Slab {
 public:
  /// Throws std::invalid_argument unless `memory` is a writable contiguous buffer of at least `capacity` bytes plus
  /// kSlack, which lets it begin at a page.
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

/// Holds slabs, each of which is reused once nothing else refers to it. Used with the GIL held.
class Arena {
 public:
  /// `allocate`: a Python callable that returns a writable buffer of a given number of bytes; None for numpy's memory.
  explicit Arena(pybind11::object allocate = pybind11::none());

  /// Returns an unused slab of at least `bytes`: the smallest, or else a new one, which replaces those too small.
  std::shared_ptr<Slab> take(size_t bytes);

  size_t held() const;

 private:
  std::shared_ptr<Slab> allocate(size_t capacity) const;
  void drop_free();

  pybind11::object allocate_;
  std::vector<std::shared_ptr<Slab>> slabs_;
};

/// Returns the arena that was given, or else `fresh`, whose memory is new.
Arena& arena_or(Arena& fresh, const pybind11::object& given);

/// Lays out columns one after another, each at the start of a cache line. Without memory it only adds up their sizes.
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

/// Returns an object that keeps a slab from being reused as long as an array over a part of it lives.
pybind11::capsule keep(std::shared_ptr<Slab> slab);

/// Returns an array over a part of a slab, which `slab` keeps from being reused.
template <class T>
pybind11::array_t<T> part(T* column, int64_t begin, int64_t size, const pybind11::capsule& slab) {
  return pybind11::array_t<T>(static_cast<pybind11::ssize_t>(size), column + begin, slab);
}

}  // namespace mgrpo::bindings
