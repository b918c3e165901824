// Finds and merges equal prediction rows of a prefix tree: see tree_fill.hpp.
// A row may be needed again while its token is on the path of a later trajectory. Such a row is "open": its sums are
// kept in double until the end, and it is found by a hash of everything that equal rows have in common, so that
// thousands of trajectories which share a token but no log-prob do not cause a quadratic search. Other rows are only
// written. Legend: as in tree_fill.hpp; H heads of chains.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "check.hpp"
#include "splitmix.hpp"
#include "tree_fill.hpp"

namespace mgrpo {

template <class Token>
class Predictions {
 public:
  /// Prepares for about `reused` tokens that are on the paths of several trajectories.
  Predictions(const TreeInput<Token>& given, const TreeBuffers& out, int64_t reused)
      : given_(given), out_(out), head_H_(std::bit_ceil(static_cast<size_t>(reused) + 1), -1) {
    open_.reserve(head_H_.size());
  }

  /// Begins trajectory b: the rows added next are its rows.
  void begin(size_t b) {
    b_ = static_cast<int64_t>(b);
    weight_ = given_.weights_N[given_.ids_B[b]];
    advantage_ = given_.advantages_N[given_.ids_B[b]];
  }

  /// Adds the predictions of `count` tokens from t on, made by packed tokens from p on: rows that nothing merges with.
  void append(int64_t p, int64_t t, int64_t count) {
    const int64_t m = std::exchange(count_, count_ + count);
    const Token* targets = given_.sequences.tokens_T.data() + t;
    std::iota(&out_.token_index_M[m], &out_.token_index_M[m] + count, p);
    std::copy(targets, targets + count, &out_.targets_M[m]);
    std::fill_n(&out_.segment_id_M[m], count, b_);
    std::fill_n(&out_.weights_M[m], count, static_cast<float>(weight_));
    std::fill_n(&out_.advantages_M[m], count, static_cast<float>(advantage_));
    for (size_t c = 0; c < out_.logprobs_M.size(); ++c) {
      std::copy_n(&given_.logprobs_T[c][t], count, &out_.logprobs_M[c][m]);
    }
  }

  /// Does the same for tokens that no earlier trajectory has, but the next one does.
  void append_open(int64_t p, int64_t t, int64_t count) {
    const int64_t m = count_;
    append(p, t, count);
    for (int64_t i = 0; i < count; ++i) open(m + i, hash(p + i, t + i));
  }

  /// Adds the prediction of token t by packed token p, which earlier trajectories may have made too.
  void merge(int64_t p, int64_t t) {
    if (found_ + 1 < open_.size() && alike(open_[found_ + 1], p, t)) return add(open_[++found_]);  // the common case
    const uint64_t key = hash(p, t);
    int32_t k = head_H_[key & (head_H_.size() - 1)];
    while (k >= 0 && !(open_[k].hash == key && alike(open_[k], p, t))) k = open_[k].before;
    if (k >= 0) return add(open_[found_ = k]);
    append(p, t, 1);
    open(count_ - 1, key);
  }

  /// Writes the sums of the open rows and returns the number of rows.
  int64_t finish() {
    for (const Open& each : open_) {
      require(each.weight <= std::numeric_limits<float>::max(), "weights of a token that trajectories share sum to ",
              each.weight, ", expected a finite float32");
      out_.weights_M[each.row] = static_cast<float>(each.weight);
      out_.advantages_M[each.row] = static_cast<float>(each.advantage);
    }
    return count_;
  }

 private:
  struct Open {
    double weight, advantage;
    uint64_t hash;
    int32_t row, before;  // before: the previous row in the same hash chain, or -1
  };

  void open(int64_t m, uint64_t key) {
    if (open_.size() == head_H_.size()) {
      head_H_.assign(2 * head_H_.size(), -1);
      for (size_t k = 0; k < open_.size(); ++k) link(k);
    }
    open_.push_back({weight_, advantage_, key, static_cast<int32_t>(m), -1});
    link(open_.size() - 1);
  }

  void link(size_t k) {
    open_[k].before = std::exchange(head_H_[open_[k].hash & (head_H_.size() - 1)], static_cast<int32_t>(k));
  }

  void add(Open& into) {
    const double total = into.weight + weight_;
    into.advantage = (into.weight * into.advantage + weight_ * advantage_) / total;
    into.weight = total;
  }

  uint64_t hash(int64_t p, int64_t t) const {
    uint64_t seen = static_cast<uint64_t>(p) * kGolden + static_cast<uint64_t>(given_.sequences.tokens_T[t]);
    for (const auto& logprobs_T : given_.logprobs_T) seen = seen * kGolden + std::bit_cast<uint32_t>(logprobs_T[t]);
    return mix(seen) ^ (advantage_ < 0);
  }

  bool alike(const Open& earlier, int64_t p, int64_t t) const {
    const int32_t m = earlier.row;
    if (out_.token_index_M[m] != p || out_.targets_M[m] != given_.sequences.tokens_T[t]) return false;
    if ((earlier.advantage < 0) != (advantage_ < 0)) return false;
    for (size_t c = 0; c < out_.logprobs_M.size(); ++c) {
      if (std::bit_cast<uint32_t>(out_.logprobs_M[c][m]) != std::bit_cast<uint32_t>(given_.logprobs_T[c][t])) {
        return false;
      }
    }
    return true;
  }

  const TreeInput<Token>& given_;
  const TreeBuffers& out_;
  std::vector<Open> open_;
  std::vector<int32_t> head_H_;  // the latest row of open_ in each hash chain
  size_t found_ = 0;
  int64_t count_ = 0, b_ = 0;
  double weight_ = 0, advantage_ = 0;
};

}  // namespace mgrpo
