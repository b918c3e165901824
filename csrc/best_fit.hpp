// Best-fit decreasing: the longest item first, each into the bin that it leaves the least room in.
// Departs from the textbook in the search for that bin, which does not grow with the number of bins: bins of equal
// room are chained, a bitmap with 64 branches a level finds the next room that some bin has, and equal items are put
// into a whole chain at a time.
// Legend: K items, longest first.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

/// Items of equal rows that follow one another: from the end of the run before to `end`.
struct Run {
  int64_t rows;
  uint32_t end;
};

struct Fit {
  std::vector<uint32_t> bin_K;
  uint32_t bins = 0;
};

/// Rows fall from run to run, all from 1 to `cap`. Of the bins with the least room, the one that has it for the
/// shortest time is chosen.
Fit best_fit(std::span<const Run> runs, int64_t cap);

}  // namespace mgrpo
