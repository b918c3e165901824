// A few bins evened out, and brought to a wanted number: where the bins are few, and at the end of many, best-fit
// decreasing leaves full ones beside scraps, and those beside a full one wait for it.
#pragma once

#include <cstdint>
#include <vector>

#include "items.hpp"

namespace mgrpo {

struct FewBin {
  double cost = 0.0;
  int64_t rows = 0;
  std::vector<uint32_t> ids;  // of its items, longest first

  void put(uint32_t id, const Items& items);
};

/// The items of the bins in `count` bins, at least as many, dearest first, none above `cap` rows: those given, the
/// dearest of them halved until there are `count`, or all items dealt anew if that takes less time at `ranks` bins a
/// turn and no more for the first. Bins stay empty only if there are fewer items than `count`.
std::vector<FewBin> even_out(std::vector<FewBin> bins, const Items& items, int64_t cap, int64_t count, int64_t ranks);

}  // namespace mgrpo
