#include "align.hpp"

#include <algorithm>

#include "check.hpp"
#include "splitmix.hpp"

namespace mgrpo {
namespace {

/// Draws the random numbers of one rollout: splitmix64, started from its seed and key.
class Draws {
 public:
  Draws(uint64_t seed, uint64_t key) : state_(start(seed, key)) {}

  /// Draws uniformly from [0, bound). The lowest 2^64 mod bound numbers are rejected, so that all values are equally
  /// likely.
  int64_t below(int64_t bound) {
    const auto n = static_cast<uint64_t>(bound);
    uint64_t draw = next();
    while (draw < (0 - n) % n) draw = next();
    return static_cast<int64_t>(draw % n);
  }

 private:
  uint64_t next() { return mix(state_ += kGolden); }

  uint64_t state_;
};

void add_with_replacement(std::span<double> copies, int64_t target, Draws& draws) {
  const auto count = static_cast<int64_t>(copies.size());
  std::ranges::fill(copies, 1.0);
  for (int64_t i = count; i < target; ++i) copies[draws.below(count)] += 1.0;
}

/// Samples without replacement by Floyd's method: `target` draws for any count, and no table.
void choose_without_replacement(std::span<double> copies, int64_t target, Draws& draws) {
  const auto count = static_cast<int64_t>(copies.size());
  for (int64_t last = count - target; last < count; ++last) {
    const int64_t drawn = draws.below(last + 1);
    copies[copies[drawn] == 0.0 ? drawn : last] = 1.0;
  }
}

/// Checks the counts and returns their sum.
int64_t total_of(std::span<const int64_t> counts_R) {
  int64_t total = 0;
  for (size_t r = 0; r < counts_R.size(); ++r) {
    require(counts_R[r] >= 0, "counts[", r, "] is ", counts_R[r], ", expected at least 0");
    require(counts_R[r] <= kMostTrajectories - total, "counts[", r, "] is ", counts_R[r], ": the sum exceeds ",
            kMostTrajectories);
    total += counts_R[r];
  }
  return total;
}

}  // namespace

std::vector<double> align(std::span<const int64_t> counts_R, int64_t target, AlignMode mode, uint64_t seed,
                          std::span<const uint64_t> keys_R) {
  require(target >= 1 && target <= kMostTarget, "target must be from 1 to ", kMostTarget, ", got ", target);
  require(keys_R.size() == counts_R.size(), "keys has ", keys_R.size(), " entries, expected one for each of the ",
          counts_R.size(), " counts");
  std::vector<double> copies_T(total_of(counts_R), 0.0);
  std::span<double> rest(copies_T);
  for (size_t r = 0; r < counts_R.size(); ++r) {
    const auto copies = rest.first(counts_R[r]);
    rest = rest.subspan(counts_R[r]);
    if (copies.empty()) continue;
    Draws draws(seed, keys_R[r]);
    if (mode == AlignMode::expected) {
      std::ranges::fill(copies, static_cast<double>(target) / static_cast<double>(counts_R[r]));
    } else if (counts_R[r] <= target) {
      add_with_replacement(copies, target, draws);
    } else {
      choose_without_replacement(copies, target, draws);
    }
  }
  return copies_T;
}

}  // namespace mgrpo
