"""`mgrpo bench rollout`: measures episodes and tokens per second, with the in-process sampler and with a vLLM server.

The agent has a tool: an episode is a prompt, a turn of TURN tokens, the tool's output and another turn. A turn usually
ends only because of its length. The weights are random, of SmolLM2-135M's shape (--quick: tiny). Both samplers compute
on this machine's CPU or GPU, one after the other.

The cost of our client is compared with a minimal client, which sends as many requests of the same lengths over the same
kind of connections and discards the answers. The two run in turns. This replaces `vllm bench serve`, a command that
vLLM's build for CPUs lacks.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo.bench.harness import Result, figure, interleave, report
from mgrpo.engine.config.schema import Config, parse_config
from mgrpo.engine.environment.base import Environment
from mgrpo.engine.inference.in_process import InProcessSampler
from mgrpo.engine.inference.manifest import manifest_of
from mgrpo.engine.inference.sampler import Sampler
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.inference.vllm.client import VLLMSampler
from mgrpo.engine.inference.vllm.router import TICK
from mgrpo.engine.inference.vllm.server import free_ports, server_spec, token, url
from mgrpo.engine.inference.vllm.weight_transfer import Transfer
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer, pick_device
from mgrpo.engine.rollout.episodes import Episodes, Job, Rollout
from mgrpo.engine.system.supervisor import Supervised
from mgrpo.engine.types import INITIAL_WEIGHTS, Action, Answer, Call, Episode, Score, Task, ToolCall, WeightsVersion

PROMPT, TURN, OBSERVATION = 128, 32, 32  # tokens
SCALING, QUICK_SCALING = (1, 16, 64, 256), (1, 16)  # episodes at a time
FEWEST = 4  # least number of episodes of a run
ROUNDS, QUICK_ROUNDS = 3, 2
WARM = 16  # episodes at a time in the warm-up
OVERHEAD = 1.05  # target: our client's time over the minimal one's
STALL_AT = 64  # turns that run during a weight update
UNDER_WAY = 20  # messages of the server to wait for before the update
UPDATE = 1.0  # target: seconds of a weight update
START = 600.0  # limit for the server's start, in seconds
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
} | {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 1024} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Tool(Environment):
    """Play one turn, a tool call and one turn."""

    def prompt(self, call: Call) -> str:
        return f"{call.task.id:{PROMPT}}"

    def parse(self, call: Call, text: str) -> Action:
        return (ToolCall("tool", ""),) if not call.turns else Answer(text)

    def tool(self, call: Call, use: ToolCall) -> str:
        return "x" * (OBSERVATION - 1)

    def score(self, episode: Episode) -> Score:
        return Score(True, 1.0)


def main(quick: bool) -> None:
    """Measure and print; without vLLM the figures that need it are null."""
    scaling, rounds = (QUICK_SCALING, QUICK_ROUNDS) if quick else (SCALING, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        config = make(Path(folder), TINY if quick else SMOLLM2, max(scaling))
        print(f"\nepisodes of {PROMPT} + {TURN} + {OBSERVATION} + {TURN} tokens", flush=True)
        results = throughput("in process", config, lambda count: in_process(config, count), scaling)
        try:
            api.installed()
        except ValueError as error:
            results += with_server([None] * len(SERVED), str(error))
        else:
            results += served(config, Path(folder), scaling, rounds)
    report("rollout", results, pick_device(config.compute))


SERVED: dict[str, tuple[str, float | None]] = {  # unit and target, an upper bound
    "our client over the least one": ("x", OVERHEAD),
    "weight update": ("s", UPDATE),
    "of it the server paused": ("s", None),
    "no token around a weight update": ("s", None),
}


def with_server(values: Sequence[float | None], why: str | None = None) -> list[Result]:
    """Return the results of SERVED."""
    return [
        figure(name, value, unit, at_most=at_most, why=why)
        for (name, (unit, at_most)), value in zip(SERVED.items(), values, strict=True)
    ]


def make(folder: Path, shape: dict[str, Any], concurrency: int) -> Config:
    """Save a model of random weights whose tokens are letters, and return the config of one agent."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<eos>", *letters, *(f"w{n}" for n in range(shape["vocab_size"] - len(letters) - 1))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    ends: dict[str, Any] = {
        "eos_token_id": 0,
        "bos_token_id": None,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    LlamaForCausalLM(LlamaConfig(**shape, **ends, dtype=torch.bfloat16)).bfloat16().save_pretrained(folder)
    limits = {"max_new_tokens": TURN, "max_turns": 2, "max_context": PROMPT + 2 * TURN + OBSERVATION}
    agent = {"model": str(folder), "vllm": {"urls": ["http://127.0.0.1:1"]}, **limits}
    raw = {"run_dir": str(folder / "run"), "environment": {"use": "bench:Tool"}, "agents": {"main": agent}}
    raw |= {"topology": "local", "algorithm": {"sampler_cap": 2.0}, "compute": {"concurrency": concurrency}}
    return parse_config(raw)


def in_process(config: Config, count: int) -> InProcessSampler:
    """Make the in-process sampler."""
    agent = config.agents["main"]
    model = load_model("main", agent, config.compute).requires_grad_(False)
    return InProcessSampler(model, load_tokenizer("main", agent), agent, count)


def run(config: Config, sampler: Sampler, count: int) -> tuple[float, float]:
    """Return episodes and tokens per second of `count` episodes at a time, as in a training step; at least FEWEST."""
    jobs, ended = iter([Job(query, 0, Task(str(query), {})) for query in range(max(count, FEWEST))]), list[Rollout]()
    began = time.perf_counter()
    Episodes(config, Tool(), {"main": sampler}).stream(
        lambda running: list(islice(jobs, count - running)), ended.append
    )
    seconds = time.perf_counter() - began
    assert len(ended) == max(count, FEWEST) and all(rollout.status == "scored" for rollout in ended)
    tokens = sum(int(made.sampled.sum()) for rollout in ended for made in rollout.trajectories if made)
    return len(ended) / seconds, tokens / seconds


def throughput(kind: str, config: Config, made: Callable[[int], Sampler], scaling: Sequence[int]) -> list[Result]:
    """Measure samplers that `made` makes for each number of episodes at a time; print each figure at once."""
    results = []
    for count in scaling:
        name = f"{kind}, {count} at a time"
        episodes, tokens = run(config, made(count), count)
        print(f"{name}: {episodes:.4g} episodes/s, {tokens:.4g} tokens/s", flush=True)
        results += [figure(f"{name}: episodes", episodes, "episodes/s"), figure(f"{name}: tokens", tokens, "tokens/s")]
    return results


# ---- with a server


def served(config: Config, folder: Path, scaling: Sequence[int], rounds: int) -> list[Result]:
    """Measure with a vLLM server."""
    with server(config, folder) as (sampler, transfer):
        run(config, sampler, min(WARM, max(scaling)))  # the server allocates and compiles at first
        results = throughput("vLLM", config, lambda count: sampler, scaling)
        times = overhead(config, sampler, min(STALL_AT, max(scaling)), rounds)
        seconds, silence = update(config, sampler, transfer, min(STALL_AT, max(scaling)))
    return results + with_server([times, seconds, transfer.stalled, silence])


@contextmanager
def server(config: Config, folder: Path) -> Iterator[tuple[VLLMSampler, Transfer]]:
    """Start a server with the config's model and first weights; yield its sampler and its weight transfer."""
    agent, port = config.agents["main"], free_ports(1)[0]
    kind = "tcp" if pick_device(config.compute).type == "cpu" else "ipc"
    settings = {"VLLM_CPU_KVCACHE_SPACE": "2"}
    task = server_spec(
        "server", agent.model, port, dtype="bfloat16", max_context=agent.max_context, transfer=kind, settings=settings
    )
    lifeline = os.pipe()  # the server ends when this process does, in any way
    process = Supervised(task, folder, lifeline[0])
    process.start(attempts=1)
    sampler = VLLMSampler("main", agent, load_tokenizer("main", agent), [url(port)], config.compute.concurrency)
    try:
        model = load_model("main", agent, config.compute)
        transfer = Transfer([url(port)], token(), kind, manifest_of(dict(model.named_parameters())))
        give_up = time.monotonic() + START
        while not transfer.behind():  # until the server answers
            if (member := process.failed()) or time.monotonic() > give_up:
                raise RuntimeError(f"the server did not start: {(member or process.members[0]).last_lines()}")
            time.sleep(TICK)
        assert transfer.update(model.named_parameters(), INITIAL_WEIGHTS)
        while sampler.version != INITIAL_WEIGHTS:
            time.sleep(TICK)
        yield sampler, transfer
    finally:
        sampler.stop()
        process.kill()
        for end in lifeline:
            os.close(end)


def overhead(config: Config, sampler: VLLMSampler, count: int, rounds: int) -> float:
    """Return the episodes' time divided by that of a minimal client, which discards the answers."""

    async def minimal() -> None:
        room = asyncio.Semaphore(count)

        async def episode(number: int) -> None:
            async with room:
                for length in (PROMPT, PROMPT + TURN + OBSERVATION):
                    tokens = [1 + (number + at) % 200 for at in range(length)]
                    body = api.generate_body(tokens, max_tokens=TURN, temperature=1.0, top_p=1.0, stop=[], ends=[0])
                    async with sampler.router.post(sampler.router.servers[0], api.GENERATE, body) as response:
                        await response.read()

        async with asyncio.TaskGroup() as group:
            for number in range(max(count, FEWEST)):
                group.create_task(episode(number))

    candidates = {"ours": lambda: run(config, sampler, count), "minimal": lambda: sampler.wait(minimal())}
    timings = interleave(candidates, rounds=rounds)
    return timings["ours"].over(timings["minimal"])


def update(config: Config, sampler: VLLMSampler, transfer: Transfer, count: int) -> tuple[float, float]:
    """Update the weights while `count` turns run; return the seconds of the update and those without a token.

    The latter exceed the server's pause, because the cached tokens of the running turns are computed again first.
    """
    model, server = load_model("main", config.agents["main"], config.compute), sampler.router.servers[0]
    heard, over = [0.0], False

    def load() -> None:
        while not over:
            run(config, sampler, count)

    def listen(enough: Callable[[], bool]) -> None:
        while not enough():
            assert thread.is_alive(), "the episodes ended"
            if server.heard != heard[-1]:
                heard.append(server.heard)
            time.sleep(0.001)

    thread = threading.Thread(target=load)
    thread.start()
    listen(lambda: len(heard) > UNDER_WAY)
    began = time.monotonic()
    assert transfer.update(model.named_parameters(), WeightsVersion(1, 1))
    before, ended = server.heard, time.monotonic()
    listen(lambda: heard[-1] > ended)
    over = True
    thread.join()
    return ended - began, heard[-1] - before
