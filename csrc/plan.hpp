// Plans which sequences share a micro-batch, which micro-batches run side by side, and which make up a mini-batch.
// Legend: N sequences, M micro-batches ("bins"), B mini-batches.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "items.hpp"

namespace mgrpo {

/// The most bins side by side, over all mini-batches, and the most sequences.
inline constexpr int64_t kMostRanks = int64_t{1} << 20;
inline constexpr size_t kMostSequences = (size_t{1} << 31) - 1;

struct Terms {
  int64_t cap;
  int64_t ranks = 1;
  Cost cost{};
  int64_t mini_batches = 1;
  uint64_t seed = 0;
  bool allow_empty = false;
};

/// Mini-batch b has the bins mini_batches_B1[b] .. mini_batches_B1[b + 1] - 1; bin m holds the sequences
/// ids_N[offsets_M1[m]] .. ids_N[offsets_M1[m + 1] - 1].
struct Plan {
  std::vector<int64_t> mini_batches_B1;
  std::vector<int64_t> offsets_M1;
};

/// Puts every sequence into exactly one bin of at most `cap` rows, and writes ids_N. Sequences of one group, if groups
/// are given, share a bin.
///
/// The sequences are first divided into mini-batches of near-equal cost; those whose costs are within 1/16 of each
/// other are dealt in an order drawn from `seed`. In each mini-batch the number of bins is that of best-fit decreasing,
/// rounded up to a multiple of `ranks`. Bins j*ranks .. (j+1)*ranks - 1 run side by side: the bins are sorted by cost,
/// most expensive first (so that memory runs out at once or never), and dealt in snake order, so that rank r, which
/// runs bins r, r + ranks, ..., gets an equal share. This is a pure function of its arguments: ties are broken by
/// index.
///
/// Throws std::invalid_argument for a length below 1 or above `cap`, a cap below 1, ranks or mini-batches below 1 or
/// with a product above kMostRanks, a cost that is not finite, negative or all zero, groups that do not match the
/// lengths, a group of more than `cap` rows, and, unless `allow_empty`, for a mini-batch with fewer sequences (or
/// groups) than bins. Without sequences there are no bins, or with `allow_empty` `ranks` empty ones per mini-batch.
Plan plan(std::span<const int64_t> lengths_N, std::optional<std::span<const int64_t>> groups_N, const Terms& terms,
          std::span<int64_t> ids_N);

/// Returns a lower bound on the number of bins of `cap` rows: L2 of Martello and Toth (1990), section 8.3. Throws as
/// plan does.
int64_t l2_bound(std::span<const int64_t> lengths_N, int64_t cap);

}  // namespace mgrpo
