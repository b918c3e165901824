// Packing into prefix trees: plans which trajectories share a micro-batch when each common prefix is computed once.
// Unlike in bin packing, an item may be cut: a subtree that is too large for a bin, or worth cutting to fill one, is
// spread over several bins, with its path from the root repeated in each.
// Legend: N trajectories of T tokens in all, M micro-batches ("bins"). Trajectory n owns the tokens offsets_N1[n] ..
// offsets_N1[n + 1] - 1, of which the first rows_N[n] are computed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "trie.hpp"

namespace mgrpo {

/// Bin m holds the trajectories ids_N[offsets_M1[m]] .. ids_N[offsets_M1[m + 1] - 1] in depth-first order. shared_N is
/// the number of leading tokens that each shares with the one before it in its bin: the bin computes the sum of
/// rows - shared tokens, and the sequence of (id, shared) describes its trie.
struct TreePlan {
  std::vector<int64_t> offsets_M1;
  std::vector<int64_t> ids_N;
  std::vector<int64_t> shared_N;
};

/// Puts every trajectory into exactly one bin of at most `cap` distinct tokens. It tries several packings, from one
/// that only cuts subtrees larger than a bin to one that cuts others to fill every gap, and takes the one of the fewest
/// bins, then the fewest tokens; but never one of more bins than filling one open bin in the given order makes, and
/// none that saves bins at the cost of 1/16 more tokens than another needs. Identical trajectories stay together. This
/// is a pure function of its arguments.
///
/// Throws std::invalid_argument for offsets that do not rise from 0 to T, sizes that differ, rows outside 1 .. the
/// trajectory's length, rows above `cap`, or more than 2^28 trajectories. `groups_N` may be empty.
template <class Token>
TreePlan plan_tree(const Sequences<Token>& given, int64_t cap, std::span<const int64_t> groups_N);

}  // namespace mgrpo
