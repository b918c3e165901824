#include "align.hpp"

#include <numeric>

#include "test.hpp"

using namespace mgrpo;
using test::refuses;

namespace {

using Counts = std::vector<int64_t>;

/// Uses every rollout's index as its key.
std::vector<double> align_all(const Counts& counts_R, int64_t target, AlignMode mode, uint64_t seed) {
  std::vector<uint64_t> keys_R(counts_R.size());
  std::iota(keys_R.begin(), keys_R.end(), 0);
  return align(counts_R, target, mode, seed, keys_R);
}

void each_rollout_has_its_target() {
  for (const auto mode : {AlignMode::sampled, AlignMode::expected}) {
    const Counts counts_R = test::numbers(1, 200, 0, 30);
    const auto copies_T = align_all(counts_R, 8, mode, 5);
    auto at = copies_T.begin();
    for (const int64_t count : counts_R) {
      const double sum = std::accumulate(at, at + count, 0.0);
      CHECK(std::abs(sum - (count > 0 ? 8.0 : 0.0)) < 1e-9);
      at += count;
    }
    CHECK(at == copies_T.end());
  }
}

void a_rollout_does_not_depend_on_the_others() {
  const uint64_t keys_R[] = {7, 9}, second[] = {9};
  const auto both = align(Counts{5, 12}, 6, AlignMode::sampled, 3, keys_R);
  const auto alone = align(Counts{12}, 6, AlignMode::sampled, 3, second);
  CHECK(std::equal(alone.begin(), alone.end(), both.begin() + 5, both.end()));
}

void the_seed_matters() {
  const Counts counts_R(50, 12);
  CHECK(align_all(counts_R, 6, AlignMode::sampled, 1) == align_all(counts_R, 6, AlignMode::sampled, 1));
  CHECK(align_all(counts_R, 6, AlignMode::sampled, 1) != align_all(counts_R, 6, AlignMode::sampled, 2));
}

void extremes() {
  CHECK(align_all({}, 1, AlignMode::sampled, 0).empty());
  CHECK(align_all({0, 0}, kMostTarget, AlignMode::sampled, ~uint64_t{0}).empty());
  CHECK((align_all({1}, kMostTarget, AlignMode::sampled, 0) == std::vector<double>{double{kMostTarget}}));
}

void mistakes_are_refused() {
  const auto with = [](Counts counts_R, int64_t target) {
    return [=] { align_all(counts_R, target, AlignMode::sampled, 0); };
  };
  CHECK(refuses(with({3, -1}, 2), "counts[1] is -1"));
  CHECK(refuses(with({1, INT64_MAX}, 2), "the sum exceeds"));
  CHECK(refuses(with({1}, 0), "target must be from 1"));
  CHECK(refuses(with({1}, kMostTarget + 1), "target must be from 1"));
  CHECK(refuses([] { align(Counts{1, 2}, 2, AlignMode::sampled, 0, {}); }, "keys has 0 entries"));
}

}  // namespace

int main() {
  each_rollout_has_its_target();
  a_rollout_does_not_depend_on_the_others();
  the_seed_matters();
  extremes();
  mistakes_are_refused();
  return test::result();
}
