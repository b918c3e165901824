// Best-fit decreasing: the sequences, longest first, each into the bin that it leaves the least room in.
// Departs from the textbook in the search for that bin, which does not grow with the number of bins: bins of equal
// room are chained, and a bitmap with 64 branches a level finds the next room that some bin has.
// Legend: K items, longest first; M bins.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

/// What is put into bins, longest first: item k has rows_K[k] rows, all from 1 to the cap, and costs cost_K[k].
struct Items {
  std::vector<uint32_t> ids_K;
  std::vector<int64_t> rows_K;
  std::vector<double> cost_K;
};

struct Bin {
  double cost = 0.0;
  uint32_t items = 0;
  uint32_t next = 0;  // the bin that had the same room before
};

struct Fit {
  std::vector<uint32_t> bin_K;
  std::vector<Bin> bins_M;
};

/// Of the bins with the least room, the one that has it for the shortest time is chosen.
Fit best_fit(const Items& items, int64_t cap);

}  // namespace mgrpo
