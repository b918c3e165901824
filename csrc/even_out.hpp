// Evens out a few bins and brings them to a given number. Where there are few bins, and at the end of many, best-fit
// decreasing leaves full bins beside nearly empty ones, and bins that run beside a full one wait for it.
#pragma once

#include <cstdint>
#include <vector>

#include "items.hpp"

namespace mgrpo {

struct FewBin {
  double cost = 0.0;
  int64_t rows = 0;
  std::vector<uint32_t> ids;  // its items, longest first

  void put(uint32_t id, const Items& items);
};

/// Returns the items in `count` bins (at least as many as given), most expensive first, none above `cap` rows. These
/// are the given bins, with the most expensive halved until there are `count`, or all items redistributed if that takes
/// less time with `ranks` bins at a time, and no more time for the first ones. Bins stay empty only if there are fewer
/// items than `count`.
std::vector<FewBin> even_out(std::vector<FewBin> bins, const Items& items, int64_t cap, int64_t count, int64_t ranks);

}  // namespace mgrpo
