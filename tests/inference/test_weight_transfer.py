"""Weights to servers that only record: what is called and in which order, and what failures leave behind."""

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
from mgrpo.engine.inference.vllm import api as adapter
from mgrpo.engine.inference.vllm import tcp_frames as wire
from mgrpo.engine.inference.vllm import transfer_native as native
from mgrpo.engine.inference.vllm import transfer_tcp as stream
from mgrpo.engine.inference.vllm.control import ServerControl
from mgrpo.engine.inference.vllm.weight_transfer import Transfer

ONE_UPDATE = [adapter.START, adapter.UPDATE, adapter.PAUSE, adapter.FINISH, adapter.LABEL, adapter.RESUME]
FIRST = [adapter.WORKERS, adapter.WORLD, *ONE_UPDATE]
LATER = [adapter.WORLD, *ONE_UPDATE]


def some_weights(version: int) -> dict[str, Tensor]:
    torch.manual_seed(version)
    return {
        "embed.weight": torch.randn(7, 3),
        "norm.weight": torch.randn(3).to(torch.bfloat16),
        "none": torch.empty(0, 4),
        "scale": torch.randn(()),
        "transposed": torch.randn(4, 5).T,
    }


MANIFEST = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in some_weights(0).items()}


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serve(FakeServer(workers))) for workers in (1, 2, 1)]


def transfer_to(servers: list[FakeServer], kind: str = "tcp", timeout: float = 5.0, **more: Any) -> Transfer:
    return Transfer([server.url for server in servers], more.get("token", TOKEN), kind, MANIFEST, timeout)


def update(transfer: Transfer, version: int) -> list[str]:
    return transfer.update(iter(some_weights(version).items()), version, version)


def has(server: FakeServer, version: int) -> bool:
    wanted = some_weights(version)
    return (
        server.label == f"{version}/{version}"
        and all(
            found.keys() == wanted.keys()
            and all(torch.equal(found[name], wanted[name]) for name in wanted)
            and all(found[name].dtype == wanted[name].dtype for name in wanted)
            for found in server.weights
        )
        and len(server.weights) == server.workers
    )


def test_every_worker_of_every_server_has_the_weights_and_their_label(servers: list[FakeServer]):
    transfer = transfer_to(servers)
    assert transfer.behind() == [server.url for server in servers]
    for version in (1, 2, 5):
        assert update(transfer, version) == [server.url for server in servers]
        assert all(has(server, version) and not server.paused for server in servers)
        assert transfer.behind() == []
    assert all(server.calls == FIRST + LATER + LATER for server in servers)


def test_a_server_that_has_them_already_gets_them_no_second_time(servers: list[FakeServer]):
    transfer = transfer_to(servers)
    update(transfer, 1)
    assert update(transfer, 1) == []
    assert all(server.calls == FIRST for server in servers)


def test_tensors_are_used_up_though_no_server_wants_them(servers: list[FakeServer]):
    """Each one may be a collective of all ranks."""
    transfer = transfer_to([])
    tensors = iter(some_weights(1).items())
    assert transfer.update(tensors, 1, 1) == [] and next(tensors, None) is None
    servers[0].misfit = "weight 'x' is None"
    tensors = iter(some_weights(1).items())
    with pytest.raises(ValueError, match=rf"{servers[0].url}: weight 'x'"):
        transfer_to(servers).update(tensors, 1, 1)
    assert next(tensors, None) is None and all(server.label == adapter.UNSET for server in servers)


@pytest.mark.parametrize("path", [adapter.START, adapter.UPDATE, adapter.PAUSE, adapter.FINISH])
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


def test_one_that_cannot_be_labelled_goes_on_and_is_behind(servers: list[FakeServer]):
    transfer = transfer_to(servers)
    update(transfer, 1)
    servers[0].acts = servers[0].acts | {adapter.LABEL: lambda self, body: (200, {"label": "1/1"})}
    assert update(transfer, 2) == [servers[1].url, servers[2].url]
    assert not servers[0].paused and transfer.behind() == [servers[0].url]


def test_a_server_that_is_gone_or_hangs_is_left_out(servers: list[FakeServer]):
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

    def drops(call: Any) -> None:
        with closing(socket.create_connection((call["host"], call["port"]))) as connection:
            wire.send_secret(connection, call["secret"])

    servers[2].receive = drops  # type: ignore[method-assign]
    assert transfer.update(tensors(), 2, 2) == [servers[0].url, servers[1].url]
    assert has(servers[2], 1) and not servers[2].paused


def test_a_trainer_that_dies_in_the_middle_leaves_nothing_behind(servers: list[FakeServer]):
    """Its tensors end in an error: no server has new weights, and the next trainer's update goes through."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from list(some_weights(2).items())[:2]
        raise KeyboardInterrupt

    update(transfer_to(servers), 1)
    with pytest.raises(KeyboardInterrupt):
        transfer_to(servers).update(tensors(), 2, 2)
    assert all(has(server, 1) and not server.paused and server.open for server in servers)
    assert update(transfer_to(servers), 3) == [server.url for server in servers]
    assert all(has(server, 3) and not server.paused for server in servers)


def test_a_server_that_was_started_again_is_checked_and_brought_up(servers: list[FakeServer]):
    transfer = transfer_to(servers)
    update(transfer, 1)
    servers[0].label, servers[0].weights = adapter.UNSET, []
    assert transfer.behind() == [servers[0].url]
    assert update(transfer, 1) == [servers[0].url] and has(servers[0], 1)
    assert servers[0].calls == FIRST + FIRST and servers[1].calls == FIRST


def test_a_server_is_stalled_from_its_pause_to_its_resumption(servers: list[FakeServer]):
    def slow(server: FakeServer, body: Any) -> tuple[int, Any]:
        time.sleep(0.2)
        return server.finish(body)

    transfer = transfer_to(servers)
    assert transfer.stalled == 0.0 and transfer_to([]).stalled == 0.0
    servers[1].acts[adapter.FINISH] = slow
    update(transfer, 1)
    assert transfer.stalled >= 0.2


def test_waiting_ends_when_all_answer_or_the_time_is_over(servers: list[FakeServer]):
    assert transfer_to(servers).wait(60.0) == []
    with serve(FakeServer()) as gone:
        pass
    assert transfer_to([*servers, gone]).wait(0.6) == [gone.url]


def test_a_trainer_that_was_started_again_frees_what_the_one_before_left_paused(servers: list[FakeServer]):
    """It died between naming the weights and going on: the label is no sign of it."""
    update(transfer_to(servers), 1)
    servers[1].paused = True
    transfer = transfer_to(servers)
    assert update(transfer, 1) == [server.url for server in servers]
    assert not servers[1].paused and transfer.behind() == []


def test_another_version_of_vllm_is_refused(servers: list[FakeServer]):
    servers[1].version = "0.11.2"
    with pytest.raises(ValueError, match=rf"{servers[1].url} is vLLM 0\.11\.2: expected 0\.32"):
        update(transfer_to(servers), 1)
    assert not any(adapter.START in server.calls for server in servers)


def test_a_wrong_token_is_refused(servers: list[FakeServer]):
    with pytest.raises(ValueError, match="the token is wrong"):
        update(transfer_to(servers, token="another"), 1)
    assert not any(server.calls for server in servers)


def test_a_server_of_another_program_is_refused(servers: list[FakeServer]):
    servers[0].acts = {}
    with pytest.raises(ValueError, match=f"{servers[0].url} has no {adapter.LABEL}"):
        update(transfer_to(servers), 1)


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://host", "http://", "http://host/path"])
def test_a_url_that_is_none(url: str):
    with pytest.raises(ValueError, match="expected http://host:port"):
        ServerControl(url, TOKEN, 1.0)


def test_a_kind_that_is_none():
    with pytest.raises(ValueError, match="transfer 'gloo': expected one of tcp, nccl, ipc"):
        Transfer([], TOKEN, "gloo", MANIFEST)


def test_a_caller_without_the_secret_is_turned_away(servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "GREETING", 0.2)
    receive = servers[0].receive

    def crowd(call: Any) -> None:
        for said in (b"", b"x" * 64, b"short"):
            with suppress(OSError), closing(socket.create_connection((call["host"], call["port"]), 5)) as stranger:
                stranger.sendall(said)
                stranger.settimeout(5)
                assert stranger.recv(1) == b"", "a stranger was told something"
        receive(call)

    servers[0].receive = crowd  # type: ignore[method-assign]
    assert len(update(transfer_to(servers, timeout=10.0), 1)) == 3 and has(servers[0], 1)


def test_sleeping_servers_wake_for_new_weights_before_they_go_on(servers: list[FakeServer]):
    transfer = transfer_to(servers[:1])
    update(transfer, 1)
    servers[0].calls.clear()
    transfer.sleep()
    assert transfer.behind() == [], "nothing wakes it but new weights"
    update(transfer, 2)
    assert servers[0].calls == [
        adapter.SLEEP,
        adapter.WORLD,
        adapter.START,
        adapter.UPDATE,
        adapter.WAKE_WEIGHTS,
        adapter.PAUSE,
        adapter.FINISH,
        adapter.LABEL,
        adapter.WAKE_CACHE,
        adapter.RESUME,
    ]
    assert transfer.behind() == []


@given(st.lists(st.integers(0, 3), max_size=4), st.sampled_from(["float32", "bfloat16", "int64", "uint8", "bool"]))
def test_what_goes_over_the_wire_comes_out(shape: list[int], dtype: str):
    sent = torch.randint(0, 2, shape).to(getattr(torch, dtype))
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        wire.send_tensor(ours, "näme", sent)
        wire.send_tensor(ours, "again", sent)
        wire.send_end(ours)
        (name, found), (_, again) = list(wire.receive_tensors(theirs))
    assert name == "näme" and found.dtype == sent.dtype and found.shape == sent.shape
    assert torch.equal(found, sent) and torch.equal(again, sent)


@given(st.integers(0, 200))
def test_a_stream_that_is_cut_anywhere_is_not_taken_for_whole(cut: int):
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        wire.send_tensor(ours, "a", torch.arange(20))
        wire.send_end(ours)
        whole = theirs.recv(1000)
    ours, theirs = socket.socketpair()
    with closing(theirs):
        with closing(ours):
            ours.sendall(whole[:cut])
        if cut >= len(whole):
            assert len(list(wire.receive_tensors(theirs))) == 1
        else:
            with pytest.raises(ConnectionError, match="cut off"):
                list(wire.receive_tensors(theirs))


class Engine:
    """In place of vLLM's trainer engine: drives its client as that does, and needs no GPU."""

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
    monkeypatch.setattr(native, "_trainer_engine", Engine)
    monkeypatch.setattr(native, "_source", lambda manifest, tensors: tensors)
    monkeypatch.setattr(
        native.Native, "_meeting", lambda self: "ipc" if self.kind == "ipc" else 1 + sum(self.client.workers)
    )


NATIVE_UPDATE = [adapter.PAUSE, adapter.START, adapter.UPDATE, adapter.FINISH, adapter.LABEL, adapter.RESUME]
NATIVE_FIRST = [adapter.WORKERS, adapter.PAUSE, adapter.WORLD, adapter.INIT, *NATIVE_UPDATE[1:]]


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_vllms_own_engines_run_between_pause_and_resume(servers: list[FakeServer], kind: str, no_gpu: None):
    transfer = transfer_to(servers, kind)
    for version in (1, 2):
        assert update(transfer, version) == [server.url for server in servers]
    assert all(server.calls == NATIVE_FIRST + NATIVE_UPDATE and not server.paused for server in servers)
    offsets = [
        body["init_info"].get("rank_offset")
        for server in servers
        for path, body in server.bodies
        if path == adapter.INIT
    ]
    assert offsets == ([1, 2, 4] if kind == "nccl" else [None] * 3), "behind the trainer, one after the other"


def test_the_group_is_formed_anew_when_a_server_comes_back(servers: list[FakeServer], no_gpu: None):
    transfer = transfer_to(servers, "nccl")
    update(transfer, 1)
    servers[2].label = adapter.UNSET
    for server in servers:
        server.calls.clear()
    assert update(transfer, 2) == [server.url for server in servers]
    assert servers[2].calls == NATIVE_FIRST and servers[0].calls == NATIVE_FIRST[1:]


@pytest.mark.parametrize("path", [adapter.UPDATE, adapter.FINISH])
def test_weights_that_are_neither_old_nor_new_sample_nothing(servers: list[FakeServer], path: str, no_gpu: None):
    transfer = transfer_to(servers, "nccl")
    update(transfer, 1)
    servers[1].fails[path] = lambda: 500
    assert update(transfer, 2) == []
    for server in servers:
        assert server.calls[-1] == adapter.STOP and server.paused and server.label == "1/1"


def test_a_server_that_cannot_join_costs_nobody_anything(servers: list[FakeServer], no_gpu: None):
    transfer = transfer_to(servers, "nccl")
    servers[1].fails[adapter.INIT] = lambda: 500
    assert update(transfer, 1) == []
    assert all(server.calls[-1] == adapter.RESUME and adapter.STOP not in server.calls for server in servers)


def test_a_hung_server_does_not_keep_the_others(servers: list[FakeServer]):
    transfer = transfer_to(servers, timeout=0.5)
    update(transfer, 1)

    def hang() -> int:
        time.sleep(1.5)
        return 200

    servers[0].fails[adapter.PAUSE] = hang
    assert update(transfer, 2) == [servers[1].url, servers[2].url]
    assert not servers[0].paused
