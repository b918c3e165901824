"""Play sessions side by side on servers, fake or real."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mgrpo.engine.inference.sampler import Completion, Session
from mgrpo.engine.inference.vllm.client import VLLMSampler


def play(
    sampler: VLLMSampler, sessions: Sequence[Session], turns: int = 1, seconds: float = 30.0
) -> list[list[Completion]]:
    """Sample turns of all sessions, and show them three tokens between turns. Raises TimeoutError after `seconds`."""

    async def one(session: Session) -> list[Completion]:
        done = [await sampler.act(session)]
        for turn in range(1, turns):
            session.append([turn, 7, 8])
            done.append(await sampler.act(session))
        sampler.close(session)
        return done

    async def all_of_them() -> list[list[Completion]]:
        async with asyncio.timeout(seconds):
            return await asyncio.gather(*map(one, sessions))

    return asyncio.run(all_of_them())
