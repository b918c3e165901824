// What every part of the packer uses to refuse a caller's mistake: one line a check, the message in pieces.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace mgrpo {

/// Apart from require, so that a check that holds costs a comparison.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

/// Throws std::invalid_argument with the parts put together, unless `holds`.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) refuse(parts...);
}

inline void check_size(const char* name, size_t size, size_t expected, const char* of) {
  require(size == expected, name, " has ", size, " entries, expected one for each of the ", expected, " ", of);
}

inline void check_float32(const char* name, int64_t id, double value) {
  const bool finite = std::abs(value) <= std::numeric_limits<float>::max();  // false for nan
  require(finite, name, "[", id, "] is ", value, ", expected a finite float32");
}

}  // namespace mgrpo
