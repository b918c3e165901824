#include "plan.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <thread>

#include "best_fit.hpp"
#include "sort.hpp"
#include "test.hpp"

using namespace mgrpo;
using test::refuses;

namespace {

using Lengths = std::vector<int64_t>;
using Groups = std::optional<Lengths>;

struct Planned {
  Plan plan;
  Lengths ids_N;

  bool operator==(const Planned& other) const {
    return ids_N == other.ids_N && plan.offsets_M1 == other.plan.offsets_M1 &&
           plan.mini_batches_B1 == other.plan.mini_batches_B1;
  }
};

Planned planned(const Lengths& lengths_N, const Terms& terms, const Groups& groups_N = {}) {
  Planned made{{}, Lengths(lengths_N.size())};
  made.plan = groups_N ? plan(lengths_N, *groups_N, terms, made.ids_N) : plan(lengths_N, {}, terms, made.ids_N);
  return made;
}

void check_plan(const Lengths& lengths_N, const Terms& terms, const Groups& groups_N = {}) {
  const auto [plan, ids_N] = planned(lengths_N, terms, groups_N);
  std::vector<bool> seen_N(lengths_N.size());
  std::map<int64_t, size_t> bin_of;
  CHECK(plan.offsets_M1.front() == 0 && plan.offsets_M1.back() == static_cast<int64_t>(lengths_N.size()));
  for (size_t m = 0; m + 1 < plan.offsets_M1.size(); ++m) {
    int64_t rows = 0;
    for (int64_t at = plan.offsets_M1[m]; at < plan.offsets_M1[m + 1]; ++at) {
      const int64_t id = ids_N[at];
      CHECK(!seen_N.at(id));
      seen_N[id] = true;
      rows += lengths_N[id];
      if (groups_N) CHECK(bin_of.emplace((*groups_N)[id], m).first->second == m);
    }
    CHECK(rows <= terms.cap);
  }
  const auto& mini_B1 = plan.mini_batches_B1;
  CHECK(static_cast<int64_t>(mini_B1.size()) == terms.mini_batches + 1 && mini_B1.front() == 0);
  CHECK(mini_B1.back() == static_cast<int64_t>(plan.offsets_M1.size()) - 1);
  for (const int64_t begin : mini_B1) CHECK(begin % terms.ranks == 0);
}

void plans_hold_every_sequence_once() {
  for (const int64_t cap : {1, 2, 63, 64, 65, 4095, 4096, 4097, 16384, 1 << 24, (1 << 24) + 1}) {
    for (const size_t count : {0, 1, 7, 500, 5000}) {
      for (const int64_t ranks : {1, 3, 8}) {
        const auto lengths_N = test::numbers(cap + count, count, 1, cap);
        check_plan(lengths_N, {.cap = cap, .ranks = ranks, .allow_empty = true});
        check_plan(lengths_N, {.cap = cap, .ranks = ranks, .mini_batches = 3, .seed = 4, .allow_empty = true});
      }
    }
  }
}

void plans_keep_groups_together() {
  const auto lengths_N = test::numbers(1, 3000, 1, 40);
  const auto groups_N = test::numbers(2, 3000, -150, 150);
  check_plan(lengths_N, {.cap = 1000, .ranks = 4, .cost = {1.0, 0.01}}, groups_N);
  check_plan(lengths_N, {.cap = 1000, .ranks = 4, .mini_batches = 2, .seed = 9}, groups_N);
}

void extremes() {
  check_plan({INT64_MAX}, {.cap = INT64_MAX});
  check_plan({INT64_MAX - 1, 1}, {.cap = INT64_MAX});
  check_plan({1}, {.cap = 1, .ranks = kMostRanks, .allow_empty = true});
  check_plan({1, 1}, {.cap = 1, .ranks = 2, .mini_batches = kMostRanks / 2, .allow_empty = true});
  check_plan(Lengths(70000, 3), {.cap = 10, .ranks = 8});
  CHECK(planned({}, {.cap = 5, .ranks = 3}).plan.offsets_M1 == Lengths{0});
}

/// Checks that every rank computes the same plan by itself: nothing is shared, and nothing is random.
void threads_plan_alike() {
  const auto lengths_N = test::numbers(3, 20000, 1, 16384);
  const Terms terms{.cap = 16384, .ranks = 8, .cost = {1.0, 1e-4}, .mini_batches = 2, .seed = 1};
  std::vector<Planned> made(4);
  {
    std::vector<std::jthread> threads;
    for (auto& each : made) threads.emplace_back([&] { each = planned(lengths_N, terms); });
  }
  for (const auto& each : made) CHECK(each == made[0]);
}

/// Computes best-fit decreasing by looking at every bin.
uint32_t bins_needed(Lengths lengths_N, int64_t cap) {
  std::ranges::sort(lengths_N, std::greater<>{});
  std::multiset<int64_t> rooms;
  for (const int64_t rows : lengths_N) {
    const auto best = rooms.lower_bound(rows);
    const int64_t room = best == rooms.end() ? cap : *best;
    if (best != rooms.end()) rooms.erase(best);
    rooms.insert(room - rows);
  }
  return rooms.size();
}

void best_fit_needs_as_many_bins_as_the_plain_one() {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const int64_t cap = test::numbers(seed, 1, 1, seed % 2 ? 300 : 100'000)[0];
    auto lengths_N = test::numbers(seed, 400, 1, cap);
    for (auto& rows : lengths_N) rows = std::max<int64_t>(rows * rows / cap / 2, 1);  // many short ones
    std::ranges::sort(lengths_N, std::greater<>{});
    std::vector<Run> runs;
    for (uint32_t n = 0; n < lengths_N.size(); ++n) runs.push_back({lengths_N[n], n + 1});
    CHECK(best_fit(runs, cap).bins == bins_needed(lengths_N, cap));
  }
}

void sorting_is_stable_for_keys_of_any_size() {
  for (const int64_t high : {int64_t{0}, int64_t{1}, int64_t{300}, int64_t{1} << 40, INT64_MAX - 1}) {
    for (const size_t count : {0, 1, 2, 300, 70000}) {
      const auto keys_N = test::numbers(count, count, 0, high);
      std::vector<uint32_t> expected(count);
      std::iota(expected.begin(), expected.end(), 0);
      std::ranges::stable_sort(expected, [&](uint32_t a, uint32_t b) { return keys_N[a] < keys_N[b]; });
      CHECK(sorted_by(count, [&](uint32_t n) { return static_cast<uint64_t>(keys_N[n]); }) == expected);
    }
  }
}

void bounds() {
  CHECK(l2_bound({}, 1) == 0);
  CHECK(l2_bound(Lengths{6, 6, 6}, 10) == 3);
  CHECK(l2_bound(Lengths{6, 6, 4, 4}, 10) == 2);
  CHECK(l2_bound(Lengths{7, 7, 4, 4}, 10) == 3);  // the sum fits in 3, and 4 does not fit beside 7
  CHECK(l2_bound(Lengths{7, 7, 7, 4, 4}, 10) == 4);
  CHECK(l2_bound(Lengths{INT64_MAX}, INT64_MAX) == 1);
  CHECK(l2_bound(Lengths{INT64_MAX / 2 + 1, INT64_MAX / 2}, INT64_MAX) == 1);
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const auto lengths_N = test::numbers(seed, 200, 1, 1 + static_cast<int64_t>(seed) * 10);
    const int64_t cap = *std::ranges::max_element(lengths_N) + static_cast<int64_t>(seed % 7);
    CHECK(l2_bound(lengths_N, cap) <= bins_needed(lengths_N, cap));
  }
}

void mistakes_are_refused() {
  const auto with = [](Lengths lengths_N, Terms terms, Groups groups_N = {}) {
    return [=] { planned(lengths_N, terms, groups_N); };
  };
  CHECK(refuses(with({1}, {.cap = 0}), "cap must be at least 1, got 0"));
  CHECK(refuses(with({0}, {.cap = 1}), "lengths[0] is 0, expected at least 1"));
  CHECK(refuses(with({1, INT64_MIN}, {.cap = 1}), "lengths[1] is -9223372036854775808"));
  CHECK(refuses(with({3}, {.cap = 2}), "lengths[0] is 3, more than cap 2"));
  CHECK(refuses(with({INT64_MAX, 1}, {.cap = INT64_MAX}), "lengths[1] is 1: the sum exceeds"));
  CHECK(refuses(with({1}, {.cap = 1, .ranks = 0}), "ranks must be from 1"));
  CHECK(refuses(with({1}, {.cap = 1, .ranks = 2, .mini_batches = kMostRanks}), "mini_batches must be from 1"));
  CHECK(refuses(with({1}, {.cap = 1, .cost = {0.0, -1.0}}), "cost must be two finite numbers"));
  CHECK(refuses(with({2, 2}, {.cap = 2, .cost = {1e308, 0.0}}), "that of the 4 rows in all is not finite"));
  CHECK(refuses(with({1, 1}, {.cap = 2, .ranks = 3}), "2 sequences are too few for the 3"));
  CHECK(refuses(with({1, 1}, {.cap = 2}, Lengths{4}), "groups has 1 entries"));
  CHECK(refuses(with({1, 2}, {.cap = 2}, Lengths{4, 4}), "group 4 has 3 rows in all, more than cap 2"));
}

}  // namespace

int main() {
  plans_hold_every_sequence_once();
  plans_keep_groups_together();
  extremes();
  threads_plan_alike();
  best_fit_needs_as_many_bins_as_the_plain_one();
  sorting_is_stable_for_keys_of_any_size();
  bounds();
  mistakes_are_refused();
  return test::result();
}
