#include "even_out.hpp"

#include <algorithm>
#include <functional>
#include <optional>
#include <queue>
#include <span>
#include <utility>

#include "sort.hpp"

namespace mgrpo {
namespace {

constexpr size_t kTries = 8;  // bins tried for room before redistribution is given up

using Entry = std::pair<double, size_t>;  // (cost, bin)

/// Halves a bin of several items: each item, longest first, goes to the cheaper half. Returns the second half.
FewBin split(FewBin& bin, const Items& items) {
  FewBin halves[2];
  for (const uint32_t id : bin.ids) halves[halves[1].cost < halves[0].cost].put(id, items);
  bin = std::move(halves[0]);
  return std::move(halves[1]);
}

/// Brings the bins to `count` by repeatedly halving the most expensive bin that has several items, while there is one.
void open_further(std::vector<FewBin>& bins, const Items& items, size_t count) {
  std::priority_queue<Entry> several;
  const auto offer = [&](size_t m) {
    if (bins[m].ids.size() > 1) several.emplace(bins[m].cost, m);
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

/// Returns the ids of all bins, longest first.
std::vector<uint32_t> pour_out(std::span<const FewBin> bins, const Items& items) {
  std::vector<uint32_t> ids, sorted;
  for (const auto& bin : bins) ids.insert(ids.end(), bin.ids.begin(), bin.ids.end());
  const auto order = sorted_by(ids.size(), [&](uint32_t i) { return ~static_cast<uint64_t>(items.rows_I[ids[i]]); });
  for (const uint32_t i : order) sorted.push_back(ids[i]);
  return sorted;
}

/// Puts each item into the cheapest of `count` bins that has room (list scheduling: Graham 1969). Returns none if the
/// few cheapest have no room.
std::optional<std::vector<FewBin>> deal_anew(std::span<const uint32_t> ids, const Items& items, int64_t cap,
                                             size_t count) {
  std::vector<FewBin> bins(count);
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> cheapest;
  for (size_t m = 0; m < count; ++m) cheapest.emplace(0.0, m);
  for (const uint32_t id : ids) {
    std::vector<Entry> passed_over;
    while (bins[cheapest.top().second].rows > cap - items.rows_I[id]) {
      passed_over.push_back(cheapest.top());
      cheapest.pop();
      if (cheapest.empty() || passed_over.size() == kTries) return std::nullopt;
    }
    const size_t chosen = cheapest.top().second;
    cheapest.pop();
    bins[chosen].put(id, items);
    cheapest.emplace(bins[chosen].cost, chosen);
    for (const auto& entry : passed_over) cheapest.push(entry);
  }
  return bins;
}

void sort_dearest_first(std::vector<FewBin>& bins) { std::ranges::stable_sort(bins, std::greater<>{}, &FewBin::cost); }

/// Returns the time that the bins, most expensive first, take if `ranks` of them run at a time.
double time_of(std::span<const FewBin> bins, int64_t ranks) {
  double time = 0.0;
  for (size_t m = 0; m < bins.size(); m += ranks) time += bins[m].cost;
  return time;
}

}  // namespace

void FewBin::put(uint32_t id, const Items& items) {
  cost += items.cost(id);
  rows += items.rows_I[id];
  ids.push_back(id);
}

std::vector<FewBin> even_out(std::vector<FewBin> bins, const Items& items, int64_t cap, int64_t count, int64_t ranks) {
  const double dearest = std::ranges::max(bins, {}, &FewBin::cost).cost;
  auto anew = deal_anew(pour_out(bins, items), items, cap, count);
  open_further(bins, items, count);
  sort_dearest_first(bins);
  if (!anew) return bins;
  sort_dearest_first(*anew);
  const bool better = anew->front().cost <= dearest && time_of(*anew, ranks) < time_of(bins, ranks);
  return better ? *std::move(anew) : bins;
}

}  // namespace mgrpo
