// Aligns every rollout's sub-agent trajectories to a common number D (M-GRPO, arXiv 2511.13288, section 3) by
// multiplicities: a duplicated trajectory stays one copy with a whole number, and is never computed twice.
// Legend: R rollouts.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

enum class AlignMode { sampled, expected };

/// The largest number that a rollout can be aligned to, and the most trajectories that one call takes.
inline constexpr int64_t kMostTarget = int64_t{1} << 20;
inline constexpr int64_t kMostTrajectories = int64_t{1} << 28;

/// Returns the multiplicities of all trajectories, rollout after rollout. They sum to `target` over every rollout that
/// has any trajectories.
///
/// sampled: whole numbers. A rollout with fewer than `target` gets each trajectory once and the rest drawn uniformly
/// with replacement; one with more gets `target` of them, drawn uniformly without replacement. expected: target /
/// count. A rollout's draws depend only on (seed, key, count, target), not on its position or on other rollouts. Throws
/// std::invalid_argument on negative or too many counts, a target outside 1..kMostTarget, or keys that do not match the
/// counts.
std::vector<double> align(std::span<const int64_t> counts_R, int64_t target, AlignMode mode, uint64_t seed,
                          std::span<const uint64_t> keys_R);

}  // namespace mgrpo
