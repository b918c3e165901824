// mgrpo._packing: the C++ packer for Python. numpy in, numpy out; the GIL is released while the core works.
// Every mistake of the caller's is a ValueError; an array is never copied or converted behind the caller's back.
#include "align.hpp"
#include "arena.hpp"
#include "arrays.hpp"
#include "fill_binding.hpp"
#include "plan.hpp"

using namespace mgrpo::bindings;
using mgrpo::require;

namespace {

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

mgrpo::Cost cost_pair(py::handle given) {
  require(py::isinstance<py::sequence>(given) && py::len(given) == 2,
          "cost must be a pair (per row, per row squared), got ", std::string(py::repr(given)));
  const auto pair = py::reinterpret_borrow<py::sequence>(given);
  return {number<double>("cost[0]", "a number", py::object(pair[0])),
          number<double>("cost[1]", "a number", py::object(pair[1]))};
}

py::tuple plan(const py::object& lengths, const py::object& cap, const py::object& ranks, const py::object& cost,
               bool allow_empty) {
  const auto lengths_N = integers("lengths", lengths);
  const auto most = integer("cap", cap), side_by_side = integer("ranks", ranks);
  const auto price = cost_pair(cost);
  mgrpo::Plan made;
  {
    const py::gil_scoped_release released;
    made = mgrpo::plan(lengths_N, most, side_by_side, price, allow_empty);
  }
  return py::make_tuple(to_numpy(made.offsets_M1), to_numpy(made.ids_N));
}

constexpr const char* kAlign =
    R"(align(counts_R, target, mode, seed, keys_R) -> float64 (sum(counts_R),)

How often each trajectory counts when every rollout is aligned to `target` of them (M-GRPO, arXiv 2511.13288).

counts_R: int64 (R,), the trajectories of each rollout, 0 allowed. target: D, from 1 to 2^20. keys_R: uint64 (R,).
mode 'sampled': whole numbers that sum to D over each rollout with any: one short of D has each once and the rest
uniformly with replacement, one beyond D has D chosen uniformly without replacement. mode 'expected': D / count for all.
The draws of a rollout depend on (seed, its key, its count, D) alone; rollouts with equal keys draw alike.
ValueError: negative counts, more than 2^28 trajectories, D or seed out of range, another mode, sizes that differ.)";

constexpr const char* kPlan =
    R"(plan(lengths_N, cap, ranks=1, cost=(1.0, 0.0), allow_empty=False) -> (offsets_M1, ids_N), both int64

Puts N sequences into M micro-batches of at most `cap` rows: micro-batch m holds ids_N[offsets_M1[m]:offsets_M1[m + 1]].
M is what best-fit decreasing needs, rounded up to a multiple of ranks, and the sequences are spread evenly over the M.
Micro-batches j*ranks to (j + 1)*ranks - 1 run side by side at near-equal cost, the dearest first; rank r runs r,
r + ranks, .... A pure function of its arguments.

lengths_N: int64 (N,), in rows, from 1 to cap. cost: (a, b), a sequence of L rows costs a*L + b*L^2. allow_empty: let
micro-batches be empty where there are fewer sequences than M. N = 0 gives none, or with allow_empty `ranks` empty ones.
ValueError: a length, cap, ranks or cost out of range; fewer sequences than M without allow_empty.)";

}  // namespace

PYBIND11_MODULE(_packing, module) {
  py::options options;
  options.disable_function_signatures();
  module.doc() = "The packer: alignment, micro-batch planning and filling of flat buffers. See csrc/.";
  module.def("align", align, py::arg("counts_R"), py::arg("target"), py::arg("mode"), py::arg("seed"),
             py::arg("keys_R"), kAlign);
  module.def("plan", plan, py::arg("lengths_N"), py::arg("cap"), py::arg("ranks") = 1,
             py::arg("cost") = py::make_tuple(1.0, 0.0), py::arg("allow_empty") = false, kPlan);
  bind_fill(module);
  bind_lists(module);
  bind_arena(module);
}
