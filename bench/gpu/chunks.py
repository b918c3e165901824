"""Measure the linear loss with small and large buffers beside the three bare matmuls, and where its time goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mgrpo.bench.gpu.gemms import HEAD
from mgrpo.bench.gpu.session import Session
from mgrpo.bench.harness import extra_bytes, interleave, summed
from mgrpo.bench.kernels.inputs import linear_inputs
from mgrpo.bench.kernels.peers import ours_linear
from mgrpo.bench.kernels.run import bare_gemms
from mgrpo.kernels.triton import buffers

TIMES = (1, 2, 4, 7, 12)  # the buffers' sizes, as multiples of the least
ROWS = 8192


def settings(session: Session) -> None:
    """Measure time over the bare matmuls and extra memory at each size of the buffers, and profile the first."""
    width, vocabulary = HEAD if session.on_gpu else (64, 500)
    inputs = linear_inputs(ROWS if session.on_gpu else 512, width, vocabulary, session.device)
    bare = bare_gemms(inputs)
    for times in TIMES:
        with _buffers(times):
            extra = extra_bytes(lambda: ours_linear(inputs), session.device)
            timings = interleave({**bare, "ours": lambda: ours_linear(inputs)}, rounds=3, device=session.device)
        floor = summed(timings[name] for name in bare)
        session.add(f"buffers {times} times as large: time over three matmuls", timings["ours"].over(floor), "x")
        session.add(f"buffers {times} times as large: extra memory", extra / 1e9, "GB")
    _profile(session, lambda: ours_linear(inputs))


@contextmanager
def _buffers(times: int) -> Iterator[None]:
    """Fix the size of the buffers of logits and of their gradient, however much memory is free."""
    before = buffers.buffer_bytes
    buffers.buffer_bytes = lambda *_: times * buffers.LEAST_BYTES
    try:
        yield
    finally:
        buffers.buffer_bytes = before


def _profile(session: Session, run: object) -> None:
    """Add the time of the ten kernels (on a CPU: operations) that take longest."""
    assert callable(run)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if session.on_gpu else [])]) as profile:
        run()
        if session.on_gpu:
            torch.cuda.synchronize()

    def own(event: object) -> float:
        return float(getattr(event, "self_device_time_total" if session.on_gpu else "self_cpu_time_total"))

    for event in sorted(profile.key_averages(), key=own, reverse=True)[:10]:
        session.add(f"profile, {event.count} times {event.key[:60]}", own(event) / 1e3, "ms")
