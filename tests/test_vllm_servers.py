"""Real vLLM servers on this machine: log-probs after updates, updates while calls run, and every way to fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mgrpo.engine.sampler.transfer import Transfer
from mgrpo.engine.serving import adapter
from mgrpo.engine.serving.server import token
from toy import make_model

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
from vllm_servers import RunningServer, Stream, Trainer, ask, running

pytestmark = pytest.mark.vllm

LIMIT = {"float32": 0.002, "bfloat16": 0.02}
TOKENS = np.random.default_rng(0).integers(1, 257, 40).tolist()
SMOLLM2 = Path(os.environ.get("MGRPO_TEST_SMOLLM2", "runs/geography/data/smollm2"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether their heads are tied."""
    return {tie: make_model(tmp_path_factory.mktemp("model"), tie=tie) for tie in (True, False)}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def servers(models: dict[bool, Path], logs: Path) -> Iterator[dict[tuple[str, bool], RunningServer]]:
    """One for each dtype and kind of head."""
    kinds = [(dtype, tie) for dtype in ("float32", "bfloat16") for tie in (True, False)]
    found = {(dtype, tie): RunningServer(models[tie], dtype, logs / f"{dtype}-{tie}.txt") for dtype, tie in kinds}
    with running(*found.values()):
        yield found


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_every_update_the_server_scores_as_the_trainer(servers, models, dtype: str, tie: bool, record_property):
    server, trainer = servers[dtype, tie], Trainer(models[tie], dtype, temperature=0.8)
    transfer, gaps = trainer.transfer(server), []
    for _ in range(10):
        trainer.step(0.3)
        assert trainer.gap(server, TOKENS) > 0.1, "weights that have not moved would prove nothing"
        assert trainer.push(transfer) == [server.url]
        gaps.append(trainer.gap(server, TOKENS))
    record_property("measured", f"gap after each of 10 updates, {dtype}, {tie=}: at most {max(gaps):.2g} nats")
    assert max(gaps) <= LIMIT[dtype]
