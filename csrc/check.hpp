// What every part of the packer uses to refuse a caller's mistake: one line a check, the message in pieces.
#pragma once

#include <sstream>
#include <stdexcept>

namespace mgrpo {

/// Throws std::invalid_argument with the parts put together, unless `holds`.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace mgrpo
