// The prefix trees of mgrpo._packing: tree_plan and tree_fill. As in packing.cpp, numpy in, numpy out; the GIL is
// released while the core works; an array is never copied or converted behind the caller's back.
#include "tree.hpp"

#include <utility>

#include "arrays.hpp"
#include "parts.hpp"
#include "tree_fill.hpp"

namespace mgrpo::bindings {
namespace {

/// Calls make(sequences) with the tokens as what they are, int32 or int64.
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

/// A fresh array of `size` entries in `into[key]`, to be written to.
template <class T>
std::span<T> fresh(py::dict& into, const char* key, int64_t size) {
  py::array_t<T> array(size);
  into[key] = array;
  return {array.mutable_data(), static_cast<size_t>(size)};
}

using Logprobs = std::vector<std::pair<const char*, std::span<const float>>>;

/// The columns of log-probs that were given.
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

TreeBuffers fresh_buffers(py::dict& into, const TreeLayout& layout, const Logprobs& logprobs) {
  const int64_t tokens = layout.tokens(), rows = layout.most_predictions;
  TreeBuffers buffers{fresh<int64_t>(into, "input_ids", tokens),
                      fresh<int64_t>(into, "positions", tokens),
                      fresh<int64_t>(into, "tree_kv_index", layout.paths()),
                      fresh<int64_t>(into, "token_index", rows),
                      fresh<int64_t>(into, "targets", rows),
                      fresh<int64_t>(into, "segment_id", rows),
                      fresh<float>(into, "weights", rows),
                      fresh<float>(into, "advantages", rows),
                      {}};
  for (const auto& [key, _] : logprobs) buffers.logprobs_M.push_back(fresh<float>(into, key, rows));
  return buffers;
}

/// Gives back what the prediction rows' arrays have beyond `rows`: merging leaves fewer than were counted.
void shorten(py::dict& filled, int64_t rows, const Logprobs& logprobs) {
  const auto cut = [&](const char* key) { filled[key].attr("resize")(rows, py::arg("refcheck") = false); };
  for (const char* key : {"token_index", "targets", "segment_id", "weights", "advantages"}) cut(key);
  for (const auto& [key, _] : logprobs) cut(key);
}

template <class Token>
py::dict fill_one(const TreeInput<Token>& given, const Logprobs& logprobs) {
  TreeLayout layout;
  {
    const py::gil_scoped_release released;
    layout = lay_out_tree(given);
  }
  py::dict filled;
  const auto buffers = fresh_buffers(filled, layout, logprobs);
  int64_t rows = 0;
  {
    const py::gil_scoped_release released;
    rows = fill_tree(given, layout, buffers);
  }
  if (rows != layout.most_predictions) shorten(filled, rows, logprobs);
  filled["tree_cu_seqlens_q"] = to_numpy(layout.cu_seqlens_q_S1);
  filled["tree_cu_seqlens_k"] = to_numpy(layout.cu_seqlens_k_S1);
  filled["tree_max_seqlens"] = to_numpy(std::vector<int64_t>{layout.longest_segment, layout.longest_path});
  filled["leaf"] = to_numpy(layout.leaf_B);
  return filled;
}

py::dict tree_fill(const py::object& tokens, const py::object& offsets, const py::object& sampled,
                   const py::object& ids, const py::object& shared, const py::object& rows,
                   const py::object& advantages, const py::object& weights, const py::object& old_logprobs,
                   const py::object& sampler_logprobs, const py::object& ref_logprobs, bool merge) {
  const auto sampled_T = flags("sampled", sampled);
  const auto advantages_N = floats("advantages", advantages), weights_N = floats("weights", weights);
  const auto ids_B = integers("ids", ids), shared_B = integers("shared", shared);
  const auto logprobs = logprob_columns(old_logprobs, sampler_logprobs, ref_logprobs, sampled_T.size());
  std::vector<std::span<const float>> logprobs_T;
  for (const auto& [_, values_T] : logprobs) logprobs_T.push_back(values_T);
  return with_tokens(tokens, offsets, rows, [&]<class Token>(const Sequences<Token>& sequences) {
    return fill_one<Token>({sequences, sampled_T, advantages_N, weights_N, ids_B, shared_B, logprobs_T, merge},
                           logprobs);
  });
}

constexpr const char* kTreePlan =
    R"(tree_plan(tokens_T, offsets_N1, rows_N, cap, groups_N=None) -> (offsets_M1, ids_N, shared_N), all int64

Puts N trajectories into M micro-batches of at most `cap` distinct tokens, each common prefix counted once: micro-batch m
holds ids_N[offsets_M1[m]:offsets_M1[m + 1]], depth-first, and of each trajectory the first shared_N tokens are those of
the one before it, so that it computes the sum of rows - shared tokens. A subtree that fits no micro-batch is spread over
several, its prefix repeated; so is one that fills a gap, where that saves micro-batches. Identical trajectories stay
together. A pure function of its arguments.

tokens_T: int32 or int64. offsets_N1: int64 (N + 1,), rising from 0 to T. rows_N: int64 (N,), the leading tokens of each
trajectory that are computed, from 1 to its length. groups_N: int64 (N,), only trajectories of one group share; None: all.
ValueError: offsets that do not rise from 0 to T, sizes that differ, rows out of range or above cap, a cap below 1.)";

constexpr const char* kTreeFill =
    R"(tree_fill(tokens_T, offsets_N1, sampled_T, ids_B, shared_B, rows_N, advantages_N, weights_N, *, old_logprobs_T=None,
          sampler_logprobs_T=None, ref_logprobs_T=None, merge=True) -> dict

The flat buffers of one micro-batch of `tree_plan`: B trajectories, P tokens, S segments, M prediction rows. A segment is
a run of tokens that ends where trajectories part or end; it attends to the path from the root to its own end.

tokens_T, offsets_N1, rows_N: as given to `tree_plan`. ids_B, shared_B: int64, its slices of ids and shared. sampled_T:
bool or uint8. advantages_N, weights_N: float64 or float32, a trajectory's advantage and the weight (>= 0) of each of
its sampled tokens. *_logprobs_T: float32, entry t is that of token t.

As TRL 1.16's TreeRow: input_ids int64 (P,); positions int64 (P,), the depth; tree_kv_index int64, the packed positions
of all paths; tree_cu_seqlens_q, tree_cu_seqlens_k int32 (S + 1,), bounds of segments and paths; tree_max_seqlens int64
(2,), the longest segment and path; token_index int64 (M,), the token whose hidden state predicts; segment_id int64 (M,),
the place in ids_B of the (first) trajectory that asks for it. Otherwise: targets int64 (M,); weights, advantages float32
(M,); old_logprobs, sampler_logprobs, ref_logprobs float32 (M,) as far as given; leaf int32 (B,), the segment whose path
is the whole trajectory. There is a prediction row for each sampled token after a computed one, weight 0 left out, in
the order of ids_B.
merge: rows of equal token, target, log-probs (to the bit) and advantage sign become one, weights summed and advantages
averaged by weight. Exact for ratios by token; leave it off for ratios that a trajectory's rows share.
ValueError: sizes that differ, an id, offset, rows or shared out of range, shared tokens that differ, an advantage or
weight not finite or a weight negative, more of anything than int32 counts.)";

}  // namespace

void bind_tree(py::module_& module) {
  module.def("tree_plan", tree_plan, py::arg("tokens_T"), py::arg("offsets_N1"), py::arg("rows_N"), py::arg("cap"),
             py::arg("groups_N") = py::none(), kTreePlan);
  module.def("tree_fill", tree_fill, py::arg("tokens_T"), py::arg("offsets_N1"), py::arg("sampled_T"), py::arg("ids_B"),
             py::arg("shared_B"), py::arg("rows_N"), py::arg("advantages_N"), py::arg("weights_N"), py::kw_only(),
             py::arg("old_logprobs_T") = py::none(), py::arg("sampler_logprobs_T") = py::none(),
             py::arg("ref_logprobs_T") = py::none(), py::arg("merge") = true, kTreeFill);
}

}  // namespace mgrpo::bindings
