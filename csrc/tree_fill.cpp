#include "tree_fill.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "check.hpp"
#include "tree_rows.hpp"

namespace mgrpo {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

template <class Token>
void check_sizes(const TreeInput<Token>& given) {
  const auto& [tokens_T, offsets_N1, rows_N] = given.sequences;
  require(!offsets_N1.empty(), "offsets is empty, expected one entry more than there are trajectories");
  check_size("sampled", given.sampled_T.size(), tokens_T.size(), "tokens");
  check_size("rows", rows_N.size(), offsets_N1.size() - 1, "trajectories");
  check_size("advantages", given.advantages_N.size(), offsets_N1.size() - 1, "trajectories");
  check_size("weights", given.weights_N.size(), offsets_N1.size() - 1, "trajectories");
  check_size("shared", given.shared_B.size(), given.ids_B.size(), "ids");
  require(static_cast<int64_t>(given.ids_B.size()) < kMost, "ids has ", given.ids_B.size(),
          " entries, more than int32 can count");
}

template <class Token>
void check_trajectory(const TreeInput<Token>& given, size_t b) {
  const auto& [tokens_T, offsets_N1, rows_N] = given.sequences;
  const int64_t id = given.ids_B[b], count = static_cast<int64_t>(rows_N.size());
  require(id >= 0 && id < count, "ids[", given.first + b, "] is ", id, ", expected from 0 to below ", count);
  const int64_t start = offsets_N1[id], stop = offsets_N1[id + 1], tokens = static_cast<int64_t>(tokens_T.size());
  require(start >= 0 && start <= stop && stop <= tokens, "offsets[", id, "] and offsets[", id + 1, "] are ", start,
          " and ", stop, ", expected to rise within the ", tokens, " tokens");
  require(rows_N[id] >= 1 && rows_N[id] <= stop - start, "rows[", id, "] is ", rows_N[id],
          ", expected from 1 to the trajectory's ", stop - start, " tokens");
  check_float32("advantages", id, given.advantages_N[id]);
  check_float32("weights", id, given.weights_N[id]);
  require(given.weights_N[id] >= 0, "weights[", id, "] is ", given.weights_N[id], ", expected at least 0");
}

template <class Token>
void check_shared(const TreeInput<Token>& given, size_t b) {
  const auto& sequences = given.sequences;
  const int64_t shared = given.shared_B[b], id = given.ids_B[b], place = given.first + static_cast<int64_t>(b);
  require(b > 0 || shared == 0, "shared[", place, "] is ", shared,
          ", expected 0: there is no trajectory before it in its micro-batch");
  if (b == 0) return;
  const int64_t before = given.ids_B[b - 1], most = std::min(sequences.rows_N[id], sequences.rows_N[before]);
  require(shared >= 0 && shared <= most, "shared[", place, "] is ", shared, ", expected from 0 to the ", most,
          " rows of trajectories ", before, " and ", id);
  const int64_t alike = alike_until(sequences[id], sequences[before], 0, shared);
  require(alike == shared, "shared[", place, "] is ", shared, ", but trajectories ", before, " and ", id,
          " part after ", alike, " tokens");
}

/// A prefix of a trajectory as runs of packed tokens: from depth `depth` on it is stored from `start` on.
struct Run {
  int64_t depth, start;
};

class Path {
 public:
  /// Keeps the first `depth` tokens and continues at packed position `start`.
  void fork(int64_t depth, int64_t start) {
    while (!runs_.empty() && runs_.back().depth >= depth) runs_.pop_back();
    runs_.push_back({depth, start});
  }

  /// Returns the packed position of the path's token at `depth`.
  int64_t position(int64_t depth) const {
    const Run run = *(std::ranges::upper_bound(runs_, depth, {}, &Run::depth) - 1);
    return run.start + depth - run.depth;
  }

  /// Calls visit(from, to, start) for the runs of the first `depth` tokens: depths `from` to `to` are stored from
  /// `start` on.
  template <class Visit>
  void each_run(int64_t depth, Visit visit) const {
    for (size_t r = 0; r < runs_.size() && runs_[r].depth < depth; ++r) {
      const int64_t next = r + 1 < runs_.size() ? runs_[r + 1].depth : depth;
      visit(runs_[r].depth, std::min(next, depth), runs_[r].start);
    }
  }

 private:
  std::vector<Run> runs_;
};

/// Computes the bounds of the segments and, in leaf_B, the packed position of each trajectory's last token.
template <class Token>
std::vector<int32_t> segment_bounds(const TreeInput<Token>& given, std::vector<int32_t>& leaf_B) {
  Path path;
  int64_t tokens = 0;
  std::vector<int32_t> bounds{0};
  for (size_t b = 0; b < given.ids_B.size(); ++b) {
    const int64_t rows = given.sequences.rows_N[given.ids_B[b]], shared = given.shared_B[b];
    require(rows - shared <= kMost - tokens, "ids[", given.first + b, "] = ", given.ids_B[b], " brings the batch to ",
            tokens, " + ", rows - shared, " tokens, more than int32 can count");
    if (shared > 0) bounds.push_back(static_cast<int32_t>(path.position(shared - 1) + 1));
    path.fork(shared, tokens);
    tokens += rows - shared;
    leaf_B.push_back(static_cast<int32_t>(path.position(rows - 1)));
    bounds.push_back(static_cast<int32_t>(tokens));
  }
  std::ranges::sort(bounds);
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  return bounds;
}

/// Calls visit(path, depth at the segment's end, segment) for each segment, in order.
template <class Token, class Visit>
void for_each_segment(const TreeInput<Token>& given, std::span<const int32_t> bounds_S1, Visit visit) {
  Path path;
  int64_t start = 0;
  size_t segment = 0;
  for (size_t b = 0; b < given.ids_B.size(); ++b) {
    const int64_t rows = given.sequences.rows_N[given.ids_B[b]], shared = given.shared_B[b];
    path.fork(shared, start);
    const int64_t stop = start + rows - shared;
    for (; bounds_S1[segment] < stop; ++segment) visit(path, shared + bounds_S1[segment + 1] - start, segment);
    start = stop;
  }
}

template <class Token>
int64_t count_predictions(const TreeInput<Token>& given) {
  int64_t count = 0;
  for (const int64_t id : given.ids_B) {
    if (given.weights_N[id] == 0) continue;
    const auto [start, stop] = std::pair(given.sequences.offsets_N1[id], given.sequences.offsets_N1[id + 1]);
    const int64_t last = std::min(start + given.sequences.rows_N[id] + 1, stop);
    for (int64_t t = start + 1; t < last; ++t) count += given.sampled_T[t] != 0;
    require(count <= kMost, "trajectory ", id, " brings the batch to ", count,
            " predictions, more than int32 can count");
  }
  return count;
}

/// Calls visit(from, to) for the longest ranges within `begin` to `end` in which every token is sampled.
template <class Visit>
void each_sampled(const uint8_t* sampled, int64_t begin, int64_t end, Visit visit) {
  for (int64_t from = begin; from < end; ++from) {
    if (!sampled[from]) continue;
    const auto* stop = static_cast<const uint8_t*>(std::memchr(sampled + from, 0, end - from));
    const int64_t to = stop ? stop - sampled : end;
    visit(from, to);
    from = to;
  }
}

/// Writes tokens, positions and predictions of trajectory b, whose own tokens begin at packed position `start`. The
/// next trajectory may share some of these; if it does not, no later one does.
template <class Token>
void fill_trajectory(const TreeInput<Token>& given, size_t b, int64_t start, const Path& path, const TreeBuffers& out,
                     Predictions<Token>& predictions) {
  const int64_t id = given.ids_B[b], first = given.sequences.offsets_N1[id];
  const int64_t rows = given.sequences.rows_N[id], shared = given.shared_B[b];
  const Token* tokens = given.sequences[id];
  std::copy(tokens + shared, tokens + rows, out.input_ids_P.begin() + start);
  std::iota(out.positions_P.begin() + start, out.positions_P.begin() + start + rows - shared, shared);
  if (given.weights_N[id] == 0) return;
  predictions.begin(b);
  const int64_t predicting = std::min(rows, given.sequences.offsets_N1[id + 1] - first - 1);
  const int64_t next = given.merge && b + 1 < given.ids_B.size() ? given.shared_B[b + 1] : 0;
  const int64_t closed = std::clamp(next, std::min(shared, predicting), predicting);
  const uint8_t* sampled = given.sampled_T.data() + first + 1;  // whether the token that row i predicts is sampled
  path.each_run(std::min(shared, predicting), [&](int64_t begin, int64_t end, int64_t at) {
    each_sampled(sampled, begin, end, [&](int64_t from, int64_t to) {
      if (!given.merge) return predictions.append(at + from - begin, first + from + 1, to - from);
      for (int64_t i = from; i < to; ++i) predictions.merge(at + i - begin, first + i + 1);
    });
  });
  each_sampled(sampled, shared, closed, [&](int64_t from, int64_t to) {
    predictions.append_open(start + from - shared, first + from + 1, to - from);
  });
  each_sampled(sampled, closed, predicting, [&](int64_t from, int64_t to) {
    predictions.append(start + from - shared, first + from + 1, to - from);
  });
}

/// Returns the number of tokens that trajectories add and the next one shares.
template <class Token>
int64_t reused_tokens(const TreeInput<Token>& given) {
  int64_t count = 0;
  for (size_t b = 1; b < given.shared_B.size(); ++b) {
    count += std::max<int64_t>(given.shared_B[b] - given.shared_B[b - 1], 0);
  }
  return count;
}

}  // namespace

template <class Token>
TreeLayout lay_out_tree(const TreeInput<Token>& given) {
  check_sizes(given);
  for (size_t b = 0; b < given.ids_B.size(); ++b) {
    check_trajectory(given, b);
    check_shared(given, b);
  }
  TreeLayout layout;
  layout.most_predictions = count_predictions(given);
  layout.cu_seqlens_q_S1 = segment_bounds(given, layout.leaf_B);
  const auto& bounds = layout.cu_seqlens_q_S1;
  for (int32_t& leaf : layout.leaf_B) {
    leaf = static_cast<int32_t>(std::ranges::upper_bound(bounds, leaf) - bounds.begin() - 1);
  }
  int64_t paths = 0;
  layout.cu_seqlens_k_S1.push_back(0);
  for_each_segment(given, bounds, [&](const Path&, int64_t depth, size_t segment) {
    paths += depth;
    require(paths <= kMost, "segment ", segment, " brings the paths to ", paths, " entries, more than int32 can count");
    layout.cu_seqlens_k_S1.push_back(static_cast<int32_t>(paths));
    layout.longest_segment = std::max<int64_t>(layout.longest_segment, bounds[segment + 1] - bounds[segment]);
    layout.longest_path = std::max(layout.longest_path, depth);
  });
  return layout;
}

template <class Token>
int64_t fill_tree(const TreeInput<Token>& given, const TreeLayout& layout, const TreeBuffers& out) {
  int64_t* to = out.kv_index_K.data();
  for_each_segment(given, layout.cu_seqlens_q_S1, [&](const Path& path, int64_t depth, size_t) {
    path.each_run(depth, [&](int64_t from, int64_t stop, int64_t at) {
      std::iota(to, to + stop - from, at);
      to += stop - from;
    });
  });
  Predictions<Token> predictions(given, out, given.merge ? reused_tokens(given) : 0);
  Path path;
  int64_t start = 0;
  for (size_t b = 0; b < given.ids_B.size(); ++b) {
    path.fork(given.shared_B[b], start);
    fill_trajectory(given, b, start, path, out, predictions);
    start += given.sequences.rows_N[given.ids_B[b]] - given.shared_B[b];
  }
  return predictions.finish();
}

template TreeLayout lay_out_tree(const TreeInput<int32_t>&);
template TreeLayout lay_out_tree(const TreeInput<int64_t>&);
template int64_t fill_tree(const TreeInput<int32_t>&, const TreeLayout&, const TreeBuffers&);
template int64_t fill_tree(const TreeInput<int64_t>&, const TreeLayout&, const TreeBuffers&);

}  // namespace mgrpo
