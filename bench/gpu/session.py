"""Hold the results of one command on a GPU, in a file that is complete after every case."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mgrpo.bench.harness import Result, figure, json_line


@dataclass
class Session:
    """Hold the device, the results so far, and the names of the cases that failed."""

    name: str
    device: torch.device
    file: Path
    results: list[Result] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    case: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether the figures mean anything; otherwise this is a rehearsal on a CPU, on small shapes."""
        return self.device.type == "cuda"

    def run(self, name: str, work: Callable[[Session], None]) -> None:
        """Run a case; whatever it raises is a result, and the next case runs all the same."""
        self.case, started = name, time.monotonic()
        try:
            work(self)
        except ModuleNotFoundError as missing:
            self.add("left out", None, "", why=f"{missing.name} is not installed")
        except Exception as error:  # of any kind: on a machine that is lent for minutes nothing may end the others
            traceback.print_exc()
            self.failed.append(name)
            self.add("failed", None, "", why=f"{type(error).__name__}: {str(error).splitlines()[:1]}")
        self.add("time", time.monotonic() - started, "s")
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def add(
        self, what: str, value: float | None, unit: str, *, at_most: float | None = None, why: str | None = None
    ) -> None:
        """Add a result of the running case, print it, and write the file."""
        result = figure(f"{self.case}: {what}", value, unit, at_most=at_most, why=why)
        self.results.append(result)
        shown = why if value is None else f"{value:.4g} {unit}"
        print(f"{result.name}: {shown}" + ("  MISSED" if result.met is False else ""), flush=True)
        if result.met is False and unit == "relative":
            self.failed.append(self.case)
        self.file.write_text(json_line(self.name, self.results, self.device) + "\n")

    def near(self, what: str, got: Tensor, truth: Tensor, limit: float) -> None:
        """Add how far a result is from its reference, in the 2-norm, as a share of that; it must be at most `limit`."""
        got, truth = (x.detach().double().cpu() for x in (got, truth))
        distance = float((got - truth).norm() / truth.norm().clamp(min=1e-30))
        self.add(what, distance if distance == distance else float("inf"), "relative", at_most=limit)
