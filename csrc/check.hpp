// Checks of what a caller hands in, for all parts of the packer: one line per check, with the message in pieces.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <sstream>
#include <stdexcept>

namespace mgrpo {

/// Separate from require, so that a check that holds costs only a comparison.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

/// Throws std::invalid_argument with the concatenated parts, unless `holds`.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) refuse(parts...);
}

/// Checks the offsets of runs that follow one another.
inline void check_rising(const char* name, std::span<const int64_t> offsets, const char* of) {
  require(!offsets.empty(), name, " is empty, expected one entry more than there are ", of);
  require(offsets[0] == 0, name, "[0] is ", offsets[0], ", expected 0");
  for (size_t n = 1; n < offsets.size(); ++n) {
    require(offsets[n] >= offsets[n - 1], name, "[", n, "] is ", offsets[n], ", below ", name, "[", n - 1,
            "] = ", offsets[n - 1]);
  }
}

/// Checks the bounds of the micro-batches within the `ids` entries of ids.
inline void check_bins(std::span<const int64_t> bins_M1, size_t ids) {
  check_rising("bins", bins_M1, "micro-batches");
  require(static_cast<size_t>(bins_M1.back()) == ids, "bins ends at ", bins_M1.back(), ", expected the ", ids,
          " entries that ids has");
}

inline void check_size(const char* name, size_t size, size_t expected, const char* of) {
  require(size == expected, name, " has ", size, " entries, expected one for each of the ", expected, " ", of);
}

inline void check_float32(const char* name, int64_t id, double value) {
  const bool finite = std::abs(value) <= std::numeric_limits<float>::max();  // false for nan
  require(finite, name, "[", id, "] is ", value, ", expected a finite float32");
}

}  // namespace mgrpo
