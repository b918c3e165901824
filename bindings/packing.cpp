// mgrpo._packing: the C++ packer for Python. It takes and returns numpy arrays, and releases the GIL while the core
// works. Every mistake of the caller is a ValueError; an array is never copied or converted silently.
#include <optional>

#include "align.hpp"
#include "arrays.hpp"
#include "parts.hpp"
#include "plan.hpp"

using namespace mgrpo::bindings;
using mgrpo::require;

namespace {

mgrpo::AlignMode align_mode(py::handle given) {
  const bool is_text = py::isinstance<py::str>(given);  // an array would compare entry by entry, or not at all
  if (is_text && given.equal(py::str("sampled"))) return mgrpo::AlignMode::sampled;
  require(is_text && given.equal(py::str("expected")), "mode must be 'sampled' or 'expected', got ",
          std::string(py::repr(given)));
  return mgrpo::AlignMode::expected;
}

py::array_t<double> align(const py::object& counts, const py::object& target, const py::object& mode,
                          const py::object& seed, const py::object& keys) {
  const auto counts_R = integers("counts", counts);
  const auto keys_R = column<uint64_t>("keys", "uint64", keys);
  const auto how = align_mode(mode);
  const auto aligned = integer("target", target);
  const auto start = number<uint64_t>("seed", "an integer from 0 to 2^64 - 1", seed);
  std::vector<double> copies_T;
  {
    const py::gil_scoped_release released;
    copies_T = mgrpo::align(counts_R, aligned, how, start, keys_R);
  }
  return to_numpy(copies_T);
}

mgrpo::Cost cost_pair(py::handle given) {
  const bool is_pair = py::isinstance<py::sequence>(given) && PySequence_Size(given.ptr()) == 2;
  PyErr_Clear();  // a 0-dimensional array is a sequence without a length
  require(is_pair, "cost must be a pair (per row, per row squared), got ", std::string(py::repr(given)));
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

constexpr const char* kAlign =
    R"(align(counts_R, target, mode, seed, keys_R) -> float64 (sum(counts_R),)

Return how often each trajectory counts when every rollout is aligned to `target` of them (M-GRPO, arXiv 2511.13288).

counts_R: int64 (R,), the trajectories of each rollout, 0 allowed. target: D, from 1 to 2^20. keys_R: uint64 (R,).
mode 'sampled': whole numbers that sum to D over each rollout that has trajectories. A rollout with fewer than D gets
each once and the rest drawn uniformly with replacement; one with more gets D of them, drawn uniformly without
replacement.
mode 'expected': D / count for all. A rollout's draws depend only on (seed, its key, its count, D); rollouts with equal
keys draw alike.
Raises ValueError for negative counts, more than 2^28 trajectories, D or seed out of range, another mode, and sizes that
differ.)";

constexpr const char* kPlan =
    R"(plan(lengths_N, cap, ranks=1, cost=(1.0, 0.0), *, groups_N=None, mini_batches=1, seed=0, allow_empty=False)
     -> (offsets_M1, ids_N, mini_batches_B1), all int64

Put N sequences into M micro-batches of at most `cap` rows: micro-batch m holds ids_N[offsets_M1[m]:offsets_M1[m + 1]],
and mini-batch b (one optimizer step) runs the micro-batches mini_batches_B1[b] to mini_batches_B1[b + 1] - 1.
The sequences are divided into mini-batches of near-equal cost; those of nearly the same cost in an order drawn from
seed. In each mini-batch the number of micro-batches is what best-fit decreasing needs, rounded up to a multiple of
ranks.
Micro-batches that run side by side (ranks of them, adjacent in the plan) have near-equal cost; the most expensive come
first. Rank r runs r, r + ranks, .... This is a pure function of its arguments.

lengths_N: int64 (N,), in rows, from 1 to cap. cost: (a, b), a sequence of L rows costs a*L + b*L^2. groups_N: int64
(N,), sequences with the same number share a micro-batch. seed: from 0 to 2^64 - 1, without effect on one mini-batch.
allow_empty: let micro-batches be empty if there are fewer sequences (or groups) than micro-batches. N = 0 gives none,
or with allow_empty `ranks` empty ones per mini-batch.
Raises ValueError for a length, cap, ranks, cost, mini_batches or seed out of range; for groups that do not match or
that have more than cap rows; and, without allow_empty, for fewer sequences (or groups) in a mini-batch than
micro-batches.)";

constexpr const char* kL2Bound =
    R"(l2_bound(lengths_N, cap) -> int

Return a lower bound on the number of micro-batches of `cap` rows (L2 of Martello and Toth 1990, 8.3).

lengths_N: int64 (N,), from 1 to cap. Raises ValueError for a length or cap out of range.)";

}  // namespace

PYBIND11_MODULE(_packing, module) {
  py::options options;
  options.disable_function_signatures();
  module.doc() = "The packer: alignment, micro-batch planning and filling of flat buffers. See csrc/.";
  module.def("align", align, py::arg("counts_R"), py::arg("target"), py::arg("mode"), py::arg("seed"),
             py::arg("keys_R"), kAlign);
  module.def("plan", plan, py::arg("lengths_N"), py::arg("cap"), py::arg("ranks") = 1,
             py::arg("cost") = py::make_tuple(1.0, 0.0), py::kw_only(), py::arg("groups_N") = py::none(),
             py::arg("mini_batches") = 1, py::arg("seed") = 0, py::arg("allow_empty") = false, kPlan);
  module.def("l2_bound", l2_bound, py::arg("lengths_N"), py::arg("cap"), kL2Bound);
  bind_fill(module);
  bind_arena(module);
  bind_lists(module);
  bind_tree(module);
}
