// Fills the flat buffers of one micro-batch of a tree plan, under the names of TRL 1.16's TreeRow.
//
// TreeRow's trie forks one token before the trajectories do, so that each token has one label. Here every distinct
// prefix is one token, and predictions have their own rows. A prediction row is (token whose hidden state predicts,
// target, weight, advantage, log-probs); a token at a fork has several. Rows of equal token, target and log-probs and
// of one advantage sign are merged into one, with the weights summed and the advantages averaged by weight.
//
// This is exact: in a causal model a hidden state depends only on the token's path from the root, which is the
// trajectory's own prefix at its own positions. So merged rows have the same log-prob, ratio and sampler weight; each
// term of the loss is linear in the weight; and the clipped term is positively homogeneous in the advantage among those
// of one sign (0 counts as either). So positive and negative advantages stay apart, and so do differing log-probs.
// It does not hold if a trajectory shares one ratio among its rows (importance "sequence" or "trajectory"): do not
// merge there.
//
// Legend: B trajectories, P tokens, S segments, K entries of the paths, M prediction rows; N and T as in tree.hpp.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "trie.hpp"

namespace mgrpo {

template <class Token>
struct TreeInput {
  Sequences<Token> sequences;
  std::span<const uint8_t> sampled_T;
  std::span<const double> advantages_N;
  std::span<const double> weights_N;  // the weight of each sampled token, not negative
  std::span<const int64_t> ids_B;     // a bin of plan_tree, or any trajectories in any order
  std::span<const int64_t> shared_B;  // leading tokens shared with the one before
  std::vector<std::span<const float>> logprobs_T;
  bool merge = true;
  int64_t first = 0;  // index of ids_B[0] among all ids that the caller gave; messages count from there
};

/// Holds the layout of the buffers. A segment is a run of tokens that ends where trajectories part or end.
struct TreeLayout {
  std::vector<int32_t> cu_seqlens_q_S1;  // bounds of the segments
  std::vector<int32_t> cu_seqlens_k_S1;  // bounds of the paths, from the root to the end of each segment
  std::vector<int32_t> leaf_B;           // the last segment of each trajectory
  int64_t longest_segment = 0, longest_path = 0;
  int64_t most_predictions = 0;  // before merging

  int64_t tokens() const { return cu_seqlens_q_S1.back(); }
  int64_t paths() const { return cu_seqlens_k_S1.back(); }
};

struct TreeBuffers {
  std::span<int64_t> input_ids_P;
  std::span<int64_t> positions_P;
  std::span<int64_t> kv_index_K;
  std::span<int64_t> token_index_M;  // this and the following have TreeLayout::most_predictions entries
  std::span<int64_t> targets_M;
  std::span<int64_t> segment_id_M;  // the first trajectory that the row stands for, as an index into ids_B
  std::span<float> weights_M;
  std::span<float> advantages_M;
  std::vector<std::span<float>> logprobs_M;
};

/// Checks all of the input that the batch uses, and lays it out. Throws std::invalid_argument, naming the trajectory,
/// for sizes that differ, ids out of range, bounds outside the tokens, rows outside 1 .. the trajectory's length,
/// shared tokens that differ, an advantage or weight that is not finite as float32, a negative weight, or more entries
/// than int32 can count.
template <class Token>
TreeLayout lay_out_tree(const TreeInput<Token>& given);

/// Fills the buffers and returns M. `lay_out_tree` has checked everything.
template <class Token>
int64_t fill_tree(const TreeInput<Token>& given, const TreeLayout& layout, const TreeBuffers& out);

}  // namespace mgrpo
