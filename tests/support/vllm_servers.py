"""Run real vLLM servers for tests, with a trainer that sends them weights, and send them requests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mgrpo.engine.config.schema import AgentConfig, ComputeConfig
from mgrpo.engine.inference.manifest import manifest_of
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.inference.vllm.server import free_ports, server_spec, token, url
from mgrpo.engine.inference.vllm.weight_transfer import Transfer
from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.system import secrets
from mgrpo.engine.types import WeightsVersion

CONTEXT = 256
START = 600.0  # seconds that a server may take to start, on a busy machine
QUICK = ("--enforce-eager", "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(1 << 27))


class RunningServer:
    """Run one server's processes, which tests kill, stop and start again at the same port."""

    def __init__(self, model: Path, dtype: str, log: Path):
        self.port, self.log = free_ports(1)[0], log
        self.url = url(self.port)
        self.task = server_spec(
            "server",
            str(model),
            self.port,
            dtype=dtype,
            max_context=CONTEXT,
            transfer="tcp",
            extra=QUICK,
        )
        self.start()

    def start(self) -> None:
        inherited = {**os.environ, **self.task.environments(0)[0]}
        with self.log.open("ab") as out, secrets.passed(self.task.secret_names) as (where, pipe):
            self.process = subprocess.Popen(
                self.task.command,
                env=inherited | where,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,
                pass_fds=pipe,
            )

    def wait(self) -> None:
        until = time.monotonic() + START
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            with suppress(OSError):
                if ask(self.url, "GET", api.HEALTH)[0] == 200:
                    return
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-4000:])

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(*servers: RunningServer) -> Iterator[None]:
    """Wait until all servers answer, and end them at the end."""
    try:
        for server in servers:
            server.wait()
        yield
    finally:
        for server in servers:
            server.kill()


def ask(at: str, method: str, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, Any]:
    host, _, port = at.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
    try:
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
        return response.status, json.loads(data) if data else None
    finally:
        connection.close()


def scores(at: str, tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Return the server's log p of each token but the first."""

    def one(position: int) -> float:
        status, body = ask(at, "POST", api.GENERATE, api.score_body(tokens, position, temperature))
        assert status == 200, body
        return api.read_score(body, tokens[position])

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, range(1, len(tokens))))


class Stream:
    """Sample a turn in its own thread. Record all chunks, each with the last label of the stream before it."""

    def __init__(self, at: str, tokens: Sequence[int], **options: Any):
        defaults = {"max_tokens": 100, "temperature": 1.0, "top_p": 1.0, "stop": [], "ends": [0]}
        self.at, self.prompt = at, list(tokens)
        self.body = api.generate_body(tokens, **defaults | options)
        self.chunks: list[tuple[str, api.Chunk]] = []
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.label, self.error = "", None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        host, _, port = self.at.removeprefix("http://").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=120)
        try:
            connection.request("POST", api.GENERATE, json.dumps(self.body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            self.label = response.headers[api.LABEL_HEADER]
            for line in response:
                self._take(api.read_line(line))
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        finally:
            connection.close()

    def _take(self, chunk: api.Chunk | None) -> None:
        if chunk is None:
            return
        if chunk.label is not None:
            self.label = chunk.label
            return
        self.chunks.append((self.label, chunk))
        self.tokens += chunk.tokens
        self.logprobs += chunk.logprobs

    @property
    def last(self) -> api.Chunk:
        self.thread.join(180)
        assert self.error is None and self.chunks, self.error
        return self.chunks[-1][1]


class Trainer:
    """Hold a policy whose weights move a little at every step, in place of one that learns."""

    def __init__(self, model: Path, dtype: str, temperature: float = 1.0):
        self.folder = model
        agent = AgentConfig(model=str(model), temperature=temperature, max_context=CONTEXT)
        self.policy = Policy("main", agent, ComputeConfig(dtype=dtype, device="cpu"))
        self.manifest = manifest_of(self.policy.masters.params, self.policy.dtype)

    @torch.no_grad()
    def step(self, size: float) -> None:
        """Move the weights at random. size: of the change, relative to the weights' standard deviation."""
        for weight in self.policy.masters.weights.values():
            weight += size * weight.std().nan_to_num(0.0) * torch.randn_like(weight)
        self.policy.masters.publish()
        self.policy.version += 1

    def transfer(self, *servers: RunningServer, timeout: float = 60.0) -> Transfer:
        return Transfer([server.url for server in servers], token(), "tcp", self.manifest, timeout)

    def push(self, transfer: Transfer) -> list[str]:
        version = WeightsVersion(self.policy.version, self.policy.version)
        return transfer.update(self.policy.full_weights(), version)

    @torch.no_grad()
    def rounding(self, tokens: Sequence[int]) -> float:
        """Return the mean absolute difference of its log-probs to those of the same weights in float32, in nats.

        Two ways of rounding to bfloat16 are further apart than either is from the truth.
        """
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        parameters = dict(model.named_parameters())
        for name, weight in self.policy.full_weights():
            parameters[name].copy_(weight)
        logits_TV = model(torch.tensor([tokens])).logits[0, :-1] / self.policy.agent.temperature
        truth_T = logits_TV.log_softmax(-1).gather(-1, torch.tensor(tokens)[1:, None])[:, 0]
        return float((truth_T - torch.tensor(self.policy.logprobs(tokens))).abs().mean())

    def gap(self, server: RunningServer, tokens: Sequence[int]) -> float:
        """Return the mean absolute difference between the log-probs of trainer and server, in nats."""
        pairs = zip(
            self.policy.logprobs(tokens), scores(server.url, tokens, self.policy.agent.temperature), strict=True
        )
        return sum(abs(one - other) for one, other in pairs) / (len(tokens) - 1)
