"""`mgrpo bench roofline`: print what head, losses and whole steps should take on an H100, an H200 and a B200.

Beside each prediction stands what was measured of the same name, if `bench/gpu.sh` has left its JSON in bench/results.
Nothing is timed here. A full run writes the predictions beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mgrpo.bench.gpu.gemms import HEAD, ROWS
from mgrpo.bench.harness import Result, json_line, show
from mgrpo.bench.kernels import targets
from mgrpo.bench.roofline.chips import CHIPS, Chip
from mgrpo.bench.roofline.head import (
    BF16,
    F32,
    HeadCase,
    bare,
    head,
    logits_share,
    memory,
    over_bare,
    quarter,
    total,
)
from mgrpo.bench.roofline.layers import eager_layer
from mgrpo.bench.roofline.step import MODELS, StepCase, step, tokens_per_second, useful_flop
from mgrpo.bench.step.models import QWEN3_06B
from mgrpo.kernels.triton.buffers import LEAST_BYTES, MOST_BYTES

FOLDER = Path(__file__).parents[1] / "results"
LARGE = HeadCase(targets.GPU_SHAPE.rows, targets.GPU_SHAPE.width, targets.GPU_SHAPE.vocabulary)
SMALL_HEAD = replace(LARGE, width=QWEN3_06B["hidden_size"])
TIMES = (1, 2, 4, 7, 12)  # the buffers' sizes in `bench/gpu.sh check`
LENGTHS = (2048, 16384, 65536)


@dataclass(frozen=True)
class Row:
    """Hold one prediction: its name, which a measurement may have too, its unit, and its value on each chip."""

    name: str
    unit: str
    values: tuple[float, ...]


def main(quick: bool, file: Path | None = None) -> None:
    """Print the predictions. quick: write no file. file: where to write them instead of bench/results."""
    found, results = measured(FOLDER), []
    for title, rows in sections():
        results += present(title, list(rows), found)
    line = json_line("roofline", results)
    if not quick or file is not None:
        (file or FOLDER / "roofline.json").write_text(line + "\n")
    print(line)


def sections() -> Iterator[tuple[str, Iterator[Row]]]:
    """Return the tables, in order."""
    yield "The head's matmuls, TFLOP/s", matmuls()
    yield f"The head, {targets.GPU_SHAPE}, over its three bare matmuls", ratios(LARGE)
    yield f"Its parts with buffers of {MOST_BYTES / 1e9:.2g} GB, ms", head_parts(LARGE)
    yield "A small head, H=1024, over its three bare matmuls", ratios(SMALL_HEAD)
    yield "The targets of `mgrpo bench kernels`", kernel_targets()
    yield "A 0.6B model's forward and backward, micro-batch of `bench/gpu.sh bench`", model_speed()
    yield "Whole steps: 8 micro-batches, half of the tokens the agent's own", steps()


def on_all(name: str, unit: str, value: Callable[[Chip], float]) -> Row:
    """Return a row with the value on each chip."""
    return Row(name, unit, tuple(map(value, CHIPS)))


def matmuls() -> Iterator[Row]:
    """Predict what `bench/gpu/gemms.py` measures."""
    h, v = HEAD
    for rows in ROWS:
        shapes: dict[str, tuple[tuple[int, int, int], int, bool]] = {
            "X W^T": ((rows, v, h), F32, False),
            "G W": ((rows, h, v), BF16, False),
            "G^T X, written": ((v, h, rows), F32, False),
            "G^T X, added": ((v, h, rows), F32, True),
        }
        for name, (shape, out, add) in shapes.items():

            def rate(chip: Chip, shape=shape, out=out, add=add) -> float:  # type: ignore[no-untyped-def]
                return float(2 * shape[0] * shape[1] * shape[2] / chip.matmul(*shape, out=out, add=add) / 1e12)

            yield on_all(f"matmuls: {rows} rows, {name}", "TFLOP/s", rate)


def ratios(case: HeadCase) -> Iterator[Row]:
    """Predict the head with buffers of several sizes, and with what is not built yet."""
    of = "" if case == LARGE else f"H={case.width}, "
    for times in TIMES:
        sized = replace(case, buffers=times * LEAST_BYTES)
        name = f"the loss in chunks: {of}buffers {times} times as large"
        yield on_all(f"{name}: time over three matmuls", "x", lambda chip, sized=sized: over_bare(chip, sized))  # type: ignore[misc]
        yield on_all(f"{name}: extra memory", "GB", lambda chip, sized=sized: memory(sized) / 1e9)  # type: ignore[misc]
    more = {
        "dW summed in the master": replace(case, master=True),
        "statistics in the matmul's epilogue (not built)": replace(case, epilogue=True),
        "both": replace(case, epilogue=True, master=True),
    }
    for name, changed in more.items():
        yield on_all(f"{of}{name}", "x", lambda chip, changed=changed: over_bare(chip, changed))  # type: ignore[misc]


def head_parts(case: HeadCase) -> Iterator[Row]:
    """Predict each part of the head, beside the three matmuls."""
    yield on_all("three bare matmuls", "ms", lambda chip: 1e3 * bare(chip, case))
    for part in head(CHIPS[0], case):
        yield on_all(part, "ms", lambda chip, part=part: 1e3 * head(chip, case)[part])  # type: ignore[misc]
    yield on_all("all", "ms", lambda chip: 1e3 * total(head(chip, case)))


def kernel_targets() -> Iterator[Row]:
    """Predict the figures that `mgrpo bench kernels` has targets for on a GPU."""
    yield on_all(targets.GEMMS.name, "x", lambda chip: over_bare(chip, LARGE))
    yield on_all(targets.MEMORY.name, "GB", lambda chip: memory(LARGE) / 1e9)
    yield on_all(targets.QUARTER.name, "x", lambda chip: quarter(chip, LARGE))
    yield on_all(targets.BANDWIDTH.name, "%", lambda chip: 100 * logits_share(chip, *targets.GPU_LOGITS))


def model_speed() -> Iterator[Row]:
    """Predict what `bench/gpu/model.py` measures, whose layers are eager, or compiled to few passes."""
    from mgrpo.bench.gpu.model import LENGTHS as lengths

    squares = sum(length**2 for length in lengths)
    for name, fused in (("as it is written", False), ("with compiled layers", True)):
        case = StepCase(QWEN3_06B, sum(lengths), squares // sum(lengths), batches=1, fused=fused)

        def speed(chip: Chip, case: StepCase = case) -> float:
            parts = step(chip, case)
            return tokens_per_second(case, parts | {"optimizer": 0.0})

        yield on_all(f"a model's forward and backward: {name}: tokens/s", "tokens/s", speed)


def steps() -> Iterator[Row]:
    """Predict whole steps: tokens/s, MFU as a share of the sustained rate, and the share of what is not matmuls."""
    for model, sizes in MODELS.items():
        yield on_all(f"{model}: launches of an eager layer", "", lambda chip, s=sizes: eager_layer(s, 128).launches)  # type: ignore[misc]
        for length in LENGTHS:
            for fused in (False, True):
                case = StepCase(sizes, max(16384, length), length, fused=fused)
                yield from _step_rows(f"{model}, sequences of {length}, {'fused' if fused else 'eager'} layers", case)


def _step_rows(name: str, case: StepCase) -> Iterator[Row]:
    parts = {chip: step(chip, case) for chip in CHIPS}
    yield on_all(f"{name}: tokens/s", "tokens/s", lambda chip: tokens_per_second(case, parts[chip]))
    yield on_all(f"{name}: MFU", "%", lambda chip: 100 * useful_flop(case) / total(parts[chip]) / chip.rate)
    for part in ("attention", "norms, RoPE, SwiGLU, sums", "head"):
        yield on_all(f"{name}: {part}", "%", lambda chip, part=part: 100 * parts[chip][part] / total(parts[chip]))  # type: ignore[misc]


def measured(folder: Path) -> dict[str, str]:
    """Return what files gpu-*.json in a folder say was measured: the value and the GPU, by name."""
    found: dict[str, str] = {}
    for file in sorted(folder.glob("gpu-*.json")):
        kept = json.loads(file.read_text())
        where = kept["machine"].split(",")[0]
        found |= {r["name"]: f"{r['value']:.4g} on {where}" for r in kept["results"] if r["value"] is not None}
    return found


def present(title: str, rows: list[Row], found: dict[str, str]) -> list[Result]:
    """Print a table, and return its predictions as results, one for each chip."""
    lines = [
        (row.name, *(f"{value:.4g}" for value in row.values), f"{row.unit} {found.get(row.name, '')}".strip())
        for row in rows
    ]
    show(f"\n{title}", ("predicted", *(chip.name for chip in CHIPS), "unit, measured"), lines)
    return [
        Result(f"{chip.name}, {row.name}", value, row.unit)
        for row in rows
        for chip, value in zip(CHIPS, row.values, strict=True)
    ]
