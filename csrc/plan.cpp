#include "plan.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <string_view>
#include <utility>

#include "best_fit.hpp"
#include "check.hpp"
#include "even_out.hpp"
#include "sort.hpp"
#include "splitmix.hpp"

namespace mgrpo {
namespace {

constexpr int64_t kFew = 32;  // this many of the cheapest bins are evened out; the others are already even

using Ids = std::vector<uint32_t>;

/// Checks the lengths and returns their sum.
int64_t check_lengths(std::span<const int64_t> lengths_N, int64_t cap) {
  require(cap >= 1, "cap must be at least 1, got ", cap);
  require(lengths_N.size() <= kMostSequences, "lengths has ", lengths_N.size(), " entries, expected at most ",
          kMostSequences);
  int64_t total = 0;
  for (size_t n = 0; n < lengths_N.size(); ++n) {
    require(lengths_N[n] >= 1, "lengths[", n, "] is ", lengths_N[n], ", expected at least 1");
    require(lengths_N[n] <= cap, "lengths[", n, "] is ", lengths_N[n], ", more than cap ", cap);
    require(lengths_N[n] <= std::numeric_limits<int64_t>::max() - total, "lengths[", n, "] is ", lengths_N[n],
            ": the sum exceeds the largest 64-bit integer");
    total += lengths_N[n];
  }
  return total;
}

void check_cost(Cost cost, int64_t total) {
  const bool valid = std::isfinite(cost.linear) && std::isfinite(cost.square) && cost.linear >= 0 && cost.square >= 0;
  require(valid && cost.linear + cost.square > 0,
          "cost must be two finite numbers, none negative and one positive, got (", cost.linear, ", ", cost.square,
          ")");
  // No sum of costs exceeds the cost of one sequence of all rows. Half of the range is kept for rounding errors.
  require(cost.of(total) <= std::numeric_limits<double>::max() / 2, "cost (", cost.linear, ", ", cost.square,
          ") is too large: that of the ", total, " rows in all is not finite");
}

void check(std::span<const int64_t> lengths_N, const Terms& terms) {
  const int64_t total = check_lengths(lengths_N, terms.cap);
  require(terms.ranks >= 1 && terms.ranks <= kMostRanks, "ranks must be from 1 to ", kMostRanks, ", got ", terms.ranks);
  require(terms.mini_batches >= 1 && terms.mini_batches <= kMostRanks / terms.ranks, "mini_batches must be from 1 to ",
          kMostRanks / terms.ranks, " at ranks = ", terms.ranks, ", got ", terms.mini_batches);
  check_cost(terms.cost, total);
}

/// Groups as items, by rising id. Item i holds sequences members_N[starts_I1[i]] .. members_N[starts_I1[i + 1] - 1].
struct Groups {
  Ids members_N, starts_I1;
  std::vector<int64_t> rows_I;
  std::vector<double> cost_I;
};

Groups gather(std::span<const int64_t> lengths_N, std::span<const int64_t> groups_N, const Terms& terms) {
  require(groups_N.size() == lengths_N.size(), "groups has ", groups_N.size(),
          " entries, expected one for each of the ", lengths_N.size(), " lengths");
  constexpr uint64_t sign = uint64_t{1} << 63;
  Groups made{
      sorted_by(groups_N.size(), [&](uint32_t n) { return static_cast<uint64_t>(groups_N[n]) ^ sign; }), {}, {}, {}};
  for (uint32_t at = 0; at < made.members_N.size(); ++at) {
    const uint32_t n = made.members_N[at];
    if (at == 0 || groups_N[n] != groups_N[made.members_N[at - 1]]) {
      made.starts_I1.push_back(at);
      made.rows_I.push_back(0);
      made.cost_I.push_back(0.0);
    }
    made.rows_I.back() += lengths_N[n];
    made.cost_I.back() += terms.cost.of(lengths_N[n]);
  }
  for (size_t i = 0; i < made.rows_I.size(); ++i) {
    require(made.rows_I[i] <= terms.cap, "groups: group ", groups_N[made.members_N[made.starts_I1[i]]], " has ",
            made.rows_I[i], " rows in all, more than cap ", terms.cap);
  }
  made.starts_I1.push_back(made.members_N.size());
  return made;
}

Ids longest_first(std::span<const int64_t> rows_I) {
  return sorted_by(rows_I.size(), [&](uint32_t i) { return ~static_cast<uint64_t>(rows_I[i]); });
}

/// Splits ids_I among the mini-batches, keeping its order: each item, most expensive first, goes to the cheapest part.
std::vector<Ids> deal_out(const Items& items, Ids ids_I, int64_t parts, uint64_t seed) {
  std::vector<Ids> dealt(parts);
  if (parts == 1) {
    dealt[0] = std::move(ids_I);
    return dealt;
  }
  std::vector<uint64_t> key_I;  // exponent and 4 bits of the cost, and below them random bits that shuffle
  for (uint32_t i = 0; i < ids_I.size(); ++i) {
    const uint64_t dear = std::bit_cast<uint64_t>(items.cost(i)) >> 48;
    key_I.push_back(~dear << 48 | start(seed, i) >> 16);
  }
  using Entry = std::pair<double, uint32_t>;
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> cheapest;
  for (uint32_t part = 0; part < parts; ++part) cheapest.emplace(0.0, part);
  Ids part_I(ids_I.size());
  for (const uint32_t i : sorted_by(ids_I.size(), [&](uint32_t i) { return key_I[i]; })) {
    const auto [cost, part] = cheapest.top();
    cheapest.pop();
    cheapest.emplace(cost + items.cost(i), part);
    part_I[i] = part;
  }
  for (const uint32_t i : ids_I) dealt[part_I[i]].push_back(i);
  return dealt;
}

/// Has no branch on whether rows change, which would be mispredicted half of the time.
std::vector<Run> runs_of(std::span<const int64_t> rows_I, const Ids& ids_K) {
  if (ids_K.empty()) return {};
  const uint64_t distinct = rows_I[ids_K.front()] - rows_I[ids_K.back()] + 1;
  std::vector<Run> runs(std::min<uint64_t>(distinct, ids_K.size()));
  size_t last = 0;
  int64_t rows = rows_I[ids_K.front()];
  for (uint32_t k = 0; k < ids_K.size(); ++k) {
    const int64_t previous = std::exchange(rows, rows_I[ids_K[k]]);
    __builtin_prefetch(&rows_I[ids_K[std::min<size_t>(k + 32, ids_K.size() - 1)]]);
    last += rows != previous;
    runs[last] = {rows, k + 1};
  }
  runs.resize(last + 1);
  return runs;
}

struct Bin {
  double cost = 0.0;
  uint32_t items = 0;
};

std::vector<Bin> sum_up(const Items& items, const Ids& ids_K, std::span<const Run> runs, const Fit& fit) {
  std::vector<Bin> bins_M(fit.bins);
  uint32_t k = 0;
  for (const auto& [rows, end] : runs) {
    const double each = items.rule.of(rows);
    for (; k < end; ++k) {
      Bin& bin = bins_M[fit.bin_K[k]];
      bin.cost += items.cost_I.empty() ? each : items.cost_I[ids_K[k]];
      ++bin.items;
    }
  }
  return bins_M;
}

/// Reverses every other turn of `ranks` bins (snake order). The bins begin with turn `turn`.
template <class Each>
void snake(std::span<Each> bins, int64_t ranks, int64_t turn) {
  for (; !bins.empty(); bins = bins.subspan(ranks), ++turn) {
    if (turn % 2) std::ranges::reverse(bins.first(ranks));
  }
}

/// Returns how many bins to even out: the cheapest few, in whole turns, or more if those have fewer items than bins.
int64_t few_of(std::span<const Bin> bins_M, const Ids& order_M, int64_t count, int64_t ranks) {
  int64_t few = 0, within = 0, m = order_M.size();
  while (few < count && (few < kFew || within < few)) {
    few += ranks;
    while (m > count - few) within += bins_M[order_M[--m]].items;
  }
  return few;
}

/// Writes the ids bin after bin, in the order of order_M. Returns the number of ids in each bin.
std::vector<int64_t> place(const Ids& ids_K, const Fit& fit, std::span<const Bin> bins_M, const Ids& order_M,
                           std::span<int64_t> into_K) {
  std::vector<int64_t> at_M(fit.bins), sizes_M;
  int64_t at = 0;
  for (const uint32_t m : order_M) {
    sizes_M.push_back(bins_M[m].items);
    at_M[m] = std::exchange(at, at + bins_M[m].items);
  }
  for (size_t k = 0; k < ids_K.size(); ++k) into_K[at_M[fit.bin_K[k]]++] = ids_K[k];
  return sizes_M;
}

/// Evens out the bins from `head` on, and brings the total number of bins to `count`.
void even_out_last(std::vector<int64_t>& sizes_M, std::span<int64_t> ids_K, const Items& items, size_t head,
                   int64_t count, const Terms& terms) {
  size_t at = std::reduce(sizes_M.begin(), sizes_M.begin() + head, size_t{0}), end = at;
  std::vector<FewBin> last(sizes_M.size() - head);
  for (size_t m = 0; m < last.size(); ++m) {
    for (const size_t start = end; end < start + sizes_M[head + m]; ++end) last[m].put(ids_K[end], items);
  }
  last = even_out(std::move(last), items, terms.cap, count - head, terms.ranks);
  snake(std::span(last), terms.ranks, head / terms.ranks);
  sizes_M.resize(head);
  for (const auto& bin : last) {
    std::ranges::copy(bin.ids, ids_K.begin() + at);
    at += bin.ids.size();
    sizes_M.push_back(bin.ids.size());
  }
}

/// Plans one mini-batch, whose items are in ids_K, longest first: writes the ids bin after bin, and returns how many
/// each bin has.
std::vector<int64_t> pack(const Items& items, const Ids& ids_K, const Terms& terms, std::string_view kind,
                          std::span<int64_t> into_K) {
  const auto runs = runs_of(items.rows_I, ids_K);
  const Fit fit = best_fit(runs, terms.cap);
  const int64_t fewest = std::max<int64_t>(fit.bins, terms.allow_empty || !items.rows_I.empty());
  const int64_t count = (fewest + terms.ranks - 1) / terms.ranks * terms.ranks;
  require(terms.allow_empty || static_cast<int64_t>(ids_K.size()) >= count, ids_K.size(), kind, " are too few for the ",
          count, " micro-batches that ranks = ", terms.ranks, " needs; pass allow_empty=True to leave some empty");
  if (ids_K.empty()) return std::vector<int64_t>(count);
  const auto bins_M = sum_up(items, ids_K, runs, fit);
  Ids order_M = sorted_by(fit.bins, [&](uint32_t m) { return ~std::bit_cast<uint64_t>(bins_M[m].cost); });
  const int64_t head = count - few_of(bins_M, order_M, count, terms.ranks);
  snake(std::span(order_M).first(head), terms.ranks, 0);
  auto sizes_M = place(ids_K, fit, bins_M, order_M, into_K);
  even_out_last(sizes_M, into_K, items, head, count, terms);
  return sizes_M;
}

/// Plans all mini-batches in terms of items: `offsets_M1` and `ids_I` refer to items.
Plan plan_items(const Items& items, const Terms& terms, std::string_view kind, std::span<int64_t> ids_I) {
  Plan plan{{0}, {0}};
  for (const auto& ids_K : deal_out(items, longest_first(items.rows_I), terms.mini_batches, terms.seed)) {
    const auto into_K = ids_I.subspan(plan.offsets_M1.back(), ids_K.size());
    for (const int64_t size : pack(items, ids_K, terms, kind, into_K)) {
      plan.offsets_M1.push_back(plan.offsets_M1.back() + size);
    }
    plan.mini_batches_B1.push_back(plan.offsets_M1.size() - 1);
  }
  return plan;
}

/// Turns a plan of groups into one of their sequences.
void ungroup(Plan& plan, const Groups& groups, std::span<const int64_t> ids_I, std::span<int64_t> ids_N) {
  std::vector<int64_t> ends_I1{0};
  for (const int64_t i : ids_I) {
    const auto members =
        std::span(groups.members_N).subspan(groups.starts_I1[i], groups.starts_I1[i + 1] - groups.starts_I1[i]);
    std::ranges::copy(members, ids_N.begin() + ends_I1.back());
    ends_I1.push_back(ends_I1.back() + static_cast<int64_t>(members.size()));
  }
  for (auto& offset : plan.offsets_M1) offset = ends_I1[offset];
}

}  // namespace

Plan plan(std::span<const int64_t> lengths_N, std::optional<std::span<const int64_t>> groups_N, const Terms& terms,
          std::span<int64_t> ids_N) {
  check(lengths_N, terms);
  if (!groups_N) return plan_items({lengths_N, terms.cost}, terms, " sequences", ids_N);
  const Groups groups = gather(lengths_N, *groups_N, terms);
  std::vector<int64_t> ids_I(groups.rows_I.size());
  Plan made = plan_items({groups.rows_I, terms.cost, groups.cost_I}, terms, " groups", ids_I);
  ungroup(made, groups, ids_I, ids_N);
  return made;
}

int64_t l2_bound(std::span<const int64_t> lengths_N, int64_t cap) {
  check_lengths(lengths_N, cap);
  const Ids ids_N = longest_first(lengths_N);
  const auto half = std::ranges::partition_point(ids_N, [&](uint32_t n) { return lengths_N[n] > cap - lengths_N[n]; });
  const int64_t large = half - ids_N.begin();
  // Items above cap - limit leave no room for small ones of at least `limit` rows; the other large ones leave `room`.
  int64_t small = 0, room = 0, bound = large;
  auto next = half;
  for (auto id = half; id != ids_N.end(); ++id) {
    const int64_t limit = lengths_N[*id];
    small += limit;
    for (; next != ids_N.begin() && lengths_N[*(next - 1)] <= cap - limit; --next) {
      const int64_t more = cap - lengths_N[*(next - 1)];
      room = room > std::numeric_limits<int64_t>::max() - more ? std::numeric_limits<int64_t>::max() : room + more;
    }
    if (small > room) bound = std::max(bound, large + (small - room - 1) / cap + 1);
  }
  return bound;
}

}  // namespace mgrpo
