"""Test the transfer of weights to fake servers: the calls, their order, and the state after failures."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fake_server import TOKEN, FakeServer, serve
from mgrpo.engine.inference.manifest import manifest_of
from mgrpo.engine.inference.vllm import api, tcp_frames, transfer_native, transfer_tcp
from mgrpo.engine.inference.vllm.control import ServerControl
from mgrpo.engine.inference.vllm.weight_transfer import Transfer
from mgrpo.engine.types import WeightsVersion

ONE_UPDATE = [api.START, api.UPDATE, api.PAUSE, api.FINISH, api.LABEL, api.RESUME]
FIRST = [api.WORKERS, api.WORLD, *ONE_UPDATE]
LATER = [api.WORLD, *ONE_UPDATE]


def some_weights(version: int) -> dict[str, Tensor]:
    torch.manual_seed(version)
    return {
        "embed.weight": torch.randn(7, 3),
        "norm.weight": torch.randn(3).to(torch.bfloat16),
        "none": torch.empty(0, 4),
        "scale": torch.randn(()),
        "transposed": torch.randn(4, 5).T,
    }


MANIFEST = manifest_of(some_weights(0))


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serve(FakeServer(workers))) for workers in (1, 2, 1)]


def transfer_to(servers: list[FakeServer], kind: str = "tcp", timeout: float = 5.0, **more: Any) -> Transfer:
    return Transfer([server.url for server in servers], more.get("token", TOKEN), kind, MANIFEST, timeout)


def update(transfer: Transfer, version: int) -> list[str]:
    return transfer.update(iter(some_weights(version).items()), WeightsVersion(version, version))


def has(server: FakeServer, version: int) -> bool:
    expected = some_weights(version)
    return (
        server.label == f"{version}/{version}"
        and all(
            found.keys() == expected.keys()
            and all(torch.equal(found[name], expected[name]) for name in expected)
            and all(found[name].dtype == expected[name].dtype for name in expected)
            for found in server.weights
        )
        and len(server.weights) == server.workers
    )


def test_every_worker_of_every_server_gets_the_weights_and_their_label(servers: list[FakeServer]):
    transfer = transfer_to(servers)
    assert transfer.behind() == [server.url for server in servers]
    for version in (1, 2, 5):
        assert update(transfer, version) == [server.url for server in servers]
        assert all(has(server, version) and not server.paused for server in servers)
        assert transfer.behind() == []
    assert all(server.calls == FIRST + LATER + LATER for server in servers)


def test_a_server_with_the_newest_weights_does_not_get_them_again(servers: list[FakeServer]):
    transfer = transfer_to(servers)
    update(transfer, 1)
    assert update(transfer, 1) == []
    assert all(server.calls == FIRST for server in servers)


def test_tensors_are_consumed_even_if_no_server_needs_them(servers: list[FakeServer]):
    """Each tensor may be a collective of all ranks."""
    transfer = transfer_to([])
    tensors = iter(some_weights(1).items())
    assert transfer.update(tensors, WeightsVersion(1, 1)) == [] and next(tensors, None) is None
    servers[0].misfit = "weight 'x' is missing"
    tensors = iter(some_weights(1).items())
    with pytest.raises(ValueError, match=rf"{servers[0].url}: weight 'x'"):
        transfer_to(servers).update(tensors, WeightsVersion(1, 1))
    assert next(tensors, None) is None and all(server.label == api.UNSET for server in servers)


@pytest.mark.parametrize("path", [api.START, api.UPDATE, api.PAUSE, api.FINISH])
@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_fails_is_left_out_and_not_left_paused(servers: list[FakeServer], path: str, status: int):
    transfer = transfer_to(servers, timeout=2.0)
    update(transfer, 1)
    servers[1].fails[path] = lambda: status
    assert update(transfer, 2) == [servers[0].url, servers[2].url]
    assert has(servers[1], 1) and not servers[1].paused and has(servers[0], 2) and has(servers[2], 2)
    assert transfer.behind() == [servers[1].url]
    del servers[1].fails[path]
    assert update(transfer, 2) == [servers[1].url] and has(servers[1], 2) and transfer.behind() == []


def test_a_server_that_cannot_be_labelled_is_resumed_and_behind(servers: list[FakeServer]):
    transfer = transfer_to(servers)
    update(transfer, 1)
    servers[0].acts = servers[0].acts | {api.LABEL: lambda self, body: (200, {"label": "1/1"})}
    assert update(transfer, 2) == [servers[1].url, servers[2].url]
    assert not servers[0].paused and transfer.behind() == [servers[0].url]


def test_a_dead_or_hanging_server_is_left_out(servers: list[FakeServer]):
    with serve(FakeServer()) as gone:
        pass
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        urls = [gone.url, f"http://127.0.0.1:{silent.getsockname()[1]}", servers[0].url]
        transfer = Transfer(urls, TOKEN, "tcp", MANIFEST, timeout=0.5)
        assert update(transfer, 1) == [servers[0].url] and has(servers[0], 1)
        assert transfer.behind() == []


def test_a_server_whose_connection_breaks_keeps_its_old_weights(servers: list[FakeServer]):
    transfer = transfer_to(servers)
    update(transfer, 1)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "big", torch.zeros(50_000_000, dtype=torch.uint8)
        yield from some_weights(2).items()

    def drops(request: Any) -> None:
        with closing(socket.create_connection((request["host"], request["port"]))) as connection:
            tcp_frames.send_secret(connection, request["secret"])

    servers[2].receive = drops  # type: ignore[method-assign]
    assert transfer.update(tensors(), WeightsVersion(2, 2)) == [servers[0].url, servers[1].url]
    assert has(servers[2], 1) and not servers[2].paused


def test_after_a_trainer_dies_in_an_update_servers_keep_their_weights(servers: list[FakeServer]):
    """Its tensors end in an error. No server has new weights, and the update of the next trainer succeeds."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from list(some_weights(2).items())[:2]
        raise KeyboardInterrupt

    update(transfer_to(servers), 1)
    with pytest.raises(KeyboardInterrupt):
        transfer_to(servers).update(tensors(), WeightsVersion(2, 2))
    assert all(has(server, 1) and not server.paused and server.open for server in servers)
    assert update(transfer_to(servers), 3) == [server.url for server in servers]
    assert all(has(server, 3) and not server.paused for server in servers)


def test_a_restarted_server_is_checked_and_updated(servers: list[FakeServer]):
    transfer = transfer_to(servers)
    update(transfer, 1)
    servers[0].label, servers[0].weights = api.UNSET, []
    assert transfer.behind() == [servers[0].url]
    assert update(transfer, 1) == [servers[0].url] and has(servers[0], 1)
    assert servers[0].calls == FIRST + FIRST and servers[1].calls == FIRST


def test_a_server_is_stalled_from_its_pause_until_it_resumes(servers: list[FakeServer]):
    def slow(server: FakeServer, body: Any) -> tuple[int, Any]:
        time.sleep(0.2)
        return server.finish(body)

    transfer = transfer_to(servers)
    assert transfer.stalled == 0.0 and transfer_to([]).stalled == 0.0
    servers[1].acts[api.FINISH] = slow
    update(transfer, 1)
    assert transfer.stalled >= 0.2


def test_a_restarted_trainer_resumes_servers_that_its_predecessor_left_paused(servers: list[FakeServer]):
    """The old trainer died after it labelled the weights and before it resumed the server, so the label is current."""
    update(transfer_to(servers), 1)
    servers[1].paused = True
    transfer = transfer_to(servers)
    assert update(transfer, 1) == [server.url for server in servers]
    assert not servers[1].paused and transfer.behind() == []


def test_another_version_of_vllm_is_refused(servers: list[FakeServer]):
    servers[1].version = "0.11.2"
    with pytest.raises(ValueError, match=rf"{servers[1].url} is vLLM 0\.11\.2: expected 0\.32"):
        update(transfer_to(servers), 1)
    assert not any(api.START in server.calls for server in servers)


def test_a_wrong_token_is_refused(servers: list[FakeServer]):
    with pytest.raises(ValueError, match="the token is wrong"):
        update(transfer_to(servers, token="another"), 1)
    assert not any(server.calls for server in servers)


def test_a_server_of_another_program_is_refused(servers: list[FakeServer]):
    servers[0].acts = {}
    with pytest.raises(ValueError, match=f"{servers[0].url} has no {api.LABEL}"):
        update(transfer_to(servers), 1)


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://host", "http://", "http://host/path"])
def test_an_invalid_url_is_refused(url: str):
    with pytest.raises(ValueError, match="expected http://host:port"):
        ServerControl(url, TOKEN, 1.0)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="transfer 'gloo': expected one of tcp, nccl, ipc"):
        Transfer([], TOKEN, "gloo", MANIFEST)


def test_a_connection_without_the_secret_is_closed(servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer_tcp, "GREETING", 0.2)
    receive = servers[0].receive

    def crowd(request: Any) -> None:
        for secret in (b"", b"x" * 64, b"short"):
            with (
                suppress(OSError),
                closing(socket.create_connection((request["host"], request["port"]), 5)) as stranger,
            ):
                stranger.sendall(secret)
                stranger.settimeout(5)
                assert stranger.recv(1) == b"", "a stranger was sent something"
        receive(request)

    servers[0].receive = crowd  # type: ignore[method-assign]
    assert len(update(transfer_to(servers, timeout=10.0), 1)) == 3 and has(servers[0], 1)


def test_sleeping_servers_wake_for_new_weights_before_they_resume(servers: list[FakeServer]):
    transfer = transfer_to(servers[:1])
    update(transfer, 1)
    servers[0].calls.clear()
    transfer.sleep()
    assert transfer.behind() == [], "only new weights wake a server"
    update(transfer, 2)
    assert servers[0].calls == [
        api.SLEEP,
        api.WORLD,
        api.START,
        api.UPDATE,
        api.WAKE_WEIGHTS,
        api.PAUSE,
        api.FINISH,
        api.LABEL,
        api.WAKE_CACHE,
        api.RESUME,
    ]
    assert transfer.behind() == []


@given(st.lists(st.integers(0, 3), max_size=4), st.sampled_from(["float32", "bfloat16", "int64", "uint8", "bool"]))
def test_received_tensors_equal_those_sent(shape: list[int], dtype: str):
    sent = torch.randint(0, 2, shape).to(getattr(torch, dtype))
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        tcp_frames.send_tensor(ours, "näme", sent)
        tcp_frames.send_tensor(ours, "again", sent)
        tcp_frames.send_end(ours)
        (name, found), (_, again) = list(tcp_frames.receive_tensors(theirs))
    assert name == "näme" and found.dtype == sent.dtype and found.shape == sent.shape
    assert torch.equal(found, sent) and torch.equal(again, sent)


@given(st.integers(0, 200))
def test_a_stream_that_is_cut_anywhere_is_an_error(cut: int):
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        tcp_frames.send_tensor(ours, "a", torch.arange(20))
        tcp_frames.send_end(ours)
        whole = theirs.recv(1000)
    ours, theirs = socket.socketpair()
    with closing(theirs):
        with closing(ours):
            ours.sendall(whole[:cut])
        if cut >= len(whole):
            assert len(list(tcp_frames.receive_tensors(theirs))) == 1
        else:
            with pytest.raises(ConnectionError, match="cut off"):
                list(tcp_frames.receive_tensors(theirs))


class Engine:
    """Drive the client as vLLM's trainer engine does, without a GPU."""

    def __init__(self, info: Any, client: Any, source: Any):
        self.info, self.client, self.source, self.sent = info, client, source, {}
        client.init_weight_transfer_engine(
            {"rank_offset": 1, "world_size": info} if info != "ipc" else {"packed": True}
        )

    def send_weights(self) -> None:
        self.client.start_weight_update()
        self.sent = dict(self.source)
        self.client.update_weights({"names": [], "ipc_handles": {"gpu": (1, 2)}, "ipc_handles_pickled": None})
        self.client.finish_weight_update()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_native, "_trainer_engine", Engine)
    monkeypatch.setattr(transfer_native, "_source", lambda manifest, tensors: tensors)
    monkeypatch.setattr(
        transfer_native.NativeTransfer,
        "_init_info",
        lambda self: "ipc" if self.kind == "ipc" else 1 + sum(self.client.workers),
    )


NATIVE_UPDATE = [api.PAUSE, api.START, api.UPDATE, api.FINISH, api.LABEL, api.RESUME]
NATIVE_FIRST = [api.WORKERS, api.PAUSE, api.WORLD, api.INIT, *NATIVE_UPDATE[1:]]


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_vllms_own_engines_run_between_pause_and_resume(servers: list[FakeServer], kind: str, no_gpu: None):
    transfer = transfer_to(servers, kind)
    for version in (1, 2):
        assert update(transfer, version) == [server.url for server in servers]
    assert all(server.calls == NATIVE_FIRST + NATIVE_UPDATE and not server.paused for server in servers)
    offsets = [
        body["init_info"].get("rank_offset") for server in servers for path, body in server.bodies if path == api.INIT
    ]
    assert offsets == ([1, 2, 4] if kind == "nccl" else [None] * 3), "the ranks do not follow the trainer's one by one"


@pytest.mark.parametrize(("kind", "room", "before"), [("nccl", 10**9, 5), ("nccl", 0, 1), ("ipc", 10**9, 1)])
def test_as_many_weights_as_fit_are_gathered_before_the_pause(
    servers: list[FakeServer], kind: str, room: int, before: int, no_gpu: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfer_native, "_room", lambda: room)
    paused = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for named in some_weights(1).items():
            paused.append(any(server.paused for server in servers))
            yield named

    transfer = transfer_to(servers, kind)
    assert transfer.update(tensors(), WeightsVersion(1, 1)) == [server.url for server in servers]
    assert paused == [False] * before + [True] * (len(paused) - before) and len(paused) == len(some_weights(1))
    assert transfer.send_weights.__self__.engine.sent.keys() == some_weights(1).keys()  # type: ignore[union-attr]


def test_the_group_is_formed_again_when_a_server_restarted(servers: list[FakeServer], no_gpu: None):
    transfer = transfer_to(servers, "nccl")
    update(transfer, 1)
    servers[2].label = api.UNSET
    for server in servers:
        server.calls.clear()
    assert update(transfer, 2) == [server.url for server in servers]
    assert servers[2].calls == NATIVE_FIRST and servers[0].calls == NATIVE_FIRST[1:]


@pytest.mark.parametrize("path", [api.UPDATE, api.FINISH])
def test_servers_with_half_an_update_are_stopped(servers: list[FakeServer], path: str, no_gpu: None):
    transfer = transfer_to(servers, "nccl")
    update(transfer, 1)
    servers[1].fails[path] = lambda: 500
    assert update(transfer, 2) == []
    for server in servers:
        assert server.calls[-1] == api.STOP and server.paused and server.label == "1/1"


def test_servers_resume_if_one_cannot_join_the_group(servers: list[FakeServer], no_gpu: None):
    transfer = transfer_to(servers, "nccl")
    servers[1].fails[api.INIT] = lambda: 500
    assert update(transfer, 1) == []
    assert all(server.calls[-1] == api.RESUME and api.STOP not in server.calls for server in servers)


def test_a_hanging_server_does_not_delay_the_others(servers: list[FakeServer]):
    transfer = transfer_to(servers, timeout=0.5)
    update(transfer, 1)

    def hang() -> int:
        time.sleep(1.5)
        return 200

    servers[0].fails[api.PAUSE] = hang
    assert update(transfer, 2) == [servers[1].url, servers[2].url]
    assert not servers[0].paused
