// What every part of the packer uses to refuse a caller's mistake: one line a check, the message in pieces.
#pragma once

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

}  // namespace mgrpo
