"""Nonsense in a vLLM server's answer ends the worker, where the turn should go on at another server.

Two kinds of some fifty do so: an event of deeply nested JSON (RecursionError) and an empty list of weight_versions
("not enough values to unpack"). A third is believed: a version that no trainer has ever published is recorded, so that
its tokens never count as stale (sampling.max_staleness).
"""

import asyncio
import logging

from fake_vllm import FakeVLLM
from mgrpo.engine.config.schema import parse_config
from mgrpo.engine.inference.sampler import Session
from mgrpo.engine.inference.vllm.client import VLLMSampler
from mgrpo.engine.model.causal_lm import load_tokenizer
from mgrpo.engine.types import INITIAL_WEIGHTS
from reproduction import cannot, fault, held
from reproduction.runs import new_folder, wait_for
from toy import make_model, raw_config

logging.getLogger("mgrpo").setLevel(logging.CRITICAL)
logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
LIES = {
    "nested JSON": lambda choice, count: b"data: " + b"[" * 100_000 + b"\n\n",
    "weight_versions: []": lambda choice, count: choice | {"weight_versions": []},
    "a version from nowhere": lambda choice, count: (
        choice | {"weight_versions": [{"version": "999999/99999", "start": 0, "end": 99}]}
    ),
}
folder = new_folder()
make_model(folder / "model")
base = raw_config(folder, topology="cluster", algorithm={"sampler_cap": 2.0})
base["agents"]["main"] |= {"vllm": {"urls": ["http://127.0.0.1:1"], "timeout": 2.0, "patience": 5.0}, "stop": []}
agent = parse_config(base).agents["main"]
tokenizer = load_tokenizer("main", agent)


def turn(lie=None) -> Session:
    """Sample a turn that begins at a server which tells a lie; another, honest one is there too."""
    lying, good = (FakeVLLM(tokenizer, endless=True) for _ in range(2))
    sampler = VLLMSampler("main", agent, tokenizer, [lying.url, good.url], 4)
    sampler.expect(INITIAL_WEIGHTS)
    wait_for(lambda: len(sampler.router.ready()) == 2, 30)
    if lie:
        lying.misdeeds.append(("lie", lie))

    async def one() -> Session:
        session = Session((0,))
        session.append(tokenizer.encode("hello\n"))
        sampler.homes[id(session)] = sampler.router.servers[0]
        await asyncio.wait_for(sampler.act(session), 15)
        return session

    try:
        return asyncio.run(one())
    finally:
        sampler.stop()
        lying.kill()
        good.kill()


if turn().oldest != INITIAL_WEIGHTS:
    cannot("a turn of honest servers was not of their weights")
bad = []
for what, lie in LIES.items():
    try:
        session = turn(lie)
        if session.oldest > INITIAL_WEIGHTS:
            bad.append(f"{what}: recorded as sampled by weights {session.oldest}; {INITIAL_WEIGHTS} are the newest")
    except Exception as error:
        bad.append(f"{what}: {type(error).__name__}: {str(error)[:80]}")
if bad:
    fault("; ".join(bad))
held("all went on elsewhere")
