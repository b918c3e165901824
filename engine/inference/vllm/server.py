"""A server of our own: its command as a task of the supervisor, or in place of this process; its port, its token."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.inference.vllm.auth import TOKEN
from mgrpo.engine.system.supervisor import ProcessSpec

HOST = "127.0.0.1"


def token() -> str:
    """That of this run's servers, from the environment, where it is put if it is not there: children inherit it."""
    return os.environ.setdefault(TOKEN, secrets.token_urlsafe(32))


def new_seed() -> int:
    return secrets.randbelow(2**31)


def free_ports(count: int) -> list[int]:
    """So many ports of the loopback interface that nobody listens at."""
    with ExitStack() as held:
        listeners = [held.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def url(port: int) -> str:
    return f"http://{HOST}:{port}"


def become_server(model: str, *, transfer: str, **options: Any) -> NoReturn:
    """Run `adapter.arguments` in place of this process: a server for trainers elsewhere, which must know its token.

    Raises ValueError when this environment has no vLLM that is supported, no token, or transfer is none.
    """
    adapter.installed()
    adapter.check_transfer(transfer)
    if not os.environ.get(TOKEN):
        raise ValueError(f"{TOKEN} is not set: expected the token that trainers give for it")
    command = adapter.arguments(model, transfer=transfer, seed=new_seed(), **options)
    os.execve(command[0], command, os.environ | adapter.environment(transfer))


def server_task(
    name: str,
    model: str,
    port: int,
    *,
    dtype: str,
    max_context: int,
    transfer: str,
    gpus: Sequence[str] = (),
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    extra: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> ProcessSpec:
    """A server on this machine, to be started and watched. It begins, and begins again, with the model's own weights.

    gpus: those it may use, as CUDA_VISIBLE_DEVICES names them; none: its command decides. settings: more of its
    environment. Raises ValueError when this environment has no vLLM that is supported, or too few gpus are named.
    """
    adapter.installed()
    if gpus and len(gpus) != tensor_parallel * data_parallel:
        raise ValueError(
            f"server {name}: {len(gpus)} gpus: expected tensor_parallel * data_parallel = "
            f"{tensor_parallel * data_parallel}"
        )
    command = adapter.arguments(
        model,
        host=HOST,
        port=port,
        dtype=dtype,
        max_context=max_context,
        transfer=transfer,
        seed=new_seed(),
        tensor_parallel=tensor_parallel,
        data_parallel=data_parallel,
        extra=extra,
    )
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    environment = adapter.environment(transfer) | visible | dict(settings or {}) | {TOKEN: token()}
    return ProcessSpec(name, command, lambda attempt: [environment], service=True)
