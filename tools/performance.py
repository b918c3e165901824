"""Describe the measurements in bench/results/*.json: the page docs/performance.md and the results table of the README.

Every figure comes from a JSON file; the sentences around it are here. `runs.json` holds the figures that no benchmark
writes, such as those of whole training runs. `python tools/pages.py` writes the page.
"""

from __future__ import annotations

from typing import Any

from figures import commit, digits, named, points, results, run, span, table, value, wrapped

LINEAR = "linear_grpo_loss bf16 N=4096 H=576 V=49152, 50% live, "
LOGITS = "grpo_loss bf16 N=512 V=49152, 100% live, "
GROUPS = "group_advantages, 1048576 trajectories in groups of 8, "
ARMS = {
    "co-train": "both agents trained, M-GRPO",
    "main-only": "sub-agent frozen after the warm-up",
    "single": "no sub-agent, the main agent searches itself",
    "by-arrival": "as co-train, but the sub-agent's groups are formed by arrival, not by query",
    "no-alignment": "as co-train, but every call counts once",
}
WAYS = (
    "the usual way",
    "no copies for the alignment",
    "identical trajectories once",
    "none without advantage",
    "no second forward",
    "no padding",
    "the head on the agent's tokens only",
    "no logits kept",
    "no lists: the engine",
    "TRL",
)


# ---- sections of the page


def introduction() -> str:
    """Return the head of the page."""
    return f"""\
# Performance

<!-- Written by tools/pages.py from bench/results/*.json. Change those files or the script, not this page. -->

This page holds everything that was measured, with the commit at which it was measured. The machine of all figures is
the same: {results("runs")["machine"]}. Nothing here has run on a GPU yet, and no target for a GPU has
been measured. What is known without one: the Triton kernels are right in the interpreter and compile for sm_80, sm_90
and sm_100 without register spills, and `make gpu-rehearsal` runs losses, attention, a policy's step, copies to the
device and sampling with the CUDA builds of torch 2.11 to 2.15 on a GPU that computes nothing, which checks shapes,
dtypes, devices, calls of torch, launches and waits of the host, but no number.

You can repeat the measurements:

```bash
mgrpo bench kernels
mgrpo bench packing
mgrpo bench step
mgrpo bench store --quick
mgrpo bench rollout
python -m mgrpo.bench.trl --quick
```

Each command first prints the limits of the machine, then runs ours and its peers in turns, and ends with one line of
JSON. `pip install 'mgrpo[bench]'` installs the peers; a missing one is reported by name. On a machine with a GPU
`bench/gpu.sh check` compares every path of a GPU with its reference in four minutes, and `bench/gpu.sh bench` runs the
GPU tests and the benchmarks in seven. The full results are in `bench/results/`; `bench/NOTES.md` tells what followed
from them. In tables, "target" is the value we aimed at.
"""


def whole_runs() -> str:
    """Describe `make train` and `make train-full`."""
    rows = [
        [
            f"`make {name}`, {one['cores']}",
            one["commit"],
            str(one["questions"]),
            span(one["start"]),
            span(one["end"]),
            one["time"],
            f"{one['memory_gib']:.1f} GiB",
        ]
        for name in ("train", "train-full")
        for one in [run(name)]
    ]
    heads = ("run", "commit", "questions", "start of rl, %", "end of rl, %", "time", "peak memory")
    short, full = run("train"), run("train-full")
    slow, fast = short["share_of_matmul_ceiling"]
    return f"""\
## Whole runs

Two SmolLM2-135M agents learn to answer multi-hop questions about geography. The table shows the accuracy on held-out
questions with greedy decoding and its 95 % Wilson interval. Both runs start from a fresh clone; the time includes the
installation. One seed each.

{table(heads, rows)}

{gained("train", short)} {gained("train-full", full)} The warm-up uses deliberately careless demonstrations. After
{short["commit"]} the sampler's cache got fixed slots and the code of the loss was reordered; what it computes did not
change.

{step_of("train", short)} {step_of("train-full", full)} In `make train`, training runs at {slow}
to {fast:.2f} of the matmul rate measured in the same process.

"Held out" means: no held-out country, nor its capital or another of its cities, occurs in a training question, in its
steps, in its answer or in anything that a search shows during training. Whole families of neighbouring countries are
on one side.

`mgrpo report runs/geography/full` prints such a summary and draws the figure:

![Reward, held-out accuracy, calls and entropy over the rl steps](../bench/results/geography-full.png)
"""


def gained(name: str, one: dict[str, Any]) -> str:
    """Return the size of a run and what it gained."""
    size = f"{one['steps']} rl steps of {one['queries']} queries x {one['rollouts']} rollouts"
    low, high = one["gain"][1:]
    return (
        f"`make {name}` is {size} after {one['warmup_steps']} warm-up steps: "
        f"+{one['gain'][0]} points (95 % interval +{low} to +{high})."
    )


def step_of(name: str, one: dict[str, Any]) -> str:
    """Return the seconds of a run's rl step."""
    seconds = one["step_seconds"]
    return (
        f"An rl step of `make {name}` takes {seconds['whole']} s on average: {seconds['sampling']} s of sampling, "
        f"{seconds['training main']} s of training the main agent and {seconds['training sub']:.1f} s the sub-agent."
    )


def ablation() -> str:
    """Describe the arms of the ablation."""
    heads = ("model", "arm", "seeds", "start of rl, %", "end of rl, %", "difference from co-train, points")
    models = results("ablation")["models"]
    rows = [
        [
            {"tiny": "tiny", "smollm2": "SmolLM2-135M"}[model],
            f"`{arm}`: {text}",
            str(len(one["seeds"])),
            points(one["start"]),
            points(one["end"]),
            "" if arm == "co-train" else signed(one["less co-train"]),
        ]
        for model in ("tiny", "smollm2")
        for arm, text in ARMS.items()
        if (one := models[model].get(arm))
    ]
    tiny, large = models["tiny"], models["smollm2"]
    mean, low, high = (-100 * tiny["main-only"]["less co-train"][key] for key in ("mean", "high", "low"))
    return f"""\
## What training both agents is worth

`python -m mgrpo.bench.ablation --out DIR` (commit {tiny["co-train"]["commits"][0]}, one core per run) trains the
same task in several arms. The table shows the held-out accuracy on geography: the mean and the 95 % t-interval over
seeds. Arms of the same seed are
compared with each other. `--report` prints this table and draws the figure.

{table(heads, rows)}

With the tiny model ({tiny["co-train"]["steps"]} steps of 12 x 8, 480 questions) co-training is better than a frozen
sub-agent by {mean:.1f} points ({low:.1f} to {high:.1f}). Groups by arrival, and calls without alignment, do as well
as the paper's way; the questions take only one to three calls.

With SmolLM2 ({large["co-train"]["steps"]} steps of 12 x 6, 240 questions) every seed gains by co-training
({seeds(large["co-train"])}), and little or nothing with a frozen sub-agent ({seeds(large["main-only"])}). The
warm-ups of the seeds end far apart, so three seeds give wide intervals; that of the difference just includes zero.
`bench/NOTES.md` says what else may explain this, and what it does not show.

![Held-out accuracy and rewards of the arms over the rl steps](../bench/results/ablation.png)
"""


def signed(of: dict[str, float]) -> str:
    """Format a difference of shares and its interval in points, with signs."""
    mean, low, high = (round(100 * of[key], 1) + 0.0 for key in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def seeds(arm: dict[str, Any]) -> str:
    """Format the accuracy of each seed at the start and at the end."""
    found = [arm["accuracies"][seed] for seed in sorted(arm["accuracies"])]
    return ", ".join(f"{100 * each[0]:.1f} to {100 * each[-1]:.1f} %" for each in found)


def step() -> str:
    """Describe a whole training step."""
    cases = ("mix/64, main", "mix/64, sub", "geography recorded, main", "geography recorded, sub")
    heads = ("", "mix, main agent", "mix, sub-agent", "geography, main agent", "geography, sub-agent")
    rows = [[way, *(step_cell(case, way) for case in cases)] for way in WAYS]
    again = run("step-again")
    speedup = value("cpu-step", "mix/64, both agents: times as fast as the usual way")
    memory = value("cpu-step", "mix/64, both agents: extra memory over the usual way's")
    mix, geography = (value("cpu-step", f"{case}: TRL's time over ours") for case in (cases[0], cases[2]))
    return f"""\
## A whole training step

`mgrpo bench step` (commit {commit("cpu-step")}, both cores, nothing beside it) measures one whole step of an agent,
from sealed groups to new weights. The first row is the usual way; each further row leaves out one more thing. The
model has SmolLM2's architecture; a step has 3 queries x 6 rollouts. "Mix" is a mix of agent trajectories (main agent
8k to 32k tokens, sub-agent 0.2k to 4k, D = 8, 3 calls on average) with all lengths divided by 64; "geography" are
recorded trajectories. A cell shows the time, how many times as fast that is as the usual way, and the memory above
what was held before.

{table(heads, rows)}

For both agents of the mix together the engine is {speedup:.2f} times as fast as the usual way (target 5) in
{memory:.2f} of its memory (target 0.5). The first and the last way alone, run again at {again["commit"]}, gave
{again["speedup"]} times and {again["memory"]}: both results are within run-to-run noise of their targets. The engine
is {mix:.1f} times as fast as TRL on the main agent's mix and {geography:.1f} times on geography (target 2). TRL has
no sub-agents whose calls differ in number between rollouts.

Tests hold the gradients of all ways equal to 1e-9 in float64; in bf16 the engine and the usual way are equally far
from fp32 (`bench/NOTES.md`).

![Seconds of a step, one elimination after the other](../bench/results/step.png)
"""


def step_cell(case: str, way: str) -> str:
    """Format one cell of the table of steps; empty if it was not measured."""
    if named("cpu-step").get(f"{case}, {way}: time") is None:
        return ""
    seconds, times, memory = (
        value("cpu-step", f"{case}, {way}: {what}")
        for what in ("time", "times as fast as the usual way", "extra memory")
    )
    return f"{digits(seconds)} s, {times:.1f}x, {memory:.1f} GB"


def loss() -> str:
    """Describe the loss alone."""
    floor = value("cpu-kernels", "linear_grpo_loss bf16 N=4096 H=576 V=49152, three bare GEMMs of 4096 rows: time")
    peers = {
        "ours": "ours",
        "torch.compile": "torch.compile",
        "plain torch": "plain torch",
        "TRL chunked log-prob": "TRL's chunked log-prob",
        "Liger fused linear GRPO": "Liger's fused linear GRPO",
    }
    rows = [[f"floor: three bare matmuls, half of the {floor / 1e3:.2f} s of all rows", f"{floor / 2e3:.2f} s", "", ""]]
    rows += [
        [
            text,
            f"{value('cpu-kernels', f'{LINEAR}{peer}: time') / 1e3:.2f} s",
            "" if peer == "ours" else f"{value('cpu-kernels', f'{LINEAR}{peer}: time over ours'):.1f}",
            f"{value('cpu-kernels', f'{LINEAR}{peer}: extra memory'):.2f} GB",
        ]
        for peer, text in peers.items()
    ]
    share = value("cpu-kernels", f"{LINEAR}ours: share of the floor")
    memory = value(
        "cpu-kernels", "linear_grpo_loss bf16 N=4096 H=576 V=49152 50% live: extra memory over plain torch's"
    )
    ours, plain = (value("cpu-kernels", f"{GROUPS}{who}: time") / 1e3 for who in ("ours", "plain torch"))
    return f"""\
## The loss

`mgrpo bench kernels` (commit {commit("cpu-kernels")}, pinned to one core, tests on the other): `linear_grpo_loss`
forward and backward in bf16, N=4096 H=576 V=49152, half of the rows live.

{table(("", "time", "times ours", "extra memory"), rows)}

Ours reaches {share:.0f} % of the speed of its three bare matmuls. The targets were 2.5 times as fast as plain torch,
1.3 times as fast as TRL's log-prob, and a tenth of plain torch's extra memory ({memory:.3f} was measured): all were
met.

From logits that exist (N=512, all rows live) `grpo_loss` takes {logits("ours")}, torch.compile
{logits("torch.compile")} and plain torch {logits("plain torch")}. `group_advantages` of 1,048,576 trajectories in
groups of 8 takes {ours:.0f} ms, {ours / plain:.1f} times as long as plain torch ({plain:.0f} ms), which has no
checks, no weights and no groups of zero std.
"""


def logits(who: str) -> str:
    """Format the time of one loss from logits."""
    name = f"{LOGITS}{who}: time"
    over = "" if who == "ours" else f" ({digits(value('cpu-kernels', f'{name} over ours'))} times as long)"
    return f"{value('cpu-kernels', name):.0f} ms{over}"


def trl() -> str:
    """Describe a step of TRL's trainer with our loss."""

    def said(kl: str) -> tuple[str, str, str]:
        seconds, times = (value("cpu-trl-step", f"{kl}: step{end}") for end in ("", ", times as fast as TRL's"))
        share = value("cpu-trl-step", f"{kl}: memory, share of TRL's")
        return f"{seconds:.2f} s", f"{times:.1f}", f"{share:.3f}"

    heads = ("", "step with our loss", "times as fast as TRL's", "extra memory, share of TRL's")
    rows = [["without a KL term", *said("no KL")], ["with a KL term", *said("KL")]]
    return f"""\
## Under TRL's trainer

`python -m mgrpo.bench.trl` (commit {commit("cpu-trl-step")}, both cores, nothing beside it) measures the forward and
the backward of `GRPOTrainer` of TRL 1.16 on one micro-batch, with its own loss and with ours: fp32, 4 layers of width
256, V=49152, 8 sequences of up to 64 + 256 tokens, a quarter of them without advantage. The model is small for its
vocabulary, so the head dominates.

{table(heads, rows)}


"""


def packer() -> str:
    """Describe the packer."""

    def plan(peer: str) -> str:
        sizes = ("10_000", "100_000", "1_000_000")
        return ", ".join(
            " and ".join(
                digits(
                    value("cpu-packing", f"plan {mix} {size}: times LightBinPack {peer}"), 3 if size == "100_000" else 2
                )
                for mix in ("log-normal", "agents")
            )
            for size in sizes
        )

    def figure(name: str, count: int = 2) -> str:
        return digits(value("cpu-packing", name), count)

    threads = value("cpu-packing", "growth: fill, 2 threads over 1")
    large = value("cpu-packing", "growth: plan, 10_000_000 sequences") / 1e3
    imbalance = max(value("cpu-packing", name) for name in named("cpu-packing") if name.endswith("lockstep imbalance"))
    times = [value("cpu-packing", f"plan {mix} 10_000: time") for mix in ("agents", "log-normal")]
    reused, share = (
        value("cpu-packing", f"fill 4096 x 4096: reused, {of}") for of in ("times numpy or torch", "share of memcpy")
    )
    rows = [
        ["plan, times LightBinPack's `ogbfd`: 10k, 100k, 1M sequences (two mixes)", plan("ogbfd"), "10"],
        ["the same, times its `obfd`, which does not deal to ranks and is the faster of the two", plan("obfd"), ""],
        ["bins over best-fit decreasing; lockstep imbalance of 8 ranks", f"1; at most {imbalance:.3f}", "1; 1.005"],
        [
            "fill 4096 x 4096 tokens into reused memory: share of a memcpy; times numpy or torch",
            f"{share:.2f}; {reused:.1f}",
            "0.7; 6",
        ],
        [
            "the same into fresh memory, times numpy or torch",
            figure("fill 4096 x 4096: fresh, times numpy or torch"),
            "3",
        ],
        [
            "fill, times Hugging Face's flattening collator",
            figure("fill 256 x 4096: times the flattening collator"),
            "80",
        ],
        [
            "prefix trees, times TRL's TreeRow; times `radix_merge`",
            f"{figure('tree 64 x 16: times TRL TreeRow', 3)}; {figure('tree 64 x 16: times LightBinPack radix_merge')}",
            "100; 20",
        ],
    ]
    return f"""\
## The packer

`mgrpo bench packing` (commit {commit("cpu-packing")}, both cores, nothing beside it):

{table(("", "measured", "target"), rows)}

Several targets were missed. Planning 10k sequences takes {times[0]:.1f} to {times[1]:.1f} ms when caches are cold, as
between runs of the peers, and {run("plan-warm")["milliseconds"]} ms when they are warm. Allocating fresh buffers
costs more than filling them, for every packer: give `pack` an arena, and reuse a batch's buffers for the next. A
memcpy itself is only {reused / share:.1f} times as fast as numpy's columns here. Two threads fill {threads:.1f} times
as fast as one. A plan of 10M sequences takes {large:.2f} s.

![Time to plan over the number of sequences](../bench/results/packing-growth.png)
"""


def rollouts() -> str:
    """Describe the samplers."""
    counts = (1, 16, 64, 256)
    names = {"in process": "in-process sampler", "vLLM": "one vLLM server"}
    rows = [
        [text, *(digits(value("cpu-rollout", f"{who}, {count} at a time: tokens")) for count in counts)]
        for who, text in names.items()
    ]
    least = value("cpu-rollout", "our client over the least one")
    update, paused = value("cpu-rollout", "weight update"), value("cpu-rollout", "of it the server paused")
    silence, served = value("cpu-rollout", "no token around a weight update"), run("servers")
    updates, gap = served["updates"], served["gap_nats"]
    return f"""\
## Rollouts

`mgrpo bench rollout` (commit {commit("cpu-rollout")}, both cores, nothing beside it): a model of SmolLM2's shape,
episodes of two turns of 32 tokens. Tokens per second by the number of episodes at a time:

{table(("", *map(str, counts)), rows)}

Our client takes {least:.3f} times as long as the smallest possible client (target 1.05). New weights reach the server
in {update:.2f} s while 64 turns run (target 1 s); the server is paused for {paused:.2f} s of that, and {silence:.1f}
s pass between the last token before and the first one after. In a run of two SmolLM2 agents on servers (commit
{served["commit"]}; {updates["main"]} and {updates["sub"]} weight updates) the log-probs of trainer and server
differed by {gap[0]} to {gap[1]} nats per token on average (target {served["target_nats"]}).
"""


def store() -> str:
    """Describe the store, and a trainer's step around the model."""
    counts = (1, 8, 32)
    rows = [
        [
            text,
            *(f"{value('cpu-store', f'{who}, {count} workers: rollouts taken and recorded'):,.0f}" for count in counts),
            target,
        ]
        for who, text, target in (("sqlite", "SQLite", "2,000"), ("postgresql", "PostgreSQL", "5,000"))
    ]
    step, model, publish, overhead = map(trainer, ("a step", "the model", "publish", "overhead outside the model"))
    small = sum(map(trainer, ("claim", "rewards, plan, read and fill", "log and the rest")))
    ranks = value("cpu-store", "SmolLM2-135M, the model's part of a step: times as fast by 2 ranks as by 1")
    return f"""\
## The store

`mgrpo bench store` (commit {commit("cpu-store")}, both cores, nothing beside it): rollouts per second that the
workers take and record.

{table(("", *(f"{count} workers" if count > 1 else "1 worker" for count in counts), "target with 8"), rows)}

A SmolLM2 trainer's step of {step:.1f} s spends {model:.1f} s in the model and {overhead:.1f} % outside it (target 3
%): {publish:.2f} s to publish the weights (one thread hashes them while another writes, and they are forced to the
disk as they come) and {1e3 * small:.0f} ms for everything else. Two ranks of one thread each are {ranks:.2f} times as
fast as one.
"""


def trainer(part: str) -> float:
    """Return one part of a trainer's step in bench store."""
    return value("cpu-store", f"SmolLM2-135M, trainer: {part}")


def topologies() -> str:
    """Compare topologies, and the simulation with real runs."""
    one = run("local-and-colocated")
    later = [number for number in range(len(one["local_seconds"])) if number % one["turn"]]
    local, together = ([one[f"{name}_seconds"][number] for number in later] for name in ("local", "colocated"))
    every = sum(one["local_seconds"]) / sum(one["colocated_seconds"])
    found = run("simulate")
    large, tiny = found["smollm2"], found["tiny"]
    seconds = f"{large['predicted_seconds']} and {large['measured_seconds']} s"
    rows = [
        ["SmolLM2 on geography, on-policy", f"{large['ratio']} ({seconds})"],
        ["tiny model, on-policy", str(tiny["on_policy"])],
        ["tiny model, one step ahead", str(tiny["one_step_ahead"])],
        ["tiny model, one step ahead, fitted on the whole run", str(tiny["one_step_ahead_fitted_on_all"])],
    ]
    return f"""\
## Local beside colocated

Two SmolLM2 agents on the same two cores, on-policy, with the same weights (commit {one["commit"]}); the rewards are
equal digit for digit. A step of topology `local` takes {sum(local) / sum(together):.2f} times as long as a
`colocated` one ({min(local)} to {max(local)} s against {min(together)} to {max(together)} s; target {one["target"]}),
or {every:.2f} times with the first step after each start.

## The simulation

`mgrpo simulate` was compared with real local runs: fitted on the first half of a run, it predicts the step time of
the second half (commit {found["commit"]}, both cores, nothing beside it). Predicted over measured:

{table(("run", "predicted over measured"), rows)}

The target was {100 * found["target"]:.0f} % either way. Several workers, GPUs and `switch = "turn"` were not
compared.
"""


def advice() -> str:
    """Return what a user can tune."""
    threads = run("waiting-threads")
    low, high = threads["two_default"]
    asleep = threads["two_passive"]
    return f"""\
## What to tune

* `compute.max_tokens`, the rows of a micro-batch: as large as memory allows. It changes speed and memory only.
* `compute.concurrency`, the calls that the in-process sampler advances together: its key-value cache grows with it.
* Processes that share cores slow each other by far more than half, because every parallel region waits for the thread
  that is not running. Measure alone.
* Two SmolLM2 samplers at a time on two cores take {asleep} s if waiting threads sleep (`OMP_WAIT_POLICY=PASSIVE`,
  which `local` sets) and {low} to {high} s with GNU OpenMP's default (commit {threads["commit"]}). A worker that
  never works beside another process lets its threads spin instead.
* `perf/mfu` is relative to the matmul rate of this machine, measured in the process, not to a data sheet.
"""


SECTIONS = (introduction, whole_runs, ablation, step, loss, trl, packer, rollouts, store, topologies, advice)


def page() -> str:
    """Return docs/performance.md."""
    return "\n\n".join(wrapped(section().strip("\n")) for section in SECTIONS) + "\n"


# ---- the table of the README


def summary() -> str:
    """Return the results table of the README."""
    frozen = results("ablation")["models"]["tiny"]["main-only"]["less co-train"]["mean"]
    speedup = value("cpu-step", "mix/64, both agents: times as fast as the usual way")
    memory = value("cpu-step", "mix/64, both agents: extra memory over the usual way's")
    trl = value("cpu-step", "mix/64, main: TRL's time over ours")
    plain = value("cpu-kernels", f"{LINEAR}plain torch: time over ours")
    rows = [
        ["held-out accuracy by `make train`, twenty minutes", accuracy("train")],
        ["the same by `make train-full`, an hour on one core", accuracy("train-full")],
        ["co-training against a frozen sub-agent, tiny model", f"{-100 * frozen:.1f} points more"],
        ["a training step against the usual way", f"{speedup:.1f} times as fast, {100 * memory:.0f} % of the memory"],
        ["a training step against TRL's trainer", f"{trl:.1f} times as fast"],
        ["the loss alone against plain torch", f"{plain:.1f} times as fast"],
    ]
    return table(("what", "measured on a CPU"), rows)


def accuracy(name: str) -> str:
    """Format the held-out accuracy of a run at the start and at the end."""
    one = run(name)
    return f"{one['start'][0]} % to {one['end'][0]} %"
