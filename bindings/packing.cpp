// mgrpo._packing: the C++ packer for Python. numpy in, numpy out; the GIL is released while the core works.
// Every mistake of the caller's is a ValueError; an array is never copied or converted behind the caller's back.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "align.hpp"
#include "check.hpp"
#include "fill.hpp"
#include "plan.hpp"

namespace py = pybind11;
using mgrpo::require;

namespace {

std::string describe(py::handle given) {
  if (!py::isinstance<py::array>(given)) return py::repr(py::type::handle_of(given));
  const auto array = py::reinterpret_borrow<py::array>(given);
  return py::str("a {} array of shape {}{}")
      .format(array.dtype(), array.attr("shape"), array.flags() & py::array::c_style ? "" : ", not contiguous");
}

template <class T>
bool is_column(py::handle given) {
  if (!py::isinstance<py::array_t<T>>(given)) return false;
  const auto array = py::reinterpret_borrow<py::array>(given);
  const bool aligned = reinterpret_cast<uintptr_t>(array.data()) % alignof(T) == 0;
  return array.ndim() == 1 && aligned && (array.flags() & py::array::c_style);
}

template <class T>
std::span<const T> view(py::handle given) {
  const auto array = py::reinterpret_borrow<py::array>(given);
  return {static_cast<const T*>(array.data()), static_cast<size_t>(array.size())};
}

void refuse(const char* name, const char* expected, py::handle given) {
  require(false, name, " must be a one-dimensional contiguous array of ", expected, ", got ", describe(given));
}

template <class T>
std::span<const T> column(const char* name, const char* expected, py::handle given) {
  if (!is_column<T>(given)) refuse(name, expected, given);
  return view<T>(given);
}

std::span<const int64_t> integers(const char* name, py::handle given) { return column<int64_t>(name, "int64", given); }

std::span<const uint8_t> flags(const char* name, py::handle given) {
  if (is_column<bool>(given)) {
    const auto bools = view<bool>(given);
    return {reinterpret_cast<const uint8_t*>(bools.data()), bools.size()};
  }
  return column<uint8_t>(name, "bool or uint8", given);
}

/// A column of one number for each trajectory, which is few: float32 is widened.
std::vector<double> floats(const char* name, py::handle given) {
  if (is_column<float>(given)) {
    const auto values = view<float>(given);
    return {values.begin(), values.end()};
  }
  const auto values = column<double>(name, "float64 or float32", given);
  return {values.begin(), values.end()};
}

template <class T>
T number(const char* name, const char* expected, py::handle given) {
  py::detail::make_caster<T> caster;
  require(caster.load(given, true), name, " must be ", expected, ", got ", std::string(py::repr(given)));
  return py::detail::cast_op<T>(caster);
}

int64_t integer(const char* name, py::handle given) { return number<int64_t>(name, "a 64-bit integer", given); }

template <class T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

mgrpo::AlignMode align_mode(py::handle given) {
  if (given.equal(py::str("sampled"))) return mgrpo::AlignMode::sampled;
  require(given.equal(py::str("expected")), "mode must be 'sampled' or 'expected', got ", std::string(py::repr(given)));
  return mgrpo::AlignMode::expected;
}

py::array_t<double> align(const py::object& counts, const py::object& target, const py::object& mode,
                          const py::object& seed, const py::object& keys) {
  const auto counts_R = integers("counts", counts);
  const auto keys_R = column<uint64_t>("keys", "uint64", keys);
  const auto how = align_mode(mode);
  const auto wanted = integer("target", target);
  const auto start = number<uint64_t>("seed", "an integer from 0 to 2^64 - 1", seed);
  std::vector<double> copies_T;
  {
    const py::gil_scoped_release released;
    copies_T = mgrpo::align(counts_R, wanted, how, start, keys_R);
  }
  return to_numpy(copies_T);
}

py::array_t<int64_t> trainable_rows(const py::object& offsets, const py::object& sampled) {
  const auto offsets_N1 = integers("offsets", offsets);
  const auto sampled_T = flags("sampled", sampled);
  std::vector<int64_t> rows_N;
  {
    const py::gil_scoped_release released;
    rows_N = mgrpo::trainable_rows(offsets_N1, sampled_T);
  }
  return to_numpy(rows_N);
}

mgrpo::Cost cost_pair(py::handle given) {
  require(py::isinstance<py::sequence>(given) && py::len(given) == 2,
          "cost must be a pair (per row, per row squared), got ", std::string(py::repr(given)));
  const auto pair = py::reinterpret_borrow<py::sequence>(given);
  return {number<double>("cost[0]", "a number", py::object(pair[0])),
          number<double>("cost[1]", "a number", py::object(pair[1]))};
}

py::tuple plan(const py::object& lengths, const py::object& cap, const py::object& ranks, const py::object& cost,
               const py::object& groups, const py::object& mini_batches, const py::object& seed, bool allow_empty) {
  const auto lengths_N = integers("lengths", lengths);
  std::optional<std::span<const int64_t>> groups_N;
  if (!groups.is_none()) groups_N = integers("groups", groups);
  const mgrpo::Terms terms{integer("cap", cap),
                           integer("ranks", ranks),
                           cost_pair(cost),
                           integer("mini_batches", mini_batches),
                           number<uint64_t>("seed", "an integer from 0 to 2^64 - 1", seed),
                           allow_empty};
  py::array_t<int64_t> ids(static_cast<py::ssize_t>(lengths_N.size()));
  const std::span<int64_t> ids_N(ids.mutable_data(), lengths_N.size());
  mgrpo::Plan made;
  {
    const py::gil_scoped_release released;
    made = mgrpo::plan(lengths_N, groups_N, terms, ids_N);
  }
  return py::make_tuple(to_numpy(made.offsets_M1), ids, to_numpy(made.mini_batches_B1));
}

int64_t l2_bound(const py::object& lengths, const py::object& cap) {
  const auto lengths_N = integers("lengths", lengths);
  const auto most = integer("cap", cap);
  const py::gil_scoped_release released;
  return mgrpo::l2_bound(lengths_N, most);
}

/// A fresh array of `size` entries in `into[key]`, to be written to.
template <class T>
std::span<T> fresh(py::dict& into, const char* key, size_t size) {
  py::array_t<T> array(static_cast<py::ssize_t>(size));
  into[key] = array;
  return {array.mutable_data(), size};
}

mgrpo::Batch fresh_batch(py::dict& into, size_t rows, size_t sequences) {
  return {fresh<int64_t>(into, "input_ids", rows),   fresh<int64_t>(into, "positions", rows),
          fresh<int64_t>(into, "targets", rows),     fresh<bool>(into, "action_mask", rows),
          fresh<float>(into, "weights", rows),       fresh<float>(into, "advantages", rows),
          fresh<int32_t>(into, "segment_ids", rows), fresh<int32_t>(into, "cu_seqlens", sequences + 1)};
}

struct Logprobs {
  const char* key;
  std::span<const float> given_T;
  std::span<float> filled_P;
};

/// The columns of log-probs that were given.
std::vector<Logprobs> logprob_columns(const py::object& old, const py::object& sampler, const py::object& ref,
                                      size_t tokens) {
  std::vector<Logprobs> columns;
  const std::pair<const char*, py::object> given[] = {
      {"old_logprobs", old}, {"sampler_logprobs", sampler}, {"ref_logprobs", ref}};
  for (const auto& [key, values] : given) {
    if (values.is_none()) continue;
    columns.push_back({key, column<float>(key, "float32", values), {}});
    const auto size = columns.back().given_T.size();
    require(size == tokens, key, " has ", size, " entries, expected one for each of the ", tokens, " tokens");
  }
  return columns;
}

template <class Token>
py::dict fill_batch(const mgrpo::Trajectories<Token>& given, std::span<const int64_t> ids_B,
                    std::vector<Logprobs> columns) {
  mgrpo::BatchSize size;
  {
    const py::gil_scoped_release released;
    size = mgrpo::measure(given, ids_B);
  }
  py::dict filled;
  filled["max_seqlen"] = size.longest;
  const auto batch = fresh_batch(filled, size.rows, ids_B.size());
  for (auto& column : columns) column.filled_P = fresh<float>(filled, column.key, size.rows);
  {
    const py::gil_scoped_release released;
    mgrpo::fill(given, ids_B, batch);
    for (auto& column : columns) mgrpo::fill_logprobs(given, ids_B, batch, column.given_T, column.filled_P);
  }
  return filled;
}

py::dict fill(const py::object& tokens, const py::object& offsets, const py::object& sampled, const py::object& ids,
              const py::object& rows, const py::object& advantages, const py::object& weights,
              const py::object& old_logprobs, const py::object& sampler_logprobs, const py::object& ref_logprobs) {
  const auto offsets_N1 = integers("offsets", offsets), ids_B = integers("ids", ids), rows_N = integers("rows", rows);
  const auto sampled_T = flags("sampled", sampled);
  const auto advantages_N = floats("advantages", advantages), weights_N = floats("weights", weights);
  auto columns = logprob_columns(old_logprobs, sampler_logprobs, ref_logprobs, sampled_T.size());
  if (is_column<int32_t>(tokens)) {
    const mgrpo::Trajectories<int32_t> given{view<int32_t>(tokens), offsets_N1, sampled_T, rows_N,
                                             advantages_N,          weights_N};
    return fill_batch(given, ids_B, std::move(columns));
  }
  const auto tokens_T = column<int64_t>("tokens", "int32 or int64", tokens);
  const mgrpo::Trajectories<int64_t> given{tokens_T, offsets_N1, sampled_T, rows_N, advantages_N, weights_N};
  return fill_batch(given, ids_B, std::move(columns));
}

constexpr const char* kAlign =
    R"(align(counts_R, target, mode, seed, keys_R) -> float64 (sum(counts_R),)

How often each trajectory counts when every rollout is aligned to `target` of them (M-GRPO, arXiv 2511.13288).

counts_R: int64 (R,), the trajectories of each rollout, 0 allowed. target: D, from 1 to 2^20. keys_R: uint64 (R,).
mode 'sampled': whole numbers that sum to D over each rollout with any: one short of D has each once and the rest
uniformly with replacement, one beyond D has D chosen uniformly without replacement. mode 'expected': D / count for all.
The draws of a rollout depend on (seed, its key, its count, D) alone; rollouts with equal keys draw alike.
ValueError: negative counts, more than 2^28 trajectories, D or seed out of range, another mode, sizes that differ.)";

constexpr const char* kTrainableRows =
    R"(trainable_rows(offsets_N1, sampled_T) -> int64 (N,)

The index of each trajectory's last sampled token, 0 where none is or only token 0: as many rows as can add to a loss
over sampled tokens, since row i predicts token i + 1 and the model is causal.

offsets_N1: int64 (N + 1,), rising from 0 to T. sampled_T: bool or uint8 (T,), true where the agent chose the token.
ValueError: offsets that do not rise from 0 to T.)";

constexpr const char* kPlan =
    R"(plan(lengths_N, cap, ranks=1, cost=(1.0, 0.0), *, groups_N=None, mini_batches=1, seed=0, allow_empty=False)
     -> (offsets_M1, ids_N, mini_batches_B1), all int64

Puts N sequences into M micro-batches of at most `cap` rows: micro-batch m holds ids_N[offsets_M1[m]:offsets_M1[m + 1]],
and mini-batch b (one optimizer step) runs the micro-batches mini_batches_B1[b] to mini_batches_B1[b + 1] - 1.
The sequences are dealt into mini-batches of near-equal cost; those of nearly the same cost in an order drawn from seed.
In each, the number of micro-batches is what best-fit decreasing needs, rounded up to a multiple of ranks; those that
run side by side (ranks of them, one after another in the plan) are at near-equal cost, the dearest first. Rank r runs
r, r + ranks, .... A pure function of its arguments.

lengths_N: int64 (N,), in rows, from 1 to cap. cost: (a, b), a sequence of L rows costs a*L + b*L^2. groups_N: int64
(N,), sequences with the same number share a micro-batch. seed: from 0 to 2^64 - 1, of no effect on one mini-batch.
allow_empty: let micro-batches be empty where there are fewer sequences (or groups) than micro-batches. N = 0 gives none,
or with allow_empty `ranks` empty ones a mini-batch.
ValueError: a length, cap, ranks, cost, mini_batches or seed out of range; groups that do not match or that have more
than cap rows; without allow_empty, fewer sequences (or groups) in a mini-batch than its micro-batches.)";

constexpr const char* kL2Bound =
    R"(l2_bound(lengths_N, cap) -> int

A number of micro-batches of `cap` rows that no packing can do with fewer than (L2 of Martello and Toth 1990, 8.3).

lengths_N: int64 (N,), from 1 to cap. ValueError: a length or cap out of range.)";

constexpr const char* kFill =
    R"(fill(tokens_T, offsets_N1, sampled_T, ids_B, rows_N, advantages_N, weights_N, *, old_logprobs_T=None,
     sampler_logprobs_T=None, ref_logprobs_T=None) -> dict

The flat buffers of one micro-batch: the first rows_N[id] tokens of each trajectory of ids_B, in that order. P rows.

tokens_T: int32 or int64. offsets_N1, ids_B, rows_N: int64. sampled_T: bool or uint8. advantages_N, weights_N: float64
or float32, a trajectory's advantage and the weight of each of its sampled tokens. *_logprobs_T: float32, entry t is
that of token t.

Gives input_ids, positions, targets int64 (P,): row i of a trajectory reads token i and predicts token i + 1;
cu_seqlens int32 (B + 1,); max_seqlen int; action_mask bool (P,), true where the target was sampled; weights float32
(P,), 0 where it was not; advantages float32 (P,); segment_ids int32 (P,), the place in ids_B; and old_logprobs,
sampler_logprobs, ref_logprobs float32 (P,) as far as given, those of the targets, 0 where not sampled.
ValueError: offsets that do not rise from 0 to T, sizes that differ, an id out of range, rows_N[id] not below the
trajectory's length, advantage or weight not finite, 2^31 rows or more.)";

}  // namespace

void bind_tree(py::module_& module);

PYBIND11_MODULE(_packing, module) {
  py::options options;
  options.disable_function_signatures();
  module.doc() = "The packer: alignment, micro-batch planning and filling of flat buffers. See csrc/.";
  module.def("align", align, py::arg("counts_R"), py::arg("target"), py::arg("mode"), py::arg("seed"),
             py::arg("keys_R"), kAlign);
  module.def("trainable_rows", trainable_rows, py::arg("offsets_N1"), py::arg("sampled_T"), kTrainableRows);
  module.def("plan", plan, py::arg("lengths_N"), py::arg("cap"), py::arg("ranks") = 1,
             py::arg("cost") = py::make_tuple(1.0, 0.0), py::kw_only(), py::arg("groups_N") = py::none(),
             py::arg("mini_batches") = 1, py::arg("seed") = 0, py::arg("allow_empty") = false, kPlan);
  module.def("l2_bound", l2_bound, py::arg("lengths_N"), py::arg("cap"), kL2Bound);
  module.def("fill", fill, py::arg("tokens_T"), py::arg("offsets_N1"), py::arg("sampled_T"), py::arg("ids_B"),
             py::arg("rows_N"), py::arg("advantages_N"), py::arg("weights_N"), py::kw_only(),
             py::arg("old_logprobs_T") = py::none(), py::arg("sampler_logprobs_T") = py::none(),
             py::arg("ref_logprobs_T") = py::none(), kFill);
  bind_tree(module);
}
