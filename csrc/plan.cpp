#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <queue>
#include <utility>

#include "best_fit.hpp"
#include "check.hpp"
#include "sort.hpp"

namespace mgrpo {
namespace {

constexpr int64_t kFew = 64;    // so many bins, the cheapest, are evened out
constexpr int kTries = 8;       // so many bins are tried for an item before evening out is given up

void check_lengths(std::span<const int64_t> lengths_N, int64_t cap) {
  require(cap >= 1, "cap must be at least 1, got ", cap);
  require(lengths_N.size() < kMostSequences, "lengths has ", lengths_N.size(), " entries, expected fewer than ", kMostSequences);
  int64_t total = 0;
  for (size_t n = 0; n < lengths_N.size(); ++n) {
    require(lengths_N[n] >= 1, "lengths[", n, "] is ", lengths_N[n], ", expected at least 1");
    require(lengths_N[n] <= cap, "lengths[", n, "] is ", lengths_N[n], ", more than cap ", cap);
    require(lengths_N[n] <= std::numeric_limits<int64_t>::max() - total, "lengths[", n, "] is ", lengths_N[n],
            ": the sum passes the largest 64-bit integer");
    total += lengths_N[n];
  }
}

double price(Cost cost, int64_t length) {
  const auto rows = static_cast<double>(length);
  return cost.linear * rows + cost.square * rows * rows;
}

void check_cost(std::span<const int64_t> lengths_N, Cost cost) {
  const bool valid = std::isfinite(cost.linear) && std::isfinite(cost.square) && cost.linear >= 0 && cost.square >= 0;
  require(valid && cost.linear + cost.square > 0,
          "cost must be two finite numbers, none negative and one positive, got (", cost.linear, ", ", cost.square,
          ")");
  double total = 0.0;
  for (size_t n = 0; n < lengths_N.size(); ++n) {
    total += price(cost, lengths_N[n]);
    require(std::isfinite(total), "cost (", cost.linear, ", ", cost.square, ") is too large: that of lengths[", n,
            "] = ", lengths_N[n], " brings the sum to infinity");
  }
}

Items longest_first(std::span<const int64_t> lengths_N, Cost cost) {
  Items items;
  items.ids_K = sorted_by(lengths_N.size(), [&](uint32_t n) { return ~static_cast<uint64_t>(lengths_N[n]); });
  items.rows_K.reserve(lengths_N.size());
  items.cost_K.reserve(lengths_N.size());
  for (const uint32_t n : items.ids_K) {
    items.rows_K.push_back(lengths_N[n]);
    items.cost_K.push_back(price(cost, lengths_N[n]));
  }
  return items;
}

/// A bin of those that are evened out.
struct Few {
  double cost = 0.0;
  int64_t rows = 0;
  std::vector<uint32_t> ks;  // its items, longest first
};

void put(Few& bin, uint32_t k, const Items& items) {
  bin.cost += items.cost_K[k];
  bin.rows += items.rows_K[k];
  bin.ks.push_back(k);
}

/// Halves a bin of several: the dearest item first, each to the cheaper half. The second half is returned.
Few split(Few& bin, const Items& items) {
  Few halves[2];
  for (const uint32_t k : bin.ks) put(halves[halves[1].cost < halves[0].cost], k, items);
  bin = std::move(halves[0]);
  return std::move(halves[1]);
}

/// Brings the bins to `count` by halving the dearest that has several items, again and again, as long as one has.
void open_further(std::vector<Few>& bins, const Items& items, size_t count) {
  std::priority_queue<std::pair<double, size_t>> several;
  const auto offer = [&](size_t m) {
    if (bins[m].ks.size() > 1) several.emplace(bins[m].cost, m);
  };
  for (size_t m = 0; m < bins.size(); ++m) offer(m);
  while (bins.size() < count && !several.empty()) {
    const size_t dearest = several.top().second;
    several.pop();
    bins.push_back(split(bins[dearest], items));
    offer(dearest);
    offer(bins.size() - 1);
  }
  bins.resize(count);
}

/// The items in `count` bins of even cost: the dearest item first, each into the cheapest bin with room (Graham 1969).
/// None if there is no room in the cheapest few.
std::optional<std::vector<Few>> spread(std::span<const uint32_t> ks, const Items& items, size_t count, int64_t cap) {
  std::vector<Few> bins(count);
  using Entry = std::pair<double, size_t>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> cheapest;
  for (size_t m = 0; m < count; ++m) cheapest.emplace(0.0, m);
  std::vector<Entry> full;
  for (const uint32_t k : ks) {
    while (!cheapest.empty() && bins[cheapest.top().second].rows > cap - items.rows_K[k]) {
      full.push_back(cheapest.top());
      cheapest.pop();
      if (full.size() == kTries) return std::nullopt;
    }
    if (cheapest.empty()) return std::nullopt;
    const size_t chosen = cheapest.top().second;
    cheapest.pop();
    put(bins[chosen], k, items);
    cheapest.emplace(bins[chosen].cost, chosen);
    for (const auto& entry : full) cheapest.push(entry);
    full.clear();
  }
  return bins;
}

void dearest_first(std::vector<Few>& bins) {
  std::ranges::stable_sort(bins, [](const Few& a, const Few& b) { return a.cost > b.cost; });
}

/// The time that the bins take, `ranks` at a time.
double lockstep(const std::vector<Few>& bins, int64_t ranks) {
  double time = 0.0;
  for (size_t m = 0; m < bins.size(); m += ranks) time += bins[m].cost;
  return time;
}

std::vector<Few> even_out(std::vector<Few> bins, const Items& items, int64_t count, int64_t ranks, int64_t cap) {
  std::vector<uint32_t> ks;
  double dearest = 0.0;
  for (const auto& bin : bins) {
    ks.insert(ks.end(), bin.ks.begin(), bin.ks.end());
    dearest = std::max(dearest, bin.cost);
  }
  std::ranges::sort(ks);
  auto dealt = spread(ks, items, count, cap);
  open_further(bins, items, count);
  dearest_first(bins);
  if (!dealt) return bins;
  dearest_first(*dealt);
  const bool better = dealt->front().cost <= dearest && lockstep(*dealt, ranks) < lockstep(bins, ranks);
  return better ? std::move(*dealt) : std::move(bins);
}

/// The place of the m-th dearest bin: `ranks` side by side, every other time from the last rank to the first.
int64_t snake(int64_t m, int64_t ranks) {
  const int64_t turn = m / ranks, rank = m % ranks;
  return turn * ranks + (turn % 2 ? ranks - 1 - rank : rank);
}

}  // namespace

Plan plan(std::span<const int64_t> lengths_N, int64_t cap, int64_t ranks, Cost cost, bool allow_empty) {
  check_lengths(lengths_N, cap);
  require(ranks >= 1 && ranks <= kMostRanks, "ranks must be from 1 to ", kMostRanks, ", got ", ranks);
  check_cost(lengths_N, cost);
  const Items items = longest_first(lengths_N, cost);
  const Fit fit = best_fit(items, cap);
  const auto fewest = std::max<int64_t>(fit.bins_M.size(), allow_empty ? 1 : 0);
  const int64_t count = (fewest + ranks - 1) / ranks * ranks;
  require(allow_empty || static_cast<int64_t>(lengths_N.size()) >= count, lengths_N.size(),
          " sequences are too few for the ", count, " micro-batches that ranks = ", ranks,
          " needs; pass allow_empty=True to leave some empty");
  Plan plan{std::vector<int64_t>(count + 1), std::vector<int64_t>(lengths_N.size())};
  if (lengths_N.empty()) return plan;

  const auto order_M = sorted_by(fit.bins_M.size(), [&](uint32_t m) { return ~std::bit_cast<uint64_t>(fit.bins_M[m].cost); });
  int64_t tail = 0, within = 0;
  const int64_t fresh = count - static_cast<int64_t>(order_M.size());
  while (tail < count && (tail < kFew || within < tail)) {
    tail += ranks;
    for (int64_t m = std::max<int64_t>(count - tail, 0); m < count - tail + ranks && m < (int64_t)order_M.size(); ++m) within += fit.bins_M[order_M[m]].items;
  }
  (void)fresh;
  const int64_t head = count - tail;
  std::vector<int64_t> at_M(order_M.size());
  std::vector<uint32_t> place_M(order_M.size());
  for (int64_t m = 0; m < (int64_t)order_M.size(); ++m) place_M[order_M[m]] = m < head ? snake(m, ranks) : m;
  for (size_t m = 0; m < order_M.size(); ++m) plan.offsets_M1[place_M[m] + 1] = fit.bins_M[m].items;
  std::partial_sum(plan.offsets_M1.begin(), plan.offsets_M1.end(), plan.offsets_M1.begin());
  for (size_t m = 0; m < order_M.size(); ++m) at_M[m] = plan.offsets_M1[place_M[m]];
  for (size_t k = 0; k < fit.bin_K.size(); ++k) {
    const uint32_t bin = fit.bin_K[k];
    plan.ids_N[at_M[bin]++] = place_M[bin] < head ? items.ids_K[k] : k;
  }
  std::vector<Few> few;
  for (int64_t m = head; m < (int64_t)order_M.size(); ++m) {
    few.emplace_back();
    for (int64_t i = plan.offsets_M1[m]; i < plan.offsets_M1[m + 1]; ++i) put(few.back(), plan.ids_N[i], items);
  }
  few = even_out(std::move(few), items, tail, ranks, cap);
  int64_t at = plan.offsets_M1[head];
  for (int64_t m = head; m < count; ++m) {
    for (const uint32_t k : few[snake(m, ranks) - head].ks) plan.ids_N[at++] = items.ids_K[k];
    plan.offsets_M1[m + 1] = at;
  }
  return plan;
}

}  // namespace mgrpo
