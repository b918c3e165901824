// Tests prefix trees without Python: an example worked by hand, and random forests of which every token is read back.
#include "tree.hpp"

#include <algorithm>
#include <random>
#include <stdexcept>
#include <string>

#include "test.hpp"
#include "threads.hpp"
#include "tree_fill.hpp"

namespace {

using namespace mgrpo;

struct Forest {
  std::vector<int32_t> tokens_T;
  std::vector<int64_t> offsets_N1{0}, rows_N;

  void add(const std::vector<int32_t>& tokens) {
    tokens_T.insert(tokens_T.end(), tokens.begin(), tokens.end());
    offsets_N1.push_back(static_cast<int64_t>(tokens_T.size()));
    rows_N.push_back(static_cast<int64_t>(tokens.size()));
  }

  Sequences<int32_t> sequences() const { return {tokens_T, offsets_N1, rows_N}; }
};

struct Filled {
  TreeLayout layout;
  std::vector<int64_t> input_ids, positions, kv_index, token_index, targets, segment_id;
  std::vector<float> weights, advantages;
};

Filled filled(const TreeInput<int32_t>& given) {
  Filled f{lay_out_tree(given), {}, {}, {}, {}, {}, {}, {}, {}};
  f.input_ids.resize(f.layout.tokens());
  f.positions.resize(f.layout.tokens());
  f.kv_index.resize(f.layout.paths());
  for (auto* column : {&f.token_index, &f.targets, &f.segment_id}) column->resize(f.layout.most_predictions);
  for (auto* column : {&f.weights, &f.advantages}) column->resize(f.layout.most_predictions);
  const int64_t rows = fill_tree(
      given, f.layout,
      {f.input_ids, f.positions, f.kv_index, f.token_index, f.targets, f.segment_id, f.weights, f.advantages, {}});
  for (auto* column : {&f.token_index, &f.targets, &f.segment_id}) column->resize(rows);
  for (auto* column : {&f.weights, &f.advantages}) column->resize(rows);
  return f;
}

template <class Call>
std::string refusal(Call call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

/// a b c, a b d e (twice) and a b: two tokens, then a fork.
void a_worked_example() {
  Forest forest;
  for (const auto& tokens : {std::vector{1, 2, 3}, {1, 2, 4, 5}, {1, 2, 4, 5}, {1, 2}}) forest.add(tokens);
  const auto plan = plan_tree(forest.sequences(), 5, {});
  CHECK((plan.offsets_M1 == std::vector<int64_t>{0, 4}));
  CHECK((plan.ids_N == std::vector<int64_t>{3, 0, 1, 2}));
  CHECK((plan.shared_N == std::vector<int64_t>{0, 2, 2, 4}));

  const std::vector<uint8_t> sampled_T(forest.tokens_T.size(), 1);
  const std::vector<double> advantages_N{1, 3, 5, -1}, weights_N{1, 1, 3, 1};
  const auto f = filled({forest.sequences(), sampled_T, advantages_N, weights_N, plan.ids_N, plan.shared_N, {}, true});
  CHECK((f.input_ids == std::vector<int64_t>{1, 2, 3, 4, 5}));
  CHECK((f.positions == std::vector<int64_t>{0, 1, 2, 2, 3}));
  CHECK((f.layout.cu_seqlens_q_S1 == std::vector<int32_t>{0, 2, 3, 5}));
  CHECK((f.layout.cu_seqlens_k_S1 == std::vector<int32_t>{0, 2, 5, 9}));
  CHECK((f.kv_index == std::vector<int64_t>{0, 1, 0, 1, 2, 0, 1, 3, 4}));
  CHECK((f.layout.leaf_B == std::vector<int32_t>{0, 1, 2, 2}));
  // a -> b has one row for A- and one for A+; b -> c and b -> d come from one token; d -> e occurs twice.
  CHECK((f.token_index == std::vector<int64_t>{0, 0, 1, 1, 3}));
  CHECK((f.targets == std::vector<int64_t>{2, 2, 3, 4, 5}));
  CHECK((f.weights == std::vector<float>{1, 5, 1, 4, 4}));
  CHECK((f.advantages == std::vector<float>{-1, 3.8F, 1, 4.5F, 4.5F}));
}

Forest random_forest(std::mt19937& random) {
  const auto below = [&](uint32_t bound) { return random() % bound; };
  std::vector<std::vector<int32_t>> made;
  Forest forest;
  for (uint32_t n = below(40); n > 0; --n) {
    std::vector<int32_t> tokens;
    if (!made.empty() && below(3)) {
      tokens = made[below(static_cast<uint32_t>(made.size()))];
      tokens.resize(below(static_cast<uint32_t>(tokens.size()) + 1));
    }
    for (uint32_t more = below(150) + tokens.empty(); more > 0; --more) tokens.push_back(static_cast<int>(below(3)));
    made.push_back(tokens);
    forest.add(tokens);
  }
  return forest;
}

void check_bin(const Forest& forest, std::span<const int64_t> ids_B, std::span<const int64_t> shared_B, int64_t cap) {
  const std::vector<uint8_t> sampled_T(forest.tokens_T.size(), 1);
  const std::vector<double> ones_N(forest.rows_N.size(), 1.0);
  const auto f = filled({forest.sequences(), sampled_T, ones_N, ones_N, ids_B, shared_B, {}, true});
  CHECK(f.layout.tokens() >= 1 && f.layout.tokens() <= cap);
  for (size_t b = 0; b < ids_B.size(); ++b) {
    const int32_t leaf = f.layout.leaf_B[b], start = f.layout.cu_seqlens_k_S1[leaf];
    CHECK(f.layout.cu_seqlens_k_S1[leaf + 1] - start == forest.rows_N[ids_B[b]]);
    for (int64_t i = 0; i < forest.rows_N[ids_B[b]]; ++i) {
      const int64_t at = f.kv_index[start + i];
      CHECK(f.input_ids[at] == forest.sequences()[ids_B[b]][i] && f.positions[at] == i);
    }
  }
}

void every_trajectory_is_read_back() {
  std::mt19937 random(0);
  for (int round = 0; round < 300; ++round) {
    const Forest forest = random_forest(random);
    int64_t cap = 1 + random() % 200;
    for (const int64_t rows : forest.rows_N) cap = std::max(cap, rows);
    const auto plan = plan_tree(forest.sequences(), cap, {});
    CHECK(plan.ids_N.size() == forest.rows_N.size());
    for (size_t m = 0; m + 1 < plan.offsets_M1.size(); ++m) {
      const size_t start = plan.offsets_M1[m], count = plan.offsets_M1[m + 1] - start;
      check_bin(forest, std::span(plan.ids_N).subspan(start, count), std::span(plan.shared_N).subspan(start, count),
                cap);
    }
  }
}

/// Checks that micro-batches can be laid out and filled in parallel: they share nothing that they write.
void several_threads_fill_alike() {
  std::mt19937 random(1);
  Forest forest;
  while (forest.rows_N.size() < 30) forest = random_forest(random);
  const std::vector<uint8_t> sampled_T(forest.tokens_T.size(), 1);
  const std::vector<double> ones_N(forest.rows_N.size(), 1.0);
  const auto plan = plan_tree(forest.sequences(), *std::ranges::max_element(forest.rows_N), {});
  const std::span ids_N(plan.ids_N), shared_N(plan.shared_N);
  std::vector<Filled> alone(plan.offsets_M1.size() - 1), together(alone.size());
  const auto fill_bin = [&](std::vector<Filled>& to, int64_t m) {
    const size_t start = plan.offsets_M1[m], count = plan.offsets_M1[m + 1] - start;
    to[m] = filled({forest.sequences(),
                    sampled_T,
                    ones_N,
                    ones_N,
                    ids_N.subspan(start, count),
                    shared_N.subspan(start, count),
                    {},
                    true});
  };
  const auto bins = static_cast<int64_t>(alone.size());
  parallel_for(bins, 1, [&](int64_t m) { fill_bin(alone, m); });
  parallel_for(bins, 4, [&](int64_t m) { fill_bin(together, m); });
  CHECK(bins > 3);
  for (size_t m = 0; m < alone.size(); ++m) {
    CHECK(together[m].input_ids == alone[m].input_ids && together[m].kv_index == alone[m].kv_index);
    CHECK(together[m].token_index == alone[m].token_index && together[m].weights == alone[m].weights);
  }
}

/// Counts the rows of trajectories of the same tokens, whose tokens have as many log-probs as there are `values`.
void a_row_for_each_log_prob(size_t values) {
  constexpr size_t kTrajectories = 500, kTokens = 9;
  Forest forest;
  std::vector<float> logprobs_T;
  std::vector<int64_t> ids_B, shared_B;
  for (size_t b = 0; b < kTrajectories; ++b) {
    forest.add({1, 2, 3, 4, 5, 6, 7, 8, 9});
    logprobs_T.insert(logprobs_T.end(), kTokens, static_cast<float>(b % values));
    ids_B.push_back(static_cast<int64_t>(b));
    shared_B.push_back(b == 0 ? 0 : kTokens);
  }
  const std::vector<uint8_t> sampled_T(forest.tokens_T.size(), 1);
  const std::vector<double> ones_N(kTrajectories, 1.0);
  const TreeInput<int32_t> given{forest.sequences(), sampled_T,    ones_N,        ones_N, ids_B,
                                 shared_B,           {logprobs_T}, /*merge=*/true};
  const TreeLayout layout = lay_out_tree(given);
  const size_t most = layout.most_predictions;
  std::vector<int64_t> tokens(layout.tokens()), positions(tokens), paths(layout.paths()), index(most), targets(most),
      segments(most);
  std::vector<float> weights(most), advantages(most), logprobs(most);
  const int64_t rows =
      fill_tree(given, layout, {tokens, positions, paths, index, targets, segments, weights, advantages, {logprobs}});
  CHECK(rows == static_cast<int64_t>(values * (kTokens - 1)));
  for (int64_t m = 0; m < rows; ++m) {
    CHECK(weights[m] == kTrajectories / values && logprobs[m] == static_cast<float>(segments[m]));
  }
}

void mistakes_are_named() {
  Forest forest;
  forest.add({1, 2, 3});
  CHECK(refusal([&] { plan_tree(forest.sequences(), 2, {}); }) == "rows[0] is 3, more than cap 2");
  forest.offsets_N1[1] = -1;
  CHECK(refusal([&] { plan_tree(forest.sequences(), 9, {}); }) == "offsets[1] is -1, below offsets[0] = 0");
}

}  // namespace

int main() {
  a_worked_example();
  every_trajectory_is_read_back();
  several_threads_fill_alike();
  for (const size_t values : {1, 10, 500}) a_row_for_each_log_prob(values);
  mistakes_are_named();
  return mgrpo::test::result();
}
