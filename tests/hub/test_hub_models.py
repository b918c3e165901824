"""Test models by id against a hub on loopback: what is fetched, what is kept, and what is said if that fails."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stub import REPO, Hub, hub_with, point_to
from huggingface_hub import constants

from mgrpo.engine.config.schema import AgentConfig, Config, dump_config, parse_config
from mgrpo.engine.hub import failures, snapshots
from mgrpo.engine.hub.settle import settle

NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


class Said:
    """Keep what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.parts: list[float] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def doing(self, text: str, part: float | None = None) -> None:
        self.parts += [] if part is None else [part]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make files with the names of a model's; nothing here reads more than the names and the index."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in NEEDED:
        (folder / name).write_text(json.dumps({"file": name}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    return folder


@pytest.fixture
def hub(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_with(model, tmp_path, monkeypatch) as hub:
        yield hub


def agent(**keys: Any) -> AgentConfig:
    return AgentConfig(model=REPO, max_context=64, **keys)


def config(tmp_path: Path, **keys: Any) -> Config:
    agents = {name: {"model": REPO, **keys} for name in ("main", "clerk")}
    return parse_config({"run_dir": str(tmp_path / "run"), "environment": {"use": "x:X"}, "agents": agents})


def refused(tmp_path: Path, **keys: Any) -> str:
    with pytest.raises(ValueError) as caught:
        settle(config(tmp_path, **keys), Said())
    return str(caught.value)


def test_what_training_reads_is_fetched(hub: Hub, model: Path):
    found = snapshots.folder("main", agent(), weights=True)
    assert set(hub.downloads()) == NEEDED == {path.name for path in found.iterdir()}
    assert all((found / name).read_bytes() == (model / name).read_bytes() for name in NEEDED)


def test_the_config_comes_after_the_tokenizer_and_the_weights_come_last(hub: Hub):
    snapshots.folder("main", agent(), weights=True)
    assert hub.downloads()[-2:] == ["config.json", "model.safetensors"]


def test_without_weights_none_are_fetched_and_later_only_they_are(hub: Hub):
    snapshots.folder("main", agent())
    assert set(hub.downloads()) == NEEDED - {"model.safetensors"}
    hub.asked.clear()
    snapshots.folder("main", agent(), weights=True)
    assert hub.downloads() == ["model.safetensors"]


def test_python_and_pickles_are_fetched_only_where_they_may_be_read(hub: Hub):
    snapshots.folder("main", agent(trust_remote_code=True), weights=True)
    assert set(hub.downloads()) == NEEDED | {"code.py"}
    (hub.commits[hub.branches["main"]] / "model.safetensors").unlink()
    hub.asked.clear()
    hub.add(hub.commits[hub.branches["main"]])
    snapshots._folder.cache_clear()
    snapshots.folder("main", agent(allow_pickle=True), weights=True)
    assert hub.downloads() == ["pytorch_model.bin"], "the other files did not change"


def test_of_shards_those_of_the_index_are_fetched(hub: Hub):
    folder = hub.commits[hub.branches["main"]]
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.fp16-00001-of-00001.safetensors").write_bytes(b"another variant")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = snapshots.folder("main", agent(), weights=True)
    assert [path.name for path in sorted(found.glob("*.safetensors"))] == ["model-00001-of-00001.safetensors"]
    (found / "model-00001-of-00001.safetensors").unlink()
    assert snapshots.in_cache(failures.HubSource(REPO), agent(), weights=True) is None


def test_what_a_run_would_download_is_told(hub: Hub, model: Path):
    size = sum((model / name).stat().st_size for name in NEEDED)
    assert snapshots.outlook("main", agent()) == (len(NEEDED), size)
    assert hub.downloads() == []
    snapshots.folder("main", agent())
    assert snapshots.outlook("main", agent()) == (1, (model / "model.safetensors").stat().st_size)
    snapshots.folder("main", agent(), weights=True)
    assert snapshots.outlook("main", agent()) == (0, 0)


def test_a_run_notes_the_commit_and_a_resumed_one_keeps_it(hub: Hub, tmp_path: Path):
    begun = settle(config(tmp_path), Said())
    first = hub.branches["main"]
    assert {each.revision for each in begun.agents.values()} == {f"main@{first}"}
    saved = tmp_path / "config.json"
    saved.write_text(dump_config(begun))
    hub.asked.clear()
    hub.add(hub.commits[first])
    said = Said()
    assert settle(config(tmp_path), said, saved) == begun
    assert hub.downloads() == []
    assert said.lines[0] == (
        f"agents.main.model: main of {REPO} is at {hub.branches['main'][:7]} by now; the run goes on with {first[:7]}, "
        "with which it was begun"
    )
    assert settle(config(tmp_path, revision=first), Said(), saved) == begun
    assert settle(config(tmp_path), Said()).agents["main"].revision == f"main@{hub.branches['main']}"


def test_agents_of_one_model_get_one_commit(hub: Hub, tmp_path: Path):
    settle(config(tmp_path), Said())
    assert len([path for _, path, _ in hub.asked if path.startswith("/api/")]) == 1


def test_another_revision_is_not_the_one_of_the_run(hub: Hub, tmp_path: Path):
    saved = tmp_path / "config.json"
    saved.write_text(dump_config(settle(config(tmp_path), Said())))
    tagged = hub.add(hub.commits[hub.branches["main"]], "v2")
    assert settle(config(tmp_path, revision="v2"), Said(), saved).agents["main"].revision == f"v2@{tagged}"


def test_a_settled_model_in_the_cache_needs_no_hub(hub: Hub, tmp_path: Path):
    begun = settle(config(tmp_path), Said())
    hub.asked.clear()
    snapshots.folder("main", begun.agents["main"], weights=True)
    assert hub.asked == []


def test_an_id_that_is_not_there(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told = refused(tmp_path, model="tiny/other")
    assert told == (
        f"agents.main.model: 'tiny/other' given: there is no directory of that name, and {hub.url} has no such model: "
        "expected an id that it has, or HF_TOKEN to be set, if it is private"
    )
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert refused(tmp_path, model="tiny/other").endswith("or a HF_TOKEN that may read it")


def test_a_revision_that_is_not_there(hub: Hub, tmp_path: Path):
    assert refused(tmp_path, revision="v9").startswith(
        f"agents.main.revision: 'v9' given: {hub.url}/{REPO} has no such"
    )


def test_a_gated_model_is_had_with_the_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.open_to = "mine"
    told = refused(tmp_path)
    assert told.endswith(f"it is gated: expected that you accept its licence at {hub.url}/{REPO} and set HF_TOKEN")
    assert told.startswith("agents.main.model: ")
    monkeypatch.setenv("HF_TOKEN", "another")
    assert "with the account of the token in HF_TOKEN" in refused(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "mine")
    settle(config(tmp_path), Said())
    assert {token for method, path, token in hub.asked[-3:]} == {"mine"}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path, status: int):
    hub.faults["/revision/"] = [(status, {}), (status, {"Retry_After": "0"})]
    said = Said()
    settle(config(tmp_path), said)
    assert said.lines[0].startswith(f"{REPO}: {hub.url} answered {status}; trying again in 0.0")
    assert len(said.lines) == 2


def test_a_hub_that_stays_busy_is_given_up(hub: Hub, tmp_path: Path):
    hub.faults["/revision/"] = [(429, {})] * failures.TRIES
    assert "answered 429: too many requests: expected fewer; try again later" in refused(tmp_path)
    assert hub.faults["/revision/"] == []


def test_a_hub_that_cannot_be_reached(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    point_to("http://127.0.0.1:9", monkeypatch)
    told = refused(tmp_path)
    assert "http://127.0.0.1:9 cannot be reached" in told and "HF_HUB_OFFLINE=1" in told


def test_a_hub_that_is_gone_leaves_what_is_cached(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun = settle(config(tmp_path), Said())
    point_to("http://127.0.0.1:9", monkeypatch)
    said = Said()
    assert settle(config(tmp_path), said) == begun
    assert said.lines[0] == (
        f"{REPO}: the hub cannot be reached, commit {hub.branches['main'][:7]} is taken from the cache"
    )


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub: Hub, tmp_path: Path, model: Path):
    hub.faults["model.safetensors"] = [None, "cut"]  # of HEAD and GET
    said = Said()
    begun = settle(config(tmp_path), said)
    got = snapshots.folder("main", begun.agents["main"], weights=True) / "model.safetensors"
    assert got.read_bytes() == (model / "model.safetensors").read_bytes()
    assert hub.downloads().count("model.safetensors") == 2
    assert max(said.parts) == 1.0


def test_offline_only_the_cache_is_asked(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = refused(tmp_path)
    assert told.startswith(
        f"agents.main.model: '{REPO}' given: HF_HUB_OFFLINE is set, and main is not, or not whole, in"
    )
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    begun = settle(config(tmp_path), Said(), weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not whole" in refused(tmp_path)
    assert settle(config(tmp_path), Said(), weights=False) == begun


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(snapshots, "free_space", lambda: 10)
    told = refused(tmp_path)
    assert "is full" in told and "still to be downloaded" in told and told.startswith("agents.main.model: ")
    assert hub.downloads() == []


def test_a_disk_that_fills_up_meanwhile(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "hf_hub_download", full)
    assert "expected more room there, or HF_HOME on a larger disk" in refused(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["config.json"], "has no config.json: expected a model that transformers can load"),
        (["model.safetensors"], "pickles only: expected safetensors, or agents.main.allow_pickle = true"),
        (["model.safetensors", "pytorch_model.bin"], "has no safetensors: expected the weights of a model"),
    ],
)
def test_a_repository_that_holds_no_model(hub: Hub, tmp_path: Path, lost: list[str], message: str):
    for name in lost:
        (hub.commits[hub.branches["main"]] / name).unlink()
    assert message in refused(tmp_path)
    assert hub.downloads() == []


def test_an_answer_that_is_not_a_hubs(hub: Hub, tmp_path: Path):
    hub.faults["/revision/"] = [(200, {})]
    assert "does not answer as a hub does: expected the address of one in HF_ENDPOINT" in refused(tmp_path)
