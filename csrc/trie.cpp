#include "trie.hpp"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

#include "sort.hpp"

namespace mgrpo {
namespace {

template <class Token>
class Builder {
 public:
  explicit Builder(const Sequences<Token>& given) : given_(given) {
    trie_.order_N.resize(given.rows_N.size());
    std::iota(trie_.order_N.begin(), trie_.order_N.end(), 0);
    trie_.nodes.push_back({0, 0, 0, static_cast<int32_t>(given.rows_N.size()), 0, 0});
  }

  Trie build(std::span<const int64_t> groups_N) && {
    if (groups_N.empty()) {
      split_by_token(0);
    } else {
      split(0, [&](int32_t n) { return groups_N[n]; });
    }
    for (size_t node = 1; node < trie_.nodes.size(); ++node) {
      if (!extend(trie_.nodes[node])) split_by_token(static_cast<int32_t>(node));
    }
    return std::move(trie_);
  }

 private:
  /// Sets the node's depth. Returns whether its sequences are identical.
  bool extend(Node& node) {
    const int64_t start = trie_.nodes[node.parent].depth;
    const int32_t first = trie_.order_N[node.begin];
    int64_t longest = node.depth = given_.rows_N[first];
    for (int32_t r = node.begin + 1; r < node.end; ++r) {
      const int32_t n = trie_.order_N[r];
      longest = std::max(longest, given_.rows_N[n]);
      node.depth = alike_until(given_[first], given_[n], start, std::min(node.depth, given_.rows_N[n]));
    }
    return node.depth == longest;
  }

  void split_by_token(int32_t node) {
    const int64_t depth = trie_.nodes[node].depth;
    split(node, [&](int32_t n) { return depth < given_.rows_N[n] ? static_cast<int64_t>(given_[n][depth]) : 0; });
  }

  /// Gives the node a child for each key; sequences that end with the node come first.
  template <class Key>
  void split(int32_t parent, Key key) {
    const Node node = trie_.nodes[parent];
    keyed_.clear();
    for (int32_t r = node.begin; r < node.end; ++r) {
      const int32_t n = trie_.order_N[r];
      keyed_.emplace_back(node.depth < given_.rows_N[n], key(n), n);
    }
    sort_keyed();
    trie_.nodes[parent].first_child = static_cast<int32_t>(trie_.nodes.size());
    for (size_t k = 0; k < keyed_.size(); ++k) {
      const auto r = static_cast<int32_t>(node.begin + k);
      trie_.order_N[r] = std::get<2>(keyed_[k]);
      const bool opens = k == 0 || std::get<0>(keyed_[k]) != std::get<0>(keyed_[k - 1]) ||
                         std::get<1>(keyed_[k]) != std::get<1>(keyed_[k - 1]);
      if (opens) {
        ++trie_.nodes[parent].children;
        trie_.nodes.push_back({node.depth, parent, r, r, 0, 0});
      }
      trie_.nodes.back().end = r + 1;
    }
  }

  void sort_keyed() {
    if (keyed_.size() < kMany) {
      std::ranges::sort(keyed_);
      return;
    }
    const auto key = [&](uint32_t k) { return static_cast<uint64_t>(std::get<1>(keyed_[k])) ^ (uint64_t{1} << 63); };
    auto to = keyed_;
    for (size_t k = 0; const uint32_t from : sorted_by(keyed_.size(), key)) to[k++] = keyed_[from];
    std::ranges::stable_partition(to, [](const auto& each) { return !std::get<0>(each); });
    keyed_ = std::move(to);
  }

  static constexpr size_t kMany = 4096;  // for more a radix sort is faster; both sorts are stable

  const Sequences<Token>& given_;
  Trie trie_;
  std::vector<std::tuple<bool, int64_t, int32_t>> keyed_;  // (continues beyond the node, key, sequence)
};

}  // namespace

template <class Token>
Trie build_trie(const Sequences<Token>& given, std::span<const int64_t> groups_N) {
  return Builder<Token>(given).build(groups_N);
}

template Trie build_trie(const Sequences<int32_t>&, std::span<const int64_t>);
template Trie build_trie(const Sequences<int64_t>&, std::span<const int64_t>);

}  // namespace mgrpo
