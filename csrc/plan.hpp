// Which sequences share a micro-batch, and which micro-batches run side by side.
// Legend: N sequences, M micro-batches ("bins"), B mini-batches.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

inline constexpr int64_t kMostRanks = int64_t{1} << 20;
inline constexpr size_t kMostSequences = size_t{1} << 31;

/// What a sequence of L rows costs: linear * L + square * L^2. Neither may be negative, and one must be positive.
struct Cost {
  double linear = 1.0;
  double square = 0.0;
};

/// Bin m holds the sequences ids_N[offsets_M1[m]] .. ids_N[offsets_M1[m + 1] - 1].
struct Plan {
  std::vector<int64_t> offsets_M1;
  std::vector<int64_t> ids_N;
};

/// Puts every sequence into exactly one bin of at most `cap` rows; the number of bins is the multiple of `ranks` at or
/// above that of best-fit decreasing. Bins j*ranks .. (j+1)*ranks - 1 run side by side: the bins are sorted by cost,
/// dearest first (so that memory runs out at once or never), and dealt in snake order, so rank r, which runs bins r,
/// r + ranks, ..., has a share like all others. A pure function of its arguments: ties go by index.
///
/// Throws std::invalid_argument on a length below 1 or above `cap`, a cap below 1, ranks outside 1..kMostRanks, a cost
/// that is not finite, negative or all zero, and, unless `allow_empty`, on fewer sequences than bins are needed.
/// No sequences: no bins, or with `allow_empty` `ranks` empty ones.
Plan plan(std::span<const int64_t> lengths_N, int64_t cap, int64_t ranks, Cost cost, bool allow_empty);

}  // namespace mgrpo
