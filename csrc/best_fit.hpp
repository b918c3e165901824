// Best-fit decreasing: items are placed longest first, each into the bin where it leaves the least room.
// Unlike in the textbook, the search for that bin does not grow with the number of bins: bins of equal room are
// chained, a bitmap with 64 branches per level finds the next room that some bin has, and equal items are put into a
// whole chain at a time. Legend: K items, longest first.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

/// A run of consecutive items with equal rows: from the end of the previous run to `end`.
struct Run {
  int64_t rows;
  uint32_t end;
};

struct Fit {
  std::vector<uint32_t> bin_K;
  uint32_t bins = 0;
};

/// Rows fall from run to run, all from 1 to `cap`. Among bins with the least room, the one that reached it last is
/// chosen.
Fit best_fit(std::span<const Run> runs, int64_t cap);

}  // namespace mgrpo
