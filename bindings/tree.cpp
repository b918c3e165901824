// The prefix trees of mgrpo._packing: tree_plan and tree_fill. As in packing.cpp they take and return numpy arrays, and
// release the GIL while the core works; an array is never copied or converted silently.
#include "tree.hpp"

#include <algorithm>
#include <utility>

#include "arena.hpp"
#include "arrays.hpp"
#include "parts.hpp"
#include "threads.hpp"
#include "tree_fill.hpp"

namespace mgrpo::bindings {
namespace {

/// Calls make(sequences) with the tokens in their own type, int32 or int64.
template <class Make>
auto with_tokens(const py::object& tokens, const py::object& offsets, const py::object& rows, Make make) {
  const auto offsets_N1 = integers("offsets", offsets), rows_N = integers("rows", rows);
  if (is_column<int32_t>(tokens)) {
    return make(Sequences<int32_t>{column<int32_t>("tokens", "int32", tokens), offsets_N1, rows_N});
  }
  return make(Sequences<int64_t>{column<int64_t>("tokens", "int32 or int64", tokens), offsets_N1, rows_N});
}

py::tuple tree_plan(const py::object& tokens, const py::object& offsets, const py::object& rows, const py::object& cap,
                    const py::object& groups) {
  const int64_t most = integer("cap", cap);
  const auto groups_N = groups.is_none() ? std::span<const int64_t>{} : integers("groups", groups);
  const auto made = with_tokens(tokens, offsets, rows, [&](const auto& sequences) {
    require(groups.is_none() || groups_N.size() == sequences.rows_N.size(), "groups has ", groups_N.size(),
            " entries, expected one for each of the ", sequences.rows_N.size(), " rows");
    const py::gil_scoped_release released;
    return plan_tree(sequences, most, groups_N);
  });
  return py::make_tuple(to_numpy(made.offsets_M1), to_numpy(made.ids_N), to_numpy(made.shared_N));
}

using Logprobs = std::vector<std::pair<const char*, std::span<const float>>>;

/// Returns the columns of log-probs that were given.
Logprobs logprob_columns(const py::object& old, const py::object& sampler, const py::object& ref, size_t tokens) {
  Logprobs columns;
  const std::pair<const char*, py::object> given[] = {
      {"old_logprobs", old}, {"sampler_logprobs", sampler}, {"ref_logprobs", ref}};
  for (const auto& [key, values] : given) {
    if (values.is_none()) continue;
    const auto values_T = column<float>(key, "float32", values);
    require(values_T.size() == tokens, key, " has ", values_T.size(), " entries, expected one for each of the ", tokens,
            " tokens");
    columns.emplace_back(key, values_T);
  }
  return columns;
}

/// Lays out one micro-batch's part of the slab.
struct TreeArrays {
  TreeBuffers filled;
  std::span<int32_t> cu_seqlens_q_S1, cu_seqlens_k_S1, leaf_B;
  std::span<int64_t> longest;
};

template <class T>
std::span<T> add(Columns& columns, size_t entries) {
  return {columns.add<T>(static_cast<int64_t>(entries)), entries};
}

TreeArrays add_arrays(Columns& columns, const TreeLayout& layout, size_t logprobs) {
  const size_t tokens = layout.tokens(), rows = layout.most_predictions;
  TreeArrays made{
      .filled = {.input_ids_P = add<int64_t>(columns, tokens),
                 .positions_P = add<int64_t>(columns, tokens),
                 .kv_index_K = add<int64_t>(columns, layout.paths()),
                 .token_index_M = add<int64_t>(columns, rows),
                 .targets_M = add<int64_t>(columns, rows),
                 .segment_id_M = add<int64_t>(columns, rows),
                 .weights_M = add<float>(columns, rows),
                 .advantages_M = add<float>(columns, rows),
                 .logprobs_M = {}},
      .cu_seqlens_q_S1 = add<int32_t>(columns, layout.cu_seqlens_q_S1.size()),
      .cu_seqlens_k_S1 = add<int32_t>(columns, layout.cu_seqlens_k_S1.size()),
      .leaf_B = add<int32_t>(columns, layout.leaf_B.size()),
      .longest = add<int64_t>(columns, 2),
  };
  for (size_t c = 0; c < logprobs; ++c) made.filled.logprobs_M.push_back(add<float>(columns, rows));
  return made;
}

/// Fills the buffers and returns the number of prediction rows; merging leaves fewer than there is room for.
template <class Token>
int64_t fill_arrays(const TreeInput<Token>& given, const TreeLayout& layout, const TreeArrays& to) {
  std::ranges::copy(layout.cu_seqlens_q_S1, to.cu_seqlens_q_S1.begin());
  std::ranges::copy(layout.cu_seqlens_k_S1, to.cu_seqlens_k_S1.begin());
  std::ranges::copy(layout.leaf_B, to.leaf_B.begin());
  to.longest[0] = layout.longest_segment;
  to.longest[1] = layout.longest_path;
  return fill_tree(given, layout, to.filled);
}

py::dict to_dict(const TreeArrays& made, int64_t rows, const Logprobs& logprobs, const py::capsule& slab) {
  py::dict filled;
  const auto put = [&](const char* key, auto column) {
    filled[key] = part(column.data(), 0, static_cast<int64_t>(column.size()), slab);
  };
  const auto put_rows = [&](const char* key, auto column_M) { put(key, column_M.first(rows)); };
  put("input_ids", made.filled.input_ids_P);
  put("positions", made.filled.positions_P);
  put("tree_kv_index", made.filled.kv_index_K);
  put("tree_cu_seqlens_q", made.cu_seqlens_q_S1);
  put("tree_cu_seqlens_k", made.cu_seqlens_k_S1);
  put("tree_max_seqlens", made.longest);
  put("leaf", made.leaf_B);
  put_rows("token_index", made.filled.token_index_M);
  put_rows("targets", made.filled.targets_M);
  put_rows("segment_id", made.filled.segment_id_M);
  put_rows("weights", made.filled.weights_M);
  put_rows("advantages", made.filled.advantages_M);
  for (size_t c = 0; c < logprobs.size(); ++c) put_rows(logprobs[c].first, made.filled.logprobs_M[c]);
  return filled;
}

template <class Token>
py::list fill_all(const std::vector<TreeInput<Token>>& bins_M, const Logprobs& logprobs, Arena& arena,
                  int64_t threads) {
  const auto count = static_cast<int64_t>(bins_M.size());
  std::vector<TreeLayout> layouts_M(count);
  {
    const py::gil_scoped_release released;
    parallel_for(count, threads, [&](int64_t m) { layouts_M[m] = lay_out_tree(bins_M[m]); });
  }
  Columns sizes(nullptr);
  for (const auto& layout : layouts_M) add_arrays(sizes, layout, logprobs.size());
  const auto slab = arena.take(sizes.used());
  Columns columns(slab->data());
  std::vector<TreeArrays> arrays_M;
  for (const auto& layout : layouts_M) arrays_M.push_back(add_arrays(columns, layout, logprobs.size()));
  std::vector<int64_t> rows_M(count);
  {
    const py::gil_scoped_release released;
    parallel_for(count, threads, [&](int64_t m) { rows_M[m] = fill_arrays(bins_M[m], layouts_M[m], arrays_M[m]); });
  }
  const auto kept = keep(slab);
  py::list filled;
  for (int64_t m = 0; m < count; ++m) filled.append(to_dict(arrays_M[m], rows_M[m], logprobs, kept));
  return filled;
}

/// Splits the trajectories of `all` into micro-batches.
template <class Token>
std::vector<TreeInput<Token>> cut(const TreeInput<Token>& all, std::span<const int64_t> bins_M1) {
  check_size("shared", all.shared_B.size(), all.ids_B.size(), "ids");
  check_bins(bins_M1, all.ids_B.size());
  std::vector<TreeInput<Token>> bins_M(bins_M1.size() - 1, all);
  for (size_t m = 0; m < bins_M.size(); ++m) {
    const auto of_bin = [&](auto column_B) { return column_B.subspan(bins_M1[m], bins_M1[m + 1] - bins_M1[m]); };
    bins_M[m].ids_B = of_bin(all.ids_B);
    bins_M[m].shared_B = of_bin(all.shared_B);
    bins_M[m].first = bins_M1[m];
  }
  return bins_M;
}

py::object tree_fill(const py::object& tokens, const py::object& offsets, const py::object& sampled,
                     const py::object& ids, const py::object& shared, const py::object& rows,
                     const py::object& advantages, const py::object& weights, const py::object& old_logprobs,
                     const py::object& sampler_logprobs, const py::object& ref_logprobs, bool merge,
                     const py::object& bins, const py::object& arena, const py::object& threads) {
  const auto sampled_T = flags("sampled", sampled);
  const auto advantages_N = floats("advantages", advantages), weights_N = floats("weights", weights);
  const auto ids_B = integers("ids", ids), shared_B = integers("shared", shared);
  const auto logprobs = logprob_columns(old_logprobs, sampler_logprobs, ref_logprobs, sampled_T.size());
  std::vector<std::span<const float>> logprobs_T;
  for (const auto& [_, values_T] : logprobs) logprobs_T.push_back(values_T);
  const int64_t all[] = {0, static_cast<int64_t>(ids_B.size())};
  const auto bins_M1 = bins.is_none() ? std::span<const int64_t>(all) : integers("bins", bins);
  Arena fresh;
  Arena& memory = arena_or(fresh, arena);
  const int64_t workers = threads_or_all(threads_of(threads));
  const py::list filled = with_tokens(tokens, offsets, rows, [&]<class Token>(const Sequences<Token>& sequences) {
    const TreeInput<Token> given{sequences, sampled_T, advantages_N, weights_N, ids_B, shared_B, logprobs_T, merge};
    return fill_all(cut(given, bins_M1), logprobs, memory, workers);
  });
  return bins.is_none() ? py::object(filled[0]) : py::object(filled);
}

constexpr const char* kTreePlan =
    R"(tree_plan(tokens_T, offsets_N1, rows_N, cap, groups_N=None) -> (offsets_M1, ids_N, shared_N), all int64

Put N trajectories into M micro-batches of at most `cap` distinct tokens, where each common prefix counts once.
Micro-batch m holds ids_N[offsets_M1[m]:offsets_M1[m + 1]] in depth-first order; each trajectory shares its first
shared_N tokens with the one before it, so that the micro-batch computes the sum of rows - shared tokens. A subtree that
fits no micro-batch is spread over several, with its prefix repeated; so is one that fills a gap, if that saves
micro-batches. Of several packings, which cut more and more subtrees, the one of the fewest micro-batches is taken, then
of the fewest tokens; but none that needs 1/16 more tokens than another, and never one of more micro-batches than
filling one after another in the given order makes. Identical trajectories stay together. This is a pure function of its
arguments.

tokens_T: int32 or int64. offsets_N1: int64 (N + 1,), rising from 0 to T. rows_N: int64 (N,), the leading tokens of each
trajectory that are computed, from 1 to its length. groups_N: int64 (N,), only trajectories of one group share; None:
all.
Raises ValueError for offsets that do not rise from 0 to T, sizes that differ, rows out of range or above cap, and a cap
below 1.)";

constexpr const char* kTreeFill =
    R"(tree_fill(tokens_T, offsets_N1, sampled_T, ids_B, shared_B, rows_N, advantages_N, weights_N, *, old_logprobs_T=None,
          sampler_logprobs_T=None, ref_logprobs_T=None, merge=True, bins_M1=None, arena=None, threads=0) -> dict

Return the flat buffers of one micro-batch of `tree_plan`: B trajectories, P tokens, S segments, M prediction rows. A
segment is a run of tokens that ends where trajectories part or end; it attends to the path from the root to its own
end.
With bins_M1 return a list of several: micro-batch m holds ids_B[bins_M1[m]:bins_M1[m + 1]], as from `tree_plan`.

tokens_T, offsets_N1, rows_N: as given to `tree_plan`. ids_B, shared_B, bins_M1: int64, its ids, shared and offsets, or
slices of them. sampled_T: bool or uint8. advantages_N, weights_N: float64 or float32, a trajectory's advantage and the
weight (>= 0) of each of its sampled tokens. *_logprobs_T: float32, entry t belongs to token t.
arena: an Arena whose memory is reused; None for fresh memory. threads: 0 for as many as the machine runs at once, each
on its own micro-batches; the result does not depend on it. No array may change during the call.

As in TRL 1.16's TreeRow: input_ids int64 (P,); positions int64 (P,), the depth; tree_kv_index int64, the packed
positions of all paths; tree_cu_seqlens_q, tree_cu_seqlens_k int32 (S + 1,), bounds of segments and paths;
tree_max_seqlens int64 (2,), the longest segment and path; token_index int64 (M,), the token whose hidden state
predicts; segment_id int64 (M,), the index in ids_B of the (first) trajectory of the row. Others: targets int64 (M,);
weights, advantages float32 (M,); if given, old_logprobs, sampler_logprobs, ref_logprobs float32 (M,); leaf int32 (B,),
the segment whose path is the whole trajectory. There is one prediction row for each sampled token after a computed one,
except those of weight 0, in the order of ids_B.
merge: rows of equal token, target, log-probs (to the bit) and advantage sign become one, with the weights summed and
the advantages averaged by weight. This is exact for ratios by token; leave it off if a trajectory's rows share their
ratio.
The arrays of a call share their memory.
Raises ValueError for sizes that differ, an id, offset, rows or shared out of range, shared tokens that differ, an
advantage or weight that is not finite, a negative weight, bins that do not rise from 0 to B, more of anything in one
micro-batch than int32 can count, or an option out of range.)";

}  // namespace

void bind_tree(py::module_& module) {
  module.def("tree_plan", tree_plan, py::arg("tokens_T"), py::arg("offsets_N1"), py::arg("rows_N"), py::arg("cap"),
             py::arg("groups_N") = py::none(), kTreePlan);
  module.def("tree_fill", tree_fill, py::arg("tokens_T"), py::arg("offsets_N1"), py::arg("sampled_T"), py::arg("ids_B"),
             py::arg("shared_B"), py::arg("rows_N"), py::arg("advantages_N"), py::arg("weights_N"), py::kw_only(),
             py::arg("old_logprobs_T") = py::none(), py::arg("sampler_logprobs_T") = py::none(),
             py::arg("ref_logprobs_T") = py::none(), py::arg("merge") = true, py::arg("bins_M1") = py::none(),
             py::arg("arena") = py::none(), py::arg("threads") = 0, kTreeFill);
}

}  // namespace mgrpo::bindings
