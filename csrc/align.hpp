// Alignment of every rollout's sub-agent trajectories to a common number D (M-GRPO, arXiv 2511.13288, section 3),
// as multiplicities: a duplicated trajectory is one copy with a whole number, never computed twice.
// Legend: R rollouts.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mgrpo {

enum class AlignMode { sampled, expected };

/// The most that a rollout can be aligned to, and the most trajectories that one call takes in all.
inline constexpr int64_t kMostTarget = int64_t{1} << 20;
inline constexpr int64_t kMostTrajectories = int64_t{1} << 28;

/// Multiplicities of all trajectories, rollout after rollout, that sum to `target` over every rollout that has any.
///
/// sampled: whole numbers. A rollout short of `target` has each trajectory once and the rest uniformly with
/// replacement; one beyond it has `target` of them chosen uniformly without replacement. expected: target / count.
/// The draws of a rollout depend on (seed, key, count, target) alone: not on its place, not on other rollouts.
/// Throws std::invalid_argument on negative or too many counts, a target outside 1..kMostTarget, or keys that do
/// not match the counts.
std::vector<double> align(std::span<const int64_t> counts_R, int64_t target, AlignMode mode, uint64_t seed,
                          std::span<const uint64_t> keys_R);

}  // namespace mgrpo
