"""Start vLLM servers: as a process of the supervisor, or in place of this process; choose their ports and token."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from secrets import randbelow, token_urlsafe
from typing import Any, NoReturn

from mgrpo.engine.config.masks import check_server
from mgrpo.engine.config.schema import AgentConfig
from mgrpo.engine.hub.snapshots import folder
from mgrpo.engine.inference.vllm import api
from mgrpo.engine.inference.vllm.auth import TOKEN
from mgrpo.engine.system import secrets
from mgrpo.engine.system.supervisor import ProcessSpec

HOST = "127.0.0.1"


def token() -> str:
    """Return the token of this run's servers, which the supervisor passes to all processes. Make it if missing."""
    return secrets.keep(TOKEN, token_urlsafe(32))


def new_seed() -> int:
    """Return a random seed for a server."""
    return randbelow(2**31)


def free_ports(count: int) -> list[int]:
    """Return that many free ports of the loopback interface."""
    with ExitStack() as held:
        listeners = [held.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def url(port: int) -> str:
    """Return the URL of a server on this machine."""
    return f"http://{HOST}:{port}"


def become_server(model: str, *, transfer: str, revision: str = "", **options: Any) -> NoReturn:
    """Replace this process by the server of `api.arguments`, for trainers elsewhere, which must know its token.

    revision: of a model on a hub, which is fetched. Raises ValueError if this environment has no supported vLLM or no
    token, if there is no such transfer, or if an argument would change the distribution that is sampled.
    """
    check_server(options.get("extra", ()), "serve")
    api.installed()
    api.check_transfer(transfer)
    if not secrets.get(TOKEN):
        raise ValueError(f"{TOKEN} is not set: expected the token that trainers will send")
    found = folder("", AgentConfig(model=model, revision=revision), weights=True)
    command = api.arguments(str(found), transfer=transfer, seed=new_seed(), **options)
    inherited = {key: value for key, value in os.environ.items() if key not in secrets.NAMES}
    with secrets.passed([TOKEN]) as (where, pipe):
        for end in pipe:
            os.set_inheritable(end, True)
        os.execve(command[0], command, inherited | api.environment(transfer) | where)


def server_spec(
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
    """Describe a server on this machine for the supervisor. Each start of it begins with the model's own weights.

    gpus: the GPUs it may use, as CUDA_VISIBLE_DEVICES names them; if empty, its command decides. settings: further
    environment variables. Raises ValueError if this environment has no supported vLLM, or if the number of GPUs differs
    from tensor_parallel * data_parallel.
    """
    api.installed()
    if gpus and len(gpus) != tensor_parallel * data_parallel:
        raise ValueError(
            f"server {name}: {len(gpus)} gpus given: expected tensor_parallel * data_parallel = "
            f"{tensor_parallel * data_parallel}"
        )
    command = api.arguments(
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
    environment = api.environment(transfer) | visible | dict(settings or {})
    token()  # so that there is one before the first process starts
    return ProcessSpec(name, command, lambda attempt: [environment], service=True, secret_names=[TOKEN])
