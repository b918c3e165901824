// The prediction rows of a prefix tree, equal ones found and made one: see tree_fill.hpp.
// A row may be asked for again while its token is on the path of a later trajectory. Such a row is "open": its sums are
// kept in double, and a hash of all that equal rows have in common leads to it, so that thousands of trajectories which
// share a token and no log-prob are no quadratic search. Most rows are not and cost their writing alone.
// Legend: as in tree_fill.hpp; H heads of chains.
#pragma once

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>
#include <vector>

#include "splitmix.hpp"
#include "tree_fill.hpp"

namespace mgrpo {

template <class Token>
class Predictions {
 public:
  Predictions(const TreeInput<Token>& given, const TreeBuffers& out) : given_(given), out_(out), head_H_(256, -1) {}

  /// Trajectory b's predictions of `count` tokens from t on, from packed tokens p and on: rows that stay as they are.
  void append(size_t b, int64_t p, int64_t t, int64_t count) {
    const int64_t id = given_.ids_B[b], m = std::exchange(count_, count_ + count);
    const Token* targets = given_.sequences.tokens_T.data() + t;
    std::iota(&out_.token_index_M[m], &out_.token_index_M[m] + count, p);
    std::copy(targets, targets + count, &out_.targets_M[m]);
    std::fill_n(&out_.segment_id_M[m], count, static_cast<int64_t>(b));
    std::fill_n(&out_.weights_M[m], count, static_cast<float>(given_.weights_N[id]));
    std::fill_n(&out_.advantages_M[m], count, static_cast<float>(given_.advantages_N[id]));
    for (size_t c = 0; c < out_.logprobs_M.size(); ++c) {
      std::copy_n(&given_.logprobs_T[c][t], count, &out_.logprobs_M[c][m]);
    }
  }

  /// The same, of tokens that no earlier trajectory has and the next one does.
  void append_open(size_t b, int64_t p, int64_t t, int64_t count) {
    const int64_t m = count_;
    append(b, p, t, count);
    for (int64_t i = 0; i < count; ++i) open(b, m + i, hash(b, p + i, t + i));
  }

  /// Trajectory b's prediction of token t from packed token p, which earlier ones may have predicted alike.
  void merge(size_t b, int64_t p, int64_t t) {
    if (found_ + 1 < open_.size() && alike(open_[found_ + 1], b, p, t)) return add(open_[++found_], b);  // most often
    const uint64_t key = hash(b, p, t);
    int32_t k = head_H_[key & (head_H_.size() - 1)];
    while (k >= 0 && !(open_[k].hash == key && alike(open_[k], b, p, t))) k = open_[k].before;
    if (k >= 0) return add(open_[found_ = k], b);
    append(b, p, t, 1);
    open(b, count_ - 1, key);
  }

  int64_t count() const { return count_; }

 private:
  struct Open {
    double weight, advantage;
    uint64_t hash;
    int32_t row, before;  // before: the latest earlier one of those whose hashes end alike, or -1
  };

  double weight_of(size_t b) const { return given_.weights_N[given_.ids_B[b]]; }
  double advantage_of(size_t b) const { return given_.advantages_N[given_.ids_B[b]]; }

  void open(size_t b, int64_t m, uint64_t key) {
    if (open_.size() == head_H_.size()) {
      head_H_.assign(2 * head_H_.size(), -1);
      for (size_t k = 0; k < open_.size(); ++k) link(k);
    }
    open_.push_back({weight_of(b), advantage_of(b), key, static_cast<int32_t>(m), -1});
    link(open_.size() - 1);
  }

  void link(size_t k) {
    open_[k].before = std::exchange(head_H_[open_[k].hash & (head_H_.size() - 1)], static_cast<int32_t>(k));
  }

  void add(Open& into, size_t b) {
    const double total = into.weight + weight_of(b);
    into.advantage = (into.weight * into.advantage + weight_of(b) * advantage_of(b)) / total;
    into.weight = total;
    out_.weights_M[into.row] = static_cast<float>(into.weight);
    out_.advantages_M[into.row] = static_cast<float>(into.advantage);
  }

  uint64_t hash(size_t b, int64_t p, int64_t t) const {
    uint64_t mixed = mix(mix(static_cast<uint64_t>(p)) ^ static_cast<uint64_t>(given_.sequences.tokens_T[t]));
    for (const auto& logprobs_T : given_.logprobs_T) mixed = mix(mixed ^ std::bit_cast<uint32_t>(logprobs_T[t]));
    return mixed ^ (advantage_of(b) < 0);
  }

  bool alike(const Open& earlier, size_t b, int64_t p, int64_t t) const {
    const int32_t m = earlier.row;
    if (out_.token_index_M[m] != p || out_.targets_M[m] != given_.sequences.tokens_T[t]) return false;
    if ((earlier.advantage < 0) != (advantage_of(b) < 0)) return false;
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
  std::vector<int32_t> head_H_;  // the latest open row of those whose hashes end in h
  size_t found_ = 0;
  int64_t count_ = 0;
};

}  // namespace mgrpo
