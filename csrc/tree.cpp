#include "tree.hpp"

#include <algorithm>
#include <limits>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "check.hpp"

namespace mgrpo {
namespace {

constexpr size_t kMostTrajectories = size_t{1} << 28;
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

template <class Token>
void check(const Sequences<Token>& given, int64_t cap, std::span<const int64_t> groups_N) {
  const auto offsets_N1 = given.offsets_N1, rows_N = given.rows_N;
  require(cap >= 1, "cap must be at least 1, got ", cap);
  require(!offsets_N1.empty(), "offsets is empty, expected one entry more than there are trajectories");
  require(offsets_N1[0] == 0, "offsets[0] is ", offsets_N1[0], ", expected 0");
  const size_t count = offsets_N1.size() - 1;
  require(count <= kMostTrajectories, "offsets has ", count, " trajectories, more than ", kMostTrajectories);
  require(rows_N.size() == count, "rows has ", rows_N.size(), " entries, expected one for each of the ", count,
          " trajectories");
  require(groups_N.empty() || groups_N.size() == count, "groups has ", groups_N.size(),
          " entries, expected one for each of the ", count, " trajectories");
  for (size_t n = 0; n < count; ++n) {
    require(offsets_N1[n + 1] >= offsets_N1[n], "offsets[", n + 1, "] is ", offsets_N1[n + 1], ", below offsets[", n,
            "] = ", offsets_N1[n]);
    const int64_t length = offsets_N1[n + 1] - offsets_N1[n];
    require(rows_N[n] >= 1 && rows_N[n] <= length, "rows[", n, "] is ", rows_N[n],
            ", expected from 1 to the trajectory's ", length, " tokens");
    require(rows_N[n] <= cap, "rows[", n, "] is ", rows_N[n], ", more than cap ", cap);
  }
  require(static_cast<uint64_t>(offsets_N1.back()) == given.tokens_T.size(), "offsets ends at ", offsets_N1.back(),
          ", expected the ", given.tokens_T.size(), " tokens");
}

/// Returns the tokens of each node's subtree, including the node's own run.
std::vector<int64_t> subtree_sizes(const Trie& trie) {
  std::vector<int64_t> size(trie.nodes.size(), 0);
  for (size_t node = trie.nodes.size(); node-- > 1;) {
    const int32_t parent = trie.nodes[node].parent;
    size[node] += trie.nodes[node].depth - trie.nodes[parent].depth;
    size[parent] += size[node];
  }
  return size;
}

struct Packing {
  std::vector<int32_t> bin_N;  // the bin of each trajectory, in the trie's order
  int32_t bins = 0;
  int64_t tokens = 0;
};

/// Packs one bin after another, walking down from the root. The largest subtree at a node that fits goes in whole. If
/// none fits, the walk enters the largest, provided that the tokens it may add are `worth` times those that its run
/// repeats. While a bin is empty the walk enters the largest first, whatever it repeats, as that one fits into no bin
/// whole.
class Packer {
 public:
  Packer(const Trie& trie, std::vector<int64_t> sizes, int64_t cap, int64_t worth)
      : trie_(trie), size_(std::move(sizes)), entered_(trie.nodes.size(), -1), cap_(cap), worth_(worth) {
    packing_.bin_N.resize(trie.order_N.size(), -1);
  }

  Packing pack() && {
    for (; !rest_of(0).empty(); ++packing_.bins) {
      room_ = cap_;
      bin_is_empty_ = true;
      enter(0, 0);
      while (!path_.empty()) {
        if (!take_whole() && !cut()) leave();
      }
      packing_.tokens += cap_ - room_;
    }
    return std::move(packing_);
  }

 private:
  using Key = std::pair<int64_t, int32_t>;  // (size, node)

  struct Visit {
    int32_t node;
    int64_t run;  // the tokens that it costs to be at this node
    Key below;    // larger children did not fit
    int tries;
    bool took;
  };

  static constexpr int kMostTries = 8;  // a gap that eight subtrees could not fill is left

  /// Returns the remaining children of a node, by size.
  std::set<Key>& rest_of(int32_t node) {
    const auto [found, fresh] = rest_.try_emplace(node);
    if (fresh) {
      std::vector<Key> keys;
      const Node& parent = trie_.nodes[node];
      for (int32_t c = parent.first_child; c < parent.first_child + parent.children; ++c)
        keys.emplace_back(size_[c], c);
      std::ranges::sort(keys);
      found->second = std::set<Key>(keys.begin(), keys.end());
    }
    return found->second;
  }

  void enter(int32_t node, int64_t run) {
    room_ -= run;
    entered_[node] = packing_.bins;
    path_.push_back({node, run, {kNever, 0}, 0, false});
  }

  bool take_whole() {
    auto& rest = rest_of(path_.back().node);
    const auto beyond = rest.upper_bound({room_, std::numeric_limits<int32_t>::max()});
    if (beyond == rest.begin() || (bin_is_empty_ && beyond != rest.end())) return false;
    const auto [size, node] = *std::prev(beyond);
    rest.erase(std::prev(beyond));
    for (int32_t r = trie_.nodes[node].begin; r < trie_.nodes[node].end; ++r) {
      if (packing_.bin_N[r] < 0) packing_.bin_N[r] = packing_.bins;
    }
    room_ -= size;
    size_[path_.back().node] -= size;
    bin_is_empty_ = false;
    path_.back().took = true;
    return true;
  }

  /// Enters the largest child that is worth entering.
  bool cut() {
    auto& here = path_.back();
    auto& rest = rest_of(here.node);
    while (here.tries < kMostTries) {
      const auto next = rest.lower_bound(here.below);
      if (next == rest.begin()) return false;
      const auto [size, node] = here.below = *std::prev(next);
      const int64_t run = trie_.nodes[node].depth - trie_.nodes[here.node].depth;
      if (bin_is_empty_ || is_worth(node, run)) {
        rest.erase(std::prev(next));
        size_[here.node] -= size;
        enter(node, run);
        return true;
      }
      ++here.tries;
    }
    return false;
  }

  bool is_worth(int32_t node, int64_t run) const {
    if (trie_.nodes[node].children == 0 || entered_[node] == packing_.bins || room_ <= run) return false;
    return run == 0 || (room_ - run) / run >= worth_;
  }

  void leave() {
    const auto [node, run, below, tries, took] = path_.back();
    path_.pop_back();
    if (!took) room_ += run;
    if (path_.empty()) return;
    auto& parent = path_.back();
    parent.took |= took;
    parent.tries += !took;
    if (rest_of(node).empty()) return;
    rest_of(parent.node).emplace(size_[node], node);
    size_[parent.node] += size_[node];
  }

  const Trie& trie_;
  std::vector<int64_t> size_;     // the size of the rest of each subtree
  std::vector<int32_t> entered_;  // the last bin that holds the node's run for a part of its subtree
  std::unordered_map<int32_t, std::set<Key>> rest_;
  std::vector<Visit> path_;
  Packing packing_;
  int64_t cap_, worth_, room_ = 0;
  bool bin_is_empty_ = true;
};

/// Returns the number of tokens that two leaves' paths share.
int64_t common_depth(const Trie& trie, int32_t a, int32_t b) {
  while (a != b) (a > b ? a : b) = trie.nodes[std::max(a, b)].parent;
  return trie.nodes[a].depth;
}

std::vector<int32_t> leaf_of_each(const Trie& trie) {
  std::vector<int32_t> leaf_N(trie.order_N.size());
  for (size_t node = 1; node < trie.nodes.size(); ++node) {
    const Node& at = trie.nodes[node];
    if (at.children == 0) std::fill(leaf_N.begin() + at.begin, leaf_N.begin() + at.end, static_cast<int32_t>(node));
  }
  return leaf_N;
}

/// Keeps one bin open in the given order, and closes it when the next trajectory does not fit, as other tree planners
/// do. Identical trajectories join the first of them.
Packing next_fit(const Trie& trie, int64_t cap) {
  const auto leaf_N = leaf_of_each(trie);
  std::vector<int32_t> place_N(leaf_N.size()),
      latest(trie.nodes.size(), -1);  // latest: the last bin that a node was put into
  for (size_t r = 0; r < leaf_N.size(); ++r) place_N[trie.order_N[r]] = static_cast<int32_t>(r);
  Packing packing{std::vector<int32_t>(leaf_N.size())};
  int64_t room = 0;
  for (const int32_t r : place_N) {
    const int32_t leaf = leaf_N[r];
    if (latest[leaf] < 0) {
      int32_t known = leaf;
      while (known > 0 && (packing.bins == 0 || latest[known] != packing.bins - 1)) known = trie.nodes[known].parent;
      int64_t more = trie.nodes[leaf].depth - trie.nodes[known].depth;
      if (more > room || packing.bins == 0) {
        ++packing.bins;
        room = cap;
        known = 0;
        more = trie.nodes[leaf].depth;
      }
      for (int32_t node = leaf; node != known; node = trie.nodes[node].parent) latest[node] = packing.bins - 1;
      room -= more;
      packing.tokens += more;
    }
    packing.bin_N[r] = latest[leaf];
  }
  return packing;
}

/// Chooses among several packings the one of the fewest bins, then the fewest tokens; but none of more bins than
/// next_fit's, and none that saves bins at the cost of 1/16 more tokens than another needs. Stops trying once the bins
/// are within 1/256 of what the distinct tokens alone need, or the tokens exceed that 1/16: the less a cut must be
/// worth, the more tokens are repeated.
Packing best_packing(const Trie& trie, int64_t cap) {
  const auto sizes = subtree_sizes(trie);
  const int64_t fewest = sizes[0] / cap + (sizes[0] % cap != 0);
  const bool branches = std::any_of(trie.nodes.begin() + 1, trie.nodes.end(), [](auto& node) { return node.children; });
  Packing best = Packer(trie, sizes, cap, kNever).pack(), simple = next_fit(trie, cap);
  const int64_t most_bins = simple.bins, most_tokens = best.tokens + best.tokens / 16;
  const auto rank = [&](const Packing& p) {
    return std::tuple(p.bins > most_bins, p.tokens > most_tokens ? p.tokens : 0, p.bins, p.tokens);
  };
  bool costly = false;
  for (const int64_t worth : {16, 8, 4, 2, 1, 0}) {
    if (!branches || (best.bins <= most_bins && (costly || best.bins - fewest <= fewest / 256))) break;
    Packing tried = Packer(trie, sizes, cap, worth).pack();
    costly = tried.tokens > most_tokens;
    if (rank(tried) < rank(best)) best = std::move(tried);
  }
  if (rank(simple) < rank(best)) best = std::move(simple);
  return best;
}

/// Sorts the trajectories by bin, in the trie's order.
TreePlan by_bin(const Trie& trie, const Packing& packing) {
  const size_t count = trie.order_N.size();
  TreePlan plan{std::vector<int64_t>(packing.bins + 1, 0), std::vector<int64_t>(count), std::vector<int64_t>(count, 0)};
  const auto leaf_N = leaf_of_each(trie);
  for (const int32_t bin : packing.bin_N) ++plan.offsets_M1[bin + 1];
  for (int32_t bin = 0; bin < packing.bins; ++bin) plan.offsets_M1[bin + 1] += plan.offsets_M1[bin];
  auto next_M = plan.offsets_M1;
  std::vector<int32_t> last_M(packing.bins, -1);
  for (size_t r = 0; r < count; ++r) {
    const int32_t bin = packing.bin_N[r];
    const int64_t at = next_M[bin]++;
    plan.ids_N[at] = trie.order_N[r];
    if (last_M[bin] >= 0) plan.shared_N[at] = common_depth(trie, last_M[bin], leaf_N[r]);
    last_M[bin] = leaf_N[r];
  }
  return plan;
}

}  // namespace

template <class Token>
TreePlan plan_tree(const Sequences<Token>& given, int64_t cap, std::span<const int64_t> groups_N) {
  check(given, cap, groups_N);
  const Trie trie = build_trie(given, groups_N);
  return by_bin(trie, best_packing(trie, cap));
}

template TreePlan plan_tree(const Sequences<int32_t>&, int64_t, std::span<const int64_t>);
template TreePlan plan_tree(const Sequences<int64_t>&, int64_t, std::span<const int64_t>);

}  // namespace mgrpo
