#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <utility>

#include "check.hpp"

namespace mgrpo {
namespace {

using Bin = std::vector<int64_t>;  // the ids of its sequences, longest first

/// Adds the lengths up, having checked each.
int64_t checked_total(std::span<const int64_t> lengths_N, int64_t cap) {
  int64_t total = 0;
  for (size_t n = 0; n < lengths_N.size(); ++n) {
    require(lengths_N[n] >= 1, "lengths[", n, "] is ", lengths_N[n], ", expected at least 1");
    require(lengths_N[n] <= cap, "lengths[", n, "] is ", lengths_N[n], ", more than cap ", cap);
    require(lengths_N[n] <= std::numeric_limits<int64_t>::max() - total, "lengths[", n, "] is ", lengths_N[n],
            ": the sum passes the largest 64-bit integer");
    total += lengths_N[n];
  }
  return total;
}

std::vector<double> checked_costs(std::span<const int64_t> lengths_N, Cost cost) {
  const bool valid = std::isfinite(cost.linear) && std::isfinite(cost.square) && cost.linear >= 0 && cost.square >= 0;
  require(valid && cost.linear + cost.square > 0,
          "cost must be two finite numbers, none negative and one positive, got (", cost.linear, ", ", cost.square,
          ")");
  std::vector<double> cost_N;
  cost_N.reserve(lengths_N.size());
  double total = 0.0;
  for (const int64_t length : lengths_N) {
    const auto rows = static_cast<double>(length);
    cost_N.push_back(cost.linear * rows + cost.square * rows * rows);
    total += cost_N.back();
    require(std::isfinite(total), "cost (", cost.linear, ", ", cost.square, ") is too large: that of lengths[",
            cost_N.size() - 1, "] = ", length, " brings the sum to infinity");
  }
  return cost_N;
}

std::vector<int64_t> longest_first(std::span<const int64_t> lengths_N) {
  std::vector<int64_t> ids_N(lengths_N.size());
  std::iota(ids_N.begin(), ids_N.end(), 0);
  std::ranges::stable_sort(ids_N, [&](int64_t a, int64_t b) { return lengths_N[a] > lengths_N[b]; });
  return ids_N;
}

/// Best-fit decreasing: each sequence goes to the bin that it leaves the least room in, the earliest of those.
std::vector<Bin> best_fit(std::span<const int64_t> lengths_N, std::span<const int64_t> ids_N, int64_t cap) {
  std::vector<Bin> bins;
  std::set<std::pair<int64_t, size_t>> room;  // (rows left, bin)
  for (const int64_t id : ids_N) {
    std::pair<int64_t, size_t> chosen{cap, bins.size()};
    if (const auto best = room.lower_bound({lengths_N[id], 0}); best != room.end()) {
      chosen = *best;
      room.erase(best);
    } else {
      bins.emplace_back();
    }
    bins[chosen.second].push_back(id);
    room.emplace(chosen.first - lengths_N[id], chosen.second);
  }
  return bins;
}

/// At most `count` bins, evenly filled instead of full ones and a remainder: best-fit decreasing under the smallest
/// cap that still needs no more than `count`, to 1/64 (MULTIFIT: Coffman, Garey and Johnson 1978). `bins` are those of
/// `cap`. Thousands of bins are even already: then no more than a few caps are tried.
std::vector<Bin> even_out(std::vector<Bin> bins, std::span<const int64_t> lengths_N, std::span<const int64_t> ids_N,
                          int64_t total, int64_t cap, int64_t count) {
  int64_t low = std::max(lengths_N[ids_N.front()], total / count);
  int64_t high = std::min(cap, total);
  while (high - low > high / 64) {
    const int64_t middle = low + (high - low) / 2;
    auto tried = best_fit(lengths_N, ids_N, middle);
    if (static_cast<int64_t>(tried.size()) <= count) {
      bins = std::move(tried);
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return bins;
}

double cost_of(const Bin& bin, std::span<const double> cost_N) {
  double cost = 0.0;
  for (const int64_t id : bin) cost += cost_N[id];
  return cost;
}

/// Halves a bin of several: the dearest sequence first, each to the cheaper half. The second half is returned.
Bin split(Bin& bin, std::span<const double> cost_N) {
  Bin halves[2];
  double cost[2] = {0.0, 0.0};
  for (const int64_t id : bin) {
    const int half = cost[1] < cost[0];
    halves[half].push_back(id);
    cost[half] += cost_N[id];
  }
  bin = std::move(halves[0]);
  return std::move(halves[1]);
}

/// Brings the bins to `count` by halving the dearest that has several sequences, again and again, as long as one has.
void open_further(std::vector<Bin>& bins, std::span<const double> cost_N, int64_t count) {
  std::priority_queue<std::pair<double, size_t>> several;
  const auto offer = [&](size_t m) {
    if (bins[m].size() > 1) several.emplace(cost_of(bins[m], cost_N), m);
  };
  for (size_t m = 0; m < bins.size(); ++m) offer(m);
  while (static_cast<int64_t>(bins.size()) < count && !several.empty()) {
    const size_t dearest = several.top().second;
    several.pop();
    bins.push_back(split(bins[dearest], cost_N));
    offer(dearest);
    offer(bins.size() - 1);
  }
}

/// Dearest first, `ranks` at a time, every other time from the last rank to the first.
Plan deal(const std::vector<Bin>& bins, std::span<const double> cost_N, int64_t ranks) {
  std::vector<std::pair<double, size_t>> order_M;
  for (size_t m = 0; m < bins.size(); ++m) order_M.emplace_back(-cost_of(bins[m], cost_N), m);
  std::ranges::sort(order_M);
  for (size_t m = ranks; m < order_M.size(); m += 2 * ranks) {
    std::reverse(order_M.begin() + m, order_M.begin() + m + ranks);
  }
  Plan plan{{0}, {}};
  for (const auto& [_, m] : order_M) {
    plan.ids_N.insert(plan.ids_N.end(), bins[m].begin(), bins[m].end());
    plan.offsets_M1.push_back(static_cast<int64_t>(plan.ids_N.size()));
  }
  return plan;
}

}  // namespace

Plan plan(std::span<const int64_t> lengths_N, int64_t cap, int64_t ranks, Cost cost, bool allow_empty) {
  require(cap >= 1, "cap must be at least 1, got ", cap);
  require(ranks >= 1 && ranks <= kMostRanks, "ranks must be from 1 to ", kMostRanks, ", got ", ranks);
  const int64_t total = checked_total(lengths_N, cap);
  const auto cost_N = checked_costs(lengths_N, cost);
  const auto ids_N = longest_first(lengths_N);
  auto bins = best_fit(lengths_N, ids_N, cap);
  const auto fewest = std::max<int64_t>(bins.size(), allow_empty ? 1 : 0);
  const int64_t count = (fewest + ranks - 1) / ranks * ranks;
  require(allow_empty || static_cast<int64_t>(lengths_N.size()) >= count, lengths_N.size(),
          " sequences are too few for the ", count, " micro-batches that ranks = ", ranks,
          " needs; pass allow_empty=True to leave some empty");
  if (!bins.empty()) bins = even_out(std::move(bins), lengths_N, ids_N, total, cap, count);
  open_further(bins, cost_N, count);
  bins.resize(count);
  return deal(bins, cost_N, ranks);
}

}  // namespace mgrpo
