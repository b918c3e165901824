// Tests the fill without Python, against a loop over rows: every type of id, columns in one buffer or many, rows in
// many pieces, any number of threads. Every buffer has its exact size, so that the sanitizers detect an access beyond
// it.
#include "fill.hpp"

#include <iterator>

#include "test.hpp"
#include "threads.hpp"

using namespace mgrpo;
using test::refuses;

namespace {

using Numbers = std::vector<int64_t>;
constexpr const char* kLogprobs = "old_logprobs";

/// Trajectories and the micro-batches to make of them. Weights are multiples of a quarter, so that their sums are
/// exact.
template <class Token>
struct Case {
  Numbers offsets_N1{0}, rows_N, bins_M1, ids_B;
  std::vector<double> advantages_N, weights_N;
  std::vector<Token> tokens_T;
  std::vector<uint8_t> sampled_T;
  std::vector<float> logprobs_T;

  void add(int64_t length, int64_t rows) {
    const uint64_t seed = rows_N.size();
    const auto tokens = test::numbers(seed, length, 0, 150'000), flags = test::numbers(seed + 1, length, 0, 2);
    std::copy(tokens.begin(), tokens.end(), std::back_inserter(tokens_T));
    std::copy(flags.begin(), flags.end(), std::back_inserter(sampled_T));
    std::copy(tokens.rbegin(), tokens.rend(), std::back_inserter(logprobs_T));
    advantages_N.push_back(static_cast<double>(seed % 3) - 1.0);
    weights_N.push_back(static_cast<double>(seed % 4) / 4);
    offsets_N1.push_back(static_cast<int64_t>(tokens_T.size()));
    rows_N.push_back(rows);
  }

  Bins bins() const { return {bins_M1, ids_B}; }

  Trajectories<Token> flat() const {
    return {.tokens = {"tokens", tokens_T, {}, true},
            .offsets_N1 = offsets_N1,
            .sampled = {"sampled", sampled_T, {}, true},
            .rows_N = rows_N,
            .advantages_N = advantages_N,
            .weights_N = weights_N,
            .logprobs = {{kLogprobs, logprobs_T, {}, true}}};
  }
};

/// A column with one buffer per trajectory.
template <class T>
struct Each {
  std::vector<std::vector<T>> each_N;

  Each(const std::vector<T>& flat_T, const Numbers& offsets_N1) {
    for (size_t n = 0; n + 1 < offsets_N1.size(); ++n) {
      each_N.emplace_back(flat_T.begin() + offsets_N1[n], flat_T.begin() + offsets_N1[n + 1]);
    }
  }
  Column<T> column(const char* name) const { return {name, {}, {each_N.begin(), each_N.end()}, false}; }
};

template <class Id>
struct Filled {
  std::vector<Id> input_ids, positions, targets;
  std::vector<uint8_t> action_mask;
  std::vector<float> weights, advantages, logprobs;
  std::vector<int32_t> segment_ids, cu_seqlens;
  Numbers live_rows, counts_M;  // counts_M: rows, live rows, longest sequence and actions of each micro-batch
  std::vector<double> weight_sums_M;

  bool operator==(const Filled&) const = default;
};

template <class Id, class Token>
Filled<Id> filled(const Trajectories<Token>& given, const Bins& bins, Live live, int64_t threads) {
  const auto layout = measure(given, bins, live, threads);
  const size_t rows = layout.rows();
  Filled<Id> f;
  for (auto* column : {&f.input_ids, &f.positions, &f.targets}) column->resize(rows, Id{-1});
  for (auto* column : {&f.weights, &f.advantages, &f.logprobs}) column->resize(rows, -1.0F);
  f.action_mask.resize(rows, 9);
  f.segment_ids.resize(rows, -1);
  f.cu_seqlens.resize(bins.ids_B.size() + layout.bins_M.size(), -1);
  f.live_rows.resize(layout.lives, -1);
  const Batch<Id> batch{
      f.input_ids.data(), f.positions.data(),  f.targets.data(),     reinterpret_cast<bool*>(f.action_mask.data()),
      f.weights.data(),   f.advantages.data(), f.segment_ids.data(), f.cu_seqlens.data(),
      f.live_rows.data(), {f.logprobs.data()}};
  fill(given, bins, live, layout, batch, threads);
  for (const auto& bin : layout.bins_M) {
    f.counts_M.insert(f.counts_M.end(), {bin.rows, bin.lives, bin.longest, bin.actions});
    f.weight_sums_M.push_back(bin.weight_sum);
  }
  return f;
}

/// Adds one row. `place`: the sequence's index in its micro-batch.
template <class Id, class Token>
void add_row(Filled<Id>& f, const Case<Token>& c, int64_t id, int64_t i, int64_t place) {
  const int64_t next = c.offsets_N1[id] + i + 1;
  const bool action = c.sampled_T[next] != 0;
  f.input_ids.push_back(static_cast<Id>(c.tokens_T[next - 1]));
  f.targets.push_back(static_cast<Id>(c.tokens_T[next]));
  f.positions.push_back(static_cast<Id>(i));
  f.action_mask.push_back(action);
  f.weights.push_back(action ? static_cast<float>(c.weights_N[id]) : 0.0F);
  f.logprobs.push_back(action ? c.logprobs_T[next] : 0.0F);
  f.advantages.push_back(static_cast<float>(c.advantages_N[id]));
  f.segment_ids.push_back(static_cast<int32_t>(place));
}

template <class Id, class Token>
Filled<Id> expected(const Case<Token>& c, Live live) {
  Filled<Id> f;
  for (size_t m = 0; m + 1 < c.bins_M1.size(); ++m) {
    const int64_t first = static_cast<int64_t>(f.weights.size()), lives = static_cast<int64_t>(f.live_rows.size());
    int64_t longest = 0, actions = 0;
    double weight_sum = 0.0;
    f.cu_seqlens.push_back(0);
    for (int64_t b = c.bins_M1[m]; b < c.bins_M1[m + 1]; ++b) {
      const int64_t id = c.ids_B[b], rows = c.rows_N[id];
      longest = std::max(longest, rows);
      for (int64_t i = 0; i < rows; ++i) {
        add_row(f, c, id, i, b - c.bins_M1[m]);
        actions += f.action_mask.back();
        weight_sum += f.weights.back();
        const bool counts = f.weights.back() != 0.0F && (live == Live::weight || f.advantages.back() != 0.0F);
        if (counts && live != Live::none) f.live_rows.push_back(static_cast<int64_t>(f.weights.size()) - 1 - first);
      }
      f.cu_seqlens.push_back(static_cast<int32_t>(static_cast<int64_t>(f.weights.size()) - first));
    }
    const auto size = [](const auto& column) { return static_cast<int64_t>(column.size()); };
    f.counts_M.insert(f.counts_M.end(), {size(f.weights) - first, size(f.live_rows) - lives, longest, actions});
    f.weight_sums_M.push_back(weight_sum);
  }
  return f;
}

template <class Id, class Token>
void check_case(const Case<Token>& c) {
  const Each tokens(c.tokens_T, c.offsets_N1);
  const Each sampled(c.sampled_T, c.offsets_N1);
  const Each logprobs(c.logprobs_T, c.offsets_N1);
  auto each = c.flat();
  each.tokens = tokens.column("tokens");
  each.sampled = sampled.column("sampled");
  each.logprobs = {logprobs.column(kLogprobs)};
  for (const Live live : {Live::none, Live::weight, Live::advantage}) {
    const auto truth = expected<Id>(c, live);
    for (const int64_t threads : {1, 7}) {
      CHECK(filled<Id>(c.flat(), c.bins(), live, threads) == truth);
      CHECK(filled<Id>(each, c.bins(), live, threads) == truth);
    }
  }
}

/// Makes trajectories of these lengths, some cut short, in three micro-batches of which one is empty.
template <class Token>
Case<Token> made_of(const Numbers& lengths) {
  Case<Token> c;
  for (const int64_t length : lengths)
    c.add(length, length - 1 - static_cast<int64_t>(c.rows_N.size()) % 2 * (length / 3));
  const auto count = static_cast<int64_t>(lengths.size());
  c.ids_B = test::numbers(9, lengths.size(), 0, std::max<int64_t>(count - 1, 0));
  c.bins_M1 = {0, count / 3, count / 3, count};
  return c;
}

void every_form_is_what_the_loop_gives() {
  for (const Numbers& lengths : {Numbers{}, Numbers{1}, Numbers{2, 1, 1, 3}, test::numbers(1, 300, 1, 900),
                                 Numbers{65'537, 131'074, 1}, test::numbers(2, 30'000, 1, 6)}) {
    check_case<int32_t>(made_of<int32_t>(lengths));
    check_case<int64_t>(made_of<int32_t>(lengths));
    check_case<int64_t>(made_of<int64_t>(lengths));
  }
}

void trainable_rows_end_at_the_last_sampled_token() {
  const Numbers offsets_N1{0, 0, 1, 4, 7};
  const std::vector<uint8_t> sampled_T{1, 1, 2, 0, 0, 0, 1};
  CHECK(trainable_rows(offsets_N1, {"sampled", sampled_T, {}, true}) == (Numbers{0, 0, 1, 2}));
  const Each each(sampled_T, offsets_N1);
  CHECK(trainable_rows(offsets_N1, each.column("sampled")) == (Numbers{0, 0, 1, 2}));
}

void a_loop_does_each_once() {
  for (const int64_t count : {0, 1, 2, 1000}) {
    for (const int64_t threads : {1, 2, 64}) {
      std::vector<int> done(count);
      parallel_for(count, threads, [&](int64_t i) { ++done[i]; });
      CHECK(done == std::vector<int>(count, 1));
    }
  }
}

void mistakes_are_refused() {
  const auto with = [](auto change) {
    auto c = made_of<int32_t>({3, 4, 5});
    change(c);
    return [=] { measure(c.flat(), c.bins(), Live::none, 1); };
  };
  using C = Case<int32_t>;
  CHECK(refuses(with([](C& c) { c.offsets_N1 = {}; }), "offsets is empty"));
  CHECK(refuses(with([](C& c) { c.offsets_N1[0] = 1; }), "offsets[0] is 1, expected 0"));
  CHECK(refuses(with([](C& c) { c.offsets_N1[2] = INT64_MIN; }), "offsets[2] is -9223372036854775808, below"));
  CHECK(
      refuses(with([](C& c) { c.offsets_N1[3] = INT64_MAX; }), "sampled has 12 entries, expected 9223372036854775807"));
  CHECK(refuses(with([](C& c) { c.tokens_T.pop_back(); }), "tokens has 11 entries, expected 12, where offsets ends"));
  CHECK(refuses(with([](C& c) { c.logprobs_T.clear(); }), "old_logprobs has 0 entries, expected 12"));
  CHECK(refuses(with([](C& c) { c.rows_N.push_back(1); }), "rows has 4 entries, expected one for each of the 3"));
  CHECK(refuses(with([](C& c) { c.bins_M1 = {}; }), "bins is empty"));
  CHECK(refuses(with([](C& c) { c.bins_M1.back() = INT64_MAX; }), "bins ends at 9223372036854775807, expected the 3"));
  CHECK(
      refuses(with([](C& c) { c.ids_B[0] = INT64_MAX; }), "ids[0] is 9223372036854775807, expected from 0 to below 3"));
  CHECK(refuses(with([](C& c) { c.rows_N = {3, 4, 5}; }), "expected from 0 to below the trajectory's"));
  CHECK(refuses(with([](C& c) { c.rows_N = {-1, -1, -1}; }), "is -1, expected from 0 to below"));
  CHECK(refuses(with([](C& c) { c.weights_N = {1e39, 1e39, 1e39}; }), "is 1e+39, expected a finite float32"));
}

}  // namespace

int main() {
  every_form_is_what_the_loop_gives();
  trainable_rows_end_at_the_last_sampled_token();
  a_loop_does_each_once();
  mistakes_are_refused();
  return test::result();
}
