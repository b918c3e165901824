"""Draw the bar chart of `mgrpo bench step`: the seconds of every row, one panel per case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mgrpo.bench.step.measure import TRL, Measured
from mgrpo.bench.step.usual import OURS, USUAL

COLOURS = {OURS: "tab:green", USUAL: "tab:red", TRL: "tab:orange"}


def draw(found: Sequence[Measured], to: Path) -> None:
    """Draw all cases into a PNG file."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(7 * ((len(found) + 1) // 2), 7), layout="constrained")
    for panel, one in zip(page.subplots(2, (len(found) + 1) // 2, squeeze=False).flat, found, strict=False):
        rows = {name: row.timing for name, row in one.rows.items() if row.timing}
        names = list(reversed(rows))
        bars = panel.barh(
            names, [rows[name].seconds for name in names], color=[COLOURS.get(name, "tab:blue") for name in names]
        )
        if USUAL in rows:
            panel.bar_label(bars, [f" {rows[USUAL].over(rows[name]):.1f}x" for name in names])
        panel.set(xlabel="seconds of a step", title=f"{one.case.name}: {one.tokens} useful tokens")
        panel.margins(x=0.12)
    to.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(to, dpi=150)
