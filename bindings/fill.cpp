// Binds trainable_rows and fill.
#include "fill.hpp"

#include <ostream>
#include <utility>

#include "arena.hpp"
#include "arrays.hpp"
#include "parts.hpp"

namespace mgrpo::bindings {
namespace {

/// Names one array of a list in a message.
struct Entry {
  const char* list;
  size_t index;

  friend std::ostream& operator<<(std::ostream& out, const Entry& entry) {
    return out << entry.list << '[' << entry.index << ']';
  }
};

/// Turns a list into a tuple, which keeps its arrays alive even if the list changes while the GIL is released.
py::object held(const py::object& given) { return py::isinstance<py::list>(given) ? py::tuple(given) : given; }

/// Returns the tuple's own items: a subclass may iterate over something else, which nothing keeps alive.
py::tuple items(const py::object& given) { return py::reinterpret_borrow<py::tuple>(given); }

/// `read` returns the checked view of one array, given its name.
template <class T, class Read>
Column<T> ragged(const char* name, const py::object& given, const Read& read) {
  Column<T> column{name, {}, {}, true};
  if (!py::isinstance<py::tuple>(given)) {
    column.flat_T = read(name, given);
    return column;
  }
  column.is_flat = false;
  for (const auto each : items(given)) column.each_N.push_back(read(Entry{name, column.each_N.size()}, each));
  return column;
}

template <class T>
Column<T> ragged(const char* name, const char* expected, const py::object& given) {
  return ragged<T>(name, given, [&](auto at, py::handle each) { return column<T>(at, expected, each); });
}

Column<uint8_t> ragged_flags(const char* name, const py::object& given) {
  return ragged<uint8_t>(name, given, [](auto at, py::handle each) { return flags(at, each); });
}

py::array_t<int64_t> trainable_rows(const py::object& offsets, const py::object& sampled) {
  const auto offsets_N1 = integers("offsets", offsets);
  const auto kept = held(sampled);
  const auto sampled_T = ragged_flags("sampled", kept);
  std::vector<int64_t> rows_N;
  {
    const py::gil_scoped_release released;
    rows_N = mgrpo::trainable_rows(offsets_N1, sampled_T);
  }
  return to_numpy(rows_N);
}

struct Options {
  Live live;
  int64_t threads;
  Arena& arena;
};

Live live_of(py::handle given) {
  if (given.is_none()) return Live::none;
  const bool is_text = py::isinstance<py::str>(given);  // other objects may define their own comparison
  if (is_text && given.equal(py::str("weight"))) return Live::weight;
  require(is_text && given.equal(py::str("advantage")), "live must be 'weight', 'advantage' or None, got ",
          std::string(py::repr(given)));
  return Live::advantage;
}

template <class Id>
Batch<Id> add_batch(Columns& columns, const Layout& layout, size_t logprobs) {
  const int64_t rows = layout.rows(), sequences = static_cast<int64_t>(layout.rows_B1.size()) - 1;
  Batch<Id> batch{
      .input_ids_P = columns.add<Id>(rows),
      .positions_P = columns.add<Id>(rows),
      .targets_P = columns.add<Id>(rows),
      .action_mask_P = columns.add<bool>(rows),
      .weights_P = columns.add<float>(rows),
      .advantages_P = columns.add<float>(rows),
      .segment_ids_P = columns.add<int32_t>(rows),
      .cu_seqlens = columns.add<int32_t>(sequences + static_cast<int64_t>(layout.bins_M.size())),
      .live_rows = columns.add<int64_t>(layout.lives),
      .logprobs_P = {},
  };
  for (size_t c = 0; c < logprobs; ++c) batch.logprobs_P.push_back(columns.add<float>(rows));
  return batch;
}

template <class Token, class Id>
py::dict to_dict(const Trajectories<Token>& given, const Bins& bins, Live live, const Layout& layout, size_t m,
                 const Batch<Id>& batch, const py::capsule& slab) {
  const MicroBatch& bin = layout.bins_M[m];
  const auto rows = [&](auto* column) { return part(column, bin.row, bin.rows, slab); };
  const int64_t begin = bins.bins_M1[m], sequences = bins.bins_M1[m + 1] - begin;
  py::dict made;
  made["input_ids"] = rows(batch.input_ids_P);
  made["positions"] = rows(batch.positions_P);
  made["targets"] = rows(batch.targets_P);
  made["action_mask"] = rows(batch.action_mask_P);
  made["weights"] = rows(batch.weights_P);
  made["advantages"] = rows(batch.advantages_P);
  made["segment_ids"] = rows(batch.segment_ids_P);
  for (size_t c = 0; c < given.logprobs.size(); ++c) made[given.logprobs[c].name] = rows(batch.logprobs_P[c]);
  made["cu_seqlens"] = part(batch.cu_seqlens, begin + static_cast<int64_t>(m), sequences + 1, slab);
  if (live != Live::none) made["live_rows"] = part(batch.live_rows, bin.live, bin.lives, slab);
  made["max_seqlen"] = bin.longest;
  made["sequences"] = sequences;
  made["actions"] = bin.actions;
  made["weight_sum"] = bin.weight_sum;
  return made;
}

template <class Id, class Token>
py::list fill_all(const Trajectories<Token>& given, const Bins& bins, const Options& options) {
  Layout layout;
  {
    const py::gil_scoped_release released;
    layout = measure(given, bins, options.live, options.threads);
  }
  Columns sizes(nullptr);
  add_batch<Id>(sizes, layout, given.logprobs.size());
  const auto slab = options.arena.take(sizes.used());
  Columns columns(slab->data());
  const auto batch = add_batch<Id>(columns, layout, given.logprobs.size());
  {
    const py::gil_scoped_release released;
    mgrpo::fill(given, bins, options.live, layout, batch, options.threads);
  }
  const auto kept = keep(slab);
  py::list filled;
  for (size_t m = 0; m < layout.bins_M.size(); ++m) {
    filled.append(to_dict(given, bins, options.live, layout, m, batch, kept));
  }
  return filled;
}

/// Holds the columns, and keeps them alive while the core reads them.
struct Given {
  py::object tokens, offsets, sampled, rows;
  std::vector<double> advantages_N, weights_N;
  std::vector<std::pair<const char*, py::object>>
      logprobs;  // by the name under which they are returned; None if not given

  template <class Token>
  Trajectories<Token> trajectories(const char* token) const {
    Trajectories<Token> made{ragged<Token>("tokens", token, tokens),
                             integers("offsets", offsets),
                             ragged_flags("sampled", sampled),
                             integers("rows", rows),
                             advantages_N,
                             weights_N,
                             {}};
    for (const auto& [name, values] : logprobs) {
      if (!values.is_none()) made.logprobs.push_back(ragged<float>(name, "float32", values));
    }
    return made;
  }
};

/// Returns whether the tokens, or the first of several arrays, are int32. Without any array either would do.
bool holds_int32(const py::object& tokens) {
  if (!py::isinstance<py::tuple>(tokens)) return is_column<int32_t>(tokens);
  return items(tokens).empty() || is_column<int32_t>(items(tokens)[0]);
}

py::list fill_given(const Given& given, const Bins& bins, const Options& options, bool narrow) {
  if (holds_int32(given.tokens)) {
    const auto trajectories = given.trajectories<int32_t>("int32, as the first is");
    return narrow ? fill_all<int32_t>(trajectories, bins, options) : fill_all<int64_t>(trajectories, bins, options);
  }
  const auto trajectories = given.trajectories<int64_t>("int32 or int64, all alike");
  require(!narrow, "narrow needs tokens of int32, got int64");
  return fill_all<int64_t>(trajectories, bins, options);
}

py::object fill(const py::object& tokens, const py::object& offsets, const py::object& sampled, const py::object& ids,
                const py::object& rows, const py::object& advantages, const py::object& weights, const py::object& old,
                const py::object& sampler, const py::object& ref, const py::object& bins, const py::object& live,
                bool narrow, const py::object& arena, const py::object& threads) {
  const Given given{
      held(tokens),
      offsets,
      held(sampled),
      rows,
      floats("advantages", advantages),
      floats("weights", weights),
      {{"old_logprobs", held(old)}, {"sampler_logprobs", held(sampler)}, {"ref_logprobs", held(ref)}},
  };
  const auto ids_B = integers("ids", ids);
  const int64_t all[] = {0, static_cast<int64_t>(ids_B.size())};
  const Bins chosen{bins.is_none() ? std::span<const int64_t>(all) : integers("bins", bins), ids_B};
  Arena fresh;
  const Options options{live_of(live), threads_of(threads), arena_or(fresh, arena)};
  const py::list filled = fill_given(given, chosen, options, narrow);
  return bins.is_none() ? py::object(filled[0]) : py::object(filled);
}

constexpr const char* kTrainableRows =
    R"(trainable_rows(offsets_N1, sampled_T) -> int64 (N,)

Return the index of each trajectory's last sampled token, 0 if there is none or only token 0. This is the number of rows
that can add to a loss over sampled tokens, since row i predicts token i + 1 and the model is causal.

offsets_N1: int64 (N + 1,), rising from 0 to T. sampled_T: bool or uint8, true where the agent chose the token: (T,), or
a list of N arrays.
Raises ValueError for offsets that do not rise from 0 to T, and for sizes that differ.)";

constexpr const char* kFill =
    R"(fill(tokens_T, offsets_N1, sampled_T, ids_B, rows_N, advantages_N, weights_N, *, old_logprobs_T=None,
     sampler_logprobs_T=None, ref_logprobs_T=None, bins_M1=None, live=None, narrow=False, arena=None, threads=0) -> dict

Return the flat buffers of one micro-batch of P rows: the first rows_N[id] tokens of each trajectory of ids_B, in that
order. With bins_M1 return a list of M such dicts, filled in one pass: micro-batch m holds
ids_B[bins_M1[m]:bins_M1[m + 1]], as from `plan`.

tokens_T: int32 or int64. sampled_T: bool or uint8. *_logprobs_T: float32, entry t belongs to token t. Each of these is
one array (T,), or a list (or tuple) of N arrays, one per trajectory, which are read without a copy.
offsets_N1, ids_B, rows_N, bins_M1: int64. advantages_N, weights_N: float64 or float32, a trajectory's advantage and the
weight of each of its sampled tokens. live: 'weight' or 'advantage'. narrow: return ids in int32, for int32 tokens.
arena: an Arena whose memory is reused; None for fresh memory. threads: 0 for as many as the machine runs at once; the
result does not depend on it. No array may change during the call.

The result has input_ids, positions, targets int64 or int32 (P,): row i of a trajectory reads token i and predicts token
i + 1; cu_seqlens int32 (B + 1,); max_seqlen int; action_mask bool (P,), true where the target was sampled; weights
float32 (P,), 0 where it was not; advantages float32 (P,); segment_ids int32 (P,), the sequence's index in the
micro-batch; and, if given, old_logprobs, sampler_logprobs, ref_logprobs float32 (P,), those of the targets, 0 where not
sampled. With live it has live_rows int64: the rows of nonzero weight and, for 'advantage', nonzero advantage.
Denominators: sequences, actions (rows of the mask) int, weight_sum float. The arrays of a call share their memory.
Raises ValueError for offsets that do not rise from 0 to T, sizes that differ, an id out of range, rows_N[id] not below
the trajectory's length, an advantage or weight that is not finite, bins that do not rise from 0 to B, 2^31 rows or more
in one micro-batch or 2^36 in all, or an option out of range.)";

}  // namespace

void bind_fill(py::module_& module) {
  const py::none none;
  module.def("trainable_rows", trainable_rows, py::arg("offsets_N1"), py::arg("sampled_T"), kTrainableRows);
  module.def("fill", fill, py::arg("tokens_T"), py::arg("offsets_N1"), py::arg("sampled_T"), py::arg("ids_B"),
             py::arg("rows_N"), py::arg("advantages_N"), py::arg("weights_N"), py::kw_only(),
             py::arg("old_logprobs_T") = none, py::arg("sampler_logprobs_T") = none, py::arg("ref_logprobs_T") = none,
             py::arg("bins_M1") = none, py::arg("live") = none, py::arg("narrow") = false, py::arg("arena") = none,
             py::arg("threads") = 0, kFill);
}

}  // namespace mgrpo::bindings
