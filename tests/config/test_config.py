"""Test the configuration file: mistakes are refused by name; what is right is read, dumped and read back equal."""

from __future__ import annotations

import datetime
import math
import re
import string
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.engine.config import schema as config_module
from mgrpo.engine.config.resume import check_unchanged
from mgrpo.engine.config.schema import Config, Frozen, dump_config, load_config, parse_config, read_dump
from toy import raw_config, toy_config

FOLDER = Path("/nowhere")
SECTIONS: dict[str, type[Frozen]] = {
    "": Config,
    "environment": config_module.EnvironmentConfig,
    "agents.main": config_module.AgentConfig,
    "agents.clerk": config_module.AgentConfig,
    "algorithm": config_module.AlgorithmConfig,
    "reward": config_module.RewardConfig,
    "warmup": config_module.WarmupConfig,
    "eval": config_module.EvalConfig,
    "checkpoint": config_module.CheckpointConfig,
    "compute": config_module.ComputeConfig,
}


def keys_of(section: str) -> list[str]:
    return [field.name for field in msgspec.structs.fields(SECTIONS[section])]


def changed(key: str, value: Any) -> dict[str, Any]:
    """Return the toy's dictionary with one dotted key set."""
    raw = inner = deepcopy(raw_config(FOLDER))
    *parents, last = key.split(".")
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return raw


def refused(raw: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        parse_config(raw)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(
        'run_dir = "run"\n[environment]\nuse = "env.py:Env"\noptions = {size = 3}\n'
        '[agents.main]\nmodel = "weights"\n[agents.clerk]\nmodel = "/abs/clerk"\n'
    )
    return path


# ---- keys


@st.composite
def typos(draw: st.DrawFn) -> tuple[str, str]:
    """Draw a section and a wrong key: a real one with a letter left out, doubled or replaced, or in capitals."""
    section = draw(st.sampled_from(list(SECTIONS)))
    key = draw(st.sampled_from(keys_of(section)))
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from(string.ascii_letters + "_- .`$é"))
    typo = draw(
        st.sampled_from([key[:at] + key[at + 1 :], key[:at] + letter + key[at:], key[:at] + letter, key.upper()])
    )
    return section, typo


@given(typos())
def test_an_unknown_key_is_refused_with_its_path_its_value_and_the_keys_there_are(typo: tuple[str, str]):
    section, key = typo
    if key in keys_of(section):
        return
    raw = inner = deepcopy(raw_config(FOLDER))
    for part in section.split(".") if section else []:
        inner = inner.setdefault(part, {})
    inner[key] = "some value"
    path = f"{section}.{key}" if section else key
    message = f"config: {path}: 'some value' given: no such key, expected one of {', '.join(keys_of(section))}"
    found, _, hint = refused(raw).partition("; did you mean ")
    assert found == message and (not hint or hint.removesuffix("?") in keys_of(section))


@pytest.mark.parametrize(("typo", "key"), [("agents.main.qq", None), ("agents.main.lrr", "lr"), ("stpes", "steps")])
def test_a_key_that_is_nearly_right_is_suggested(file: Path, typo: str, key: str | None):
    with pytest.raises(ValueError, match="no such key") as refused:
        load_config(file, [f"{typo}=1"])
    assert str(refused.value).endswith(f"; did you mean {key}?") == (key is not None)


@pytest.mark.parametrize("key", ["run_dir", "environment", "agents", "environment.use", "agents.main.model"])
def test_a_missing_key_is_named(key: str):
    raw = inner = deepcopy(raw_config(FOLDER))
    *parents, last = key.split(".")
    for parent in parents:
        inner = inner[parent]
    del inner[last]
    message = refused(raw)
    assert f"missing required field `{last}`" in message
    assert ".".join(parents) in message


# ---- types and bounds


def within(section: str, keys: str) -> list[str]:
    return [f"{section}.{key}" for key in keys.split()]


def fields(*kinds: type) -> dict[str, Any]:
    """Return all keys of the file whose type is of these kinds; the main agent stands for all agents."""
    found: dict[str, Any] = {}
    for section, schema in SECTIONS.items():
        info: Any = msgspec.inspect.type_info(schema)
        for field in info.fields if section != "agents.clerk" else ():
            for kind in getattr(field.type, "types", (field.type,)):  # all members of a union
                if isinstance(kind, kinds):
                    found[f"{section}.{field.name}".lstrip(".")] = kind
    return found


NUMBERS = list(fields(msgspec.inspect.FloatType))
COUNTS = list(fields(msgspec.inspect.IntType))
TABLES = [*fields(msgspec.inspect.DictType, msgspec.inspect.StructType), "agents.main", "agents.clerk"]
CHOICES = fields(msgspec.inspect.LiteralType)
FROM_0 = [
    *["seed", "steps", "restarts", "agents.main.lr_warmup_steps", "warmup.steps", "eval.every"],
    *["sampling.max_staleness", "sampling.probe_every", "eval.patience"],
]
FROM_2 = ["algorithm.rollouts", "agents.main.max_context"]


@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        (NUMBERS, ["1e-6", True, [1.0], {"a": 1}], "float"),
        (COUNTS, ["3", 3.5, True, [3]], "int"),
        (fields(msgspec.inspect.BoolType), [1, "true", 0.0], "bool"),
        (fields(msgspec.inspect.StrType), [3, True, ["x"]], "str"),
        (TABLES, [3, "x", []], "object"),
        (["agents.main.stop", "agents.main.betas"], ["x", 3], "array"),
    ],
    ids=["numbers", "counts", "flags", "texts", "tables", "lists"],
)
def test_a_wrong_type_is_refused_by_key_value_and_type(keys: list[str], values: list[Any], expected: str):
    for key in keys:
        for value in values:
            pattern = rf"config: {re.escape(key)}: {re.escape(repr(value))} given: Expected `.*{expected}"
            assert re.match(pattern, refused(changed(key, value)))


@pytest.mark.parametrize(
    ("bound", "value", "keys"),
    [
        (">= 2", 1, FROM_2),
        (">= 1", 0, [key for key in COUNTS if key not in FROM_0 + FROM_2]),
        (">= 0", -1, FROM_0),
        (">= 0", -0.1, ["algorithm.kl_coef", "algorithm.entropy_coef", "agents.main.weight_decay"]),
        ("> 0", 0.0, within("algorithm", "clip_low clip_high sampler_cap std_eps length_constant")),
        ("> 0", -1e-6, [*within("agents.main", "lr temperature top_p grad_clip"), "warmup.lr", "reward.timeout"]),
        ("> 0", 0, [*within("sampling", "timeout max_gap"), "store.lease"]),
        ("> 1", 1.0, ["algorithm.dual_clip"]),
        ("< 1", 1.0, ["algorithm.clip_low"]),
        ("<= 1", 1.1, ["agents.main.top_p"]),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_key_value_and_bound(bound: str, value: Any, keys: list[str]):
    for key in keys:
        pattern = rf"config: {re.escape(key)}: {re.escape(repr(value))} given: Expected .*{bound}"
        assert re.match(pattern, refused(changed(key, value)))


@pytest.mark.parametrize("value", [[0.9], [0.9, 0.95, 0.99], [-0.1, 0.9], [0.9, 1.5], [1.0, 0.95], ["a", 0.9]], ids=str)
def test_betas_that_adam_would_refuse_are_refused(value: Any):
    message = refused(changed("agents.main.betas", value))
    assert re.match(r"config: agents\.main\.betas(\.[01])?: .* given: Expected ", message)


def test_an_empty_stop_string_is_refused():
    """Every text contains the empty string, so each action would end after one token."""
    assert re.match(r"config: agents\.main\.stop(\.0)?: .* given: ", refused(changed("agents.main.stop", [""])))


def test_a_reward_that_is_not_finite_is_refused():
    for key in within("reward", "main_format main_correct sub_format sub_correct sub_expert"):
        for value in (math.inf, -math.inf, math.nan):
            assert refused(changed(key, value)).startswith(f"config: {key}: {value} given: ")


@pytest.mark.parametrize("seed", [2**64, 2**200])
def test_a_seed_that_no_generator_takes_is_refused(seed: int):
    assert refused(changed("seed", seed)).startswith(f"config: seed: {seed} given: ")


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_that_there_is_not_is_refused_and_the_choices_named(key: str):
    message = refused(changed(key, "nonsense"))
    assert message.startswith(f"config: {key}: 'nonsense' given: ")
    for choice in CHOICES[key].values:
        assert repr(choice) in message
        parse_config(changed(key, choice))


# ---- agents


@pytest.mark.parametrize("agents", [{}, {"clerk": {"model": "m"}}, {"Main": {"model": "m"}}], ids=str)
def test_a_system_without_a_main_agent_is_refused(agents: dict[str, Any]):
    message = refused(raw_config(FOLDER, agents=agents))
    assert message == f"config: agents: {sorted(agents)} given: expected one named 'main'"


@pytest.mark.parametrize("name", ["", "a b", "a.b", "../x", "1st", "a/b", "a\nb"])
def test_an_agent_whose_name_cannot_be_part_of_a_file_name_is_refused(name: str):
    raw = raw_config(FOLDER)
    raw["agents"][name] = {"model": "m"}
    assert f"config: agents: {name!r} given: expected a name of letters" in refused(raw)


def test_a_run_that_would_train_no_agent_is_refused_unless_it_has_no_rl_steps():
    raw = raw_config(FOLDER)
    for agent in raw["agents"].values():
        agent["train"] = False
    message = "config: agents: train = false for all given: expected at least one to train, or steps = 0"
    assert refused(raw) == message
    assert parse_config(raw | {"steps": 0}).trained == []


def test_an_agent_that_is_trained_must_sample_from_all_tokens():
    """The trainer's log-probs are those of the whole distribution, so the gradient would be that of another one."""
    for agent in ("main", "clerk"):
        raw = changed(f"agents.{agent}.top_p", 0.9)
        assert re.match(
            rf"config: agents\.{agent}\.top_p: 0\.9 given: expected 1 for an agent that is trained, .*: "
            rf"lower agents\.{agent}\.temperature instead, or set train = false",
            refused(raw),
        )
        assert parse_config(raw | {"steps": 0}).agents[agent].top_p == 0.9
        raw["agents"][agent]["train"] = False
        assert parse_config(raw).agents[agent].top_p == 0.9


@pytest.mark.parametrize(
    "arguments",
    [
        ["--logits-processors", "mine:Mask"],
        ["--override_generation_config={}"],
        ["-q", "--watermark"],
        ["--config", "f"],
    ],
)
def test_an_agent_that_is_trained_has_servers_that_sample_from_all_tokens(arguments: list[str]) -> None:
    raw = changed("agents.main.vllm", {"arguments": arguments}) | {"topology": "local"}
    raw["algorithm"]["sampler_cap"] = 2.0
    assert "agents.main.vllm.arguments: --" in refused(raw) and "expected no argument that changes" in refused(raw)
    raw["agents"]["main"]["train"] = False
    assert parse_config(raw).agents["main"].vllm.arguments == arguments


def test_sub_agents_and_trained_agents_are_listed_in_the_order_of_the_file():
    raw = raw_config(FOLDER)
    raw["agents"] = {
        "zoe": {"model": "m"},
        "main": {"model": "m", "train": False},
        "abe": {"model": "m"},
    }
    config = parse_config(raw)
    assert (config.subs, config.trained) == (["zoe", "abe"], ["zoe", "abe"])


# ---- the file and --set


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(
        ValueError, match=re.escape(f"config: {tmp_path / 'no.toml'} is not a file: expected a TOML file")
    ):
        load_config(tmp_path / "no.toml")
    with pytest.raises(ValueError, match=rf"config: {tmp_path} given: expected a TOML file, or a run's directory with"):
        load_config(tmp_path)


def test_a_run_directory_holds_its_own_config_wherever_it_is_now(file: Path, tmp_path: Path):
    config = load_config(file, ["agents.main.betas=[0.5, 0.75]"])
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.json").write_text(dump_config(config))
    assert load_config(moved) == msgspec.structs.replace(config, run_dir=str(moved))
    assert load_config(moved, ["steps=77"]).steps == 77


NOT_TOML = {
    "no value": b"run_dir = ",
    "no end": b"[agents",
    "twice": b"a = 1\na = 2",
    "not UTF-8": b"\xff\xfe\x00",
    "an open string": b"run_dir = 'x",
    "nested too deep": b"x = " + b"[" * 100_000,
    "too many digits": b"steps = " + b"9" * 5000,
}


@pytest.mark.parametrize("text", NOT_TOML.values(), ids=NOT_TOML.keys())
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, text: bytes):
    (tmp_path / "bad.toml").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(f"config: {tmp_path / 'bad.toml'} is not valid TOML: ")):
        load_config(tmp_path / "bad.toml")


def test_relative_paths_are_those_of_the_working_directory_and_become_absolute(file: Path, monkeypatch):
    monkeypatch.chdir(file.parent)
    config = load_config(file)
    assert config.run_dir == str(file.parent.resolve() / "run")
    assert config.agents["main"].model == str(file.parent.resolve() / "weights")
    assert config.agents["clerk"].model == "/abs/clerk"
    assert config.environment.use == f"{file.parent.resolve() / 'env.py'}:Env"
    assert load_config(file, ["environment.use=package.module:Env"]).environment.use == "package.module:Env"


def test_set_takes_every_kind_of_value_and_reaches_every_section(file: Path):
    overrides = [
        *["agents.main.lr=1e-5", "steps=7", "deterministic=true", 'agents.clerk.stop=["\\n", "x"]', "seed = 3"],
        *["algorithm.alignment=expected", "environment.options.name=a b=c", "environment.options.deep.er=[1.5]"],
        *["agents.guide.model=/m", "agents.guide.betas=[0.5, 0.9]", "compute.dtype='float32'", "warmup={steps = 2}"],
    ]
    config = load_config(file, [override.replace(" = 3", "=3") for override in overrides])
    assert (config.agents["main"].lr, config.steps, config.deterministic, config.seed) == (1e-5, 7, True, 3)
    assert config.agents["clerk"].stop == ["\n", "x"]
    assert config.algorithm.alignment == "expected"
    assert config.environment.options == {"size": 3, "name": "a b=c", "deep": {"er": [1.5]}}
    assert config.agents["guide"].betas == (0.5, 0.9)
    assert config.compute.dtype == "float32"
    assert config.warmup.steps == 2


def test_the_last_set_of_a_key_counts(file: Path):
    assert load_config(file, ["steps=1", "steps=2"]).steps == 2


@pytest.mark.parametrize("override", ["", "steps", "=5"])
def test_a_set_that_is_no_key_and_value_is_refused(file: Path, override: str):
    message = f"--set: {override!r} given, expected KEY=VALUE such as agents.main.lr=1e-6"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(file, [override])


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000], ids=["nested too deep", "too many digits"])
def test_a_set_of_a_value_that_toml_cannot_hold_is_refused(file: Path, value: str):
    with pytest.raises(ValueError, match=r"--set: .{40}… given: expected a value of TOML: "):
        load_config(file, [f"steps={value}"])


def test_the_stores_paths_do_not_depend_on_the_working_directory_later(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sets = ["topology=local", "store.url=sqlite:///a/store.db", "store.password_file=pw", "store.files=files"]
    found = []
    for name in "xy":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found.append(load_config(file, sets))
        store, here = found[-1].store, tmp_path / name
        assert store.url == f"sqlite:///{here}/a/store.db"
        assert (store.password_file, store.files) == (f"{here}/pw", f"{here}/files")
    with pytest.raises(ValueError, match=r"resume: store\.(files|url): '.*/y/.*' given: expected '.*/x/"):
        check_unchanged(found[0], msgspec.structs.replace(found[0], store=found[1].store))


@pytest.mark.parametrize(
    "url", ["", "sqlite:////tmp/s.db", "sqlite:///:memory:", "postgresql://me@host/db?sslmode=require"]
)
def test_other_urls_of_stores_stay_as_they_are(file: Path, url: str):
    assert load_config(file, [f"store.url={url}"]).store.url == url


def test_a_copy_of_the_config_that_is_damaged_is_named():
    for text in ("", "{", '{"run_dir": 3}', "[" * 100_000):
        with pytest.raises(ValueError, match=r"config\.json is damaged, or of another version of mgrpo: "):
            read_dump(text)


def test_a_set_below_a_value_is_refused(file: Path):
    with pytest.raises(ValueError, match=re.escape("--set: run_dir.deep.er: 'run_dir' is a value, expected a section")):
        load_config(file, ["run_dir.deep.er=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agents.main.lr=-1", "config: agents.main.lr: -1 given: Expected `float` > 0"),
        ("agents.main.lr=", "config: agents.main.lr: '' given: Expected `float`"),
        ("agents.main.rl=1", "config: agents.main.rl: 1 given: no such key, expected one of model, "),
        ("agents..lr=1", "config: agents."),
        ("step=1", "config: step: 1 given: no such key, expected one of run_dir"),
    ],
)
def test_what_set_brings_is_checked_like_the_file(file: Path, override: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(file, [override])


# ---- the dump

FINITE = st.floats(allow_nan=False, allow_infinity=False)
OPTIONS = st.recursive(
    st.one_of(st.text(), FINITE, st.booleans(), st.integers(-(2**63), 2**63 - 1)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    options=st.dictionaries(st.text(), OPTIONS, max_size=3),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    stop=st.lists(st.text(min_size=1), max_size=3),
    dual_clip=st.none() | st.floats(1, 100, exclude_min=True),
)
def test_a_configuration_is_dumped_and_read_back_equal(
    options: Any, lr: float, stop: list[str], dual_clip: float | None
):
    raw = raw_config(FOLDER)
    raw["environment"]["options"] = options
    raw["agents"]["main"] |= {"lr": lr, "stop": stop}
    raw["algorithm"]["dual_clip"] = dual_clip
    config = parse_config(raw)
    assert read_dump(dump_config(config)) == config


MOMENT = datetime.datetime(2025, 1, 2, 3, 4)


def comes_back_or_is_refused(key: str, value: Any) -> None:
    try:
        config = parse_config(changed(key, value))
    except ValueError as error:
        assert key.removesuffix(".value") in str(error)
    else:
        assert read_dump(dump_config(config)) == config


@pytest.mark.parametrize("value", [MOMENT, MOMENT.date(), MOMENT.time(), math.inf, 2**70], ids=str)
def test_an_option_that_would_not_come_back_from_the_dump_is_refused(value: Any):
    """TOML has dates, infinities and big numbers, which JSON lacks; a run whose dump differs could not be resumed."""
    comes_back_or_is_refused("environment.options.value", value)


def test_an_infinite_number_that_would_not_come_back_from_the_dump_is_refused():
    for key in NUMBERS:
        comes_back_or_is_refused(key, math.inf)


def test_the_dump_writes_every_default_out():
    dump = msgspec.json.decode(dump_config(toy_config(FOLDER)).encode())
    assert set(dump) == set(keys_of(""))
    for section in ("algorithm", "reward", "warmup", "eval", "checkpoint", "compute", "environment"):
        assert set(dump[section]) == set(keys_of(section))
    assert set(dump["agents"]["clerk"]) == set(keys_of("agents.clerk"))
    assert dump["reward"]["sub_expert"] == 0.5


def test_the_defaults_are_those_of_the_paper():
    config = parse_config({"run_dir": "r", "environment": {"use": "e.py:E"}, "agents": {"main": {"model": "m"}}})
    reward = config.reward
    assert (reward.main_format, reward.main_correct) == (0.1, 0.9)
    assert (reward.sub_format, reward.sub_correct, reward.sub_expert) == (0.1, 0.4, 0.5)


# ---- servers


def with_servers(vllm: Any, **changes: Any) -> dict[str, Any]:
    raw = raw_config(FOLDER, **{"topology": "local"} | changes)
    raw["algorithm"]["sampler_cap"] = 2.0
    raw["agents"]["main"]["vllm"] = vllm
    return raw


def test_an_agents_servers_are_read_and_have_defaults_that_serve():
    vllm = parse_config(with_servers({})).agents["main"].vllm
    assert vllm == config_module.VLLMConfig() and parse_config(with_servers({})).agents["clerk"].vllm is None
    raw = with_servers({"urls": ["http://[::1]:8000", "https://a.example"], "transfer": "nccl", "timeout": 5})
    config = parse_config(raw)
    assert read_dump(dump_config(config)) == config and config.agents["main"].vllm.transfer == "nccl"
    assert parse_config(with_servers({"servers": 2, "tensor_parallel": 2, "gpus": ["0", "1", "2", "3"]}))


@pytest.mark.parametrize(
    ("vllm", "message"),
    [
        ({"url": []}, "agents.main.vllm.url: [] given: no such key, expected one of urls, servers, tensor_parallel"),
        ({"transfer": "gloo"}, "agents.main.vllm.transfer: 'gloo' given: expected one of 'auto', 'tcp', 'nccl', 'ipc'"),
        ({"servers": 0}, "agents.main.vllm.servers: 0 given: Expected `int` >= 1"),
        ({"timeout": 0.0}, "agents.main.vllm.timeout: 0.0 given: Expected `float` > 0"),
        ({"urls": ["127.0.0.1:8000"]}, "agents.main.vllm.urls"),
        ({"urls": ["http://user:secret@host"]}, "agents.main.vllm.urls"),
        ({"urls": ["http://host/v1"]}, "agents.main.vllm.urls"),
        (
            {"gpus": ["0"], "servers": 2},
            "agents.main.vllm.gpus: ['0'] given: expected 2, which is servers x tensor_parallel",
        ),
        ("yes", "agents.main.vllm: 'yes' given: Expected `object | null`"),
    ],
)
def test_what_is_wrong_with_an_agents_servers_is_named(vllm: Any, message: str):
    assert refused(with_servers(vllm)).startswith(f"config: {message}")


def test_servers_need_a_topology_urls_on_a_cluster_and_a_cap():
    assert "vllm: given with topology = 'colocated'" in refused(with_servers({}, topology="colocated"))
    assert "vllm.urls: [] given: expected the servers' URLs" in refused(with_servers({}, topology="cluster"))
    raw = with_servers({})
    del raw["algorithm"]["sampler_cap"]
    assert "agents.main.vllm: given without algorithm.sampler_cap" in refused(raw)


@pytest.mark.parametrize("section", [section for section in SECTIONS if section != "agents.clerk"])
def test_a_configuration_is_frozen(section: str):
    inner: Any = toy_config(FOLDER)
    for part in section.split(".") if section else []:
        inner = inner[part] if isinstance(inner, dict) else getattr(inner, part)
    for key in keys_of(section):
        with pytest.raises(AttributeError):
            setattr(inner, key, getattr(inner, key))


def test_a_call_that_fits_into_no_micro_batch_is_refused_before_any_is_sampled(file):
    """The last token of a call predicts nothing."""
    contexts = ["agents.main.max_context=64", "agents.clerk.max_context=128"]
    assert load_config(file, [*contexts, "compute.max_tokens=127"]).compute.max_tokens == 127
    message = r"compute\.max_tokens: 126 given: expected at least 127, since agents\.clerk\.max_context = 128"
    with pytest.raises(ValueError, match=message):
        load_config(file, [*contexts, "compute.max_tokens=126"])
    frozen = [*contexts, "compute.max_tokens=63", "agents.clerk.train=false"]
    assert load_config(file, frozen).compute.max_tokens == 63
    with pytest.raises(ValueError, match=r"compute\.max_tokens: 63 given"):  # the warm-up trains it too
        load_config(file, [*frozen, "warmup.steps=1"])
