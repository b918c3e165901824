"""Some mistakes of a user end in a traceback, or in words about something else.

A ValueError that names the key is promised.
"""

import json
import shutil
import tempfile
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from mgrpo.engine.config.schema import load_config
from mgrpo.engine.model.causal_lm import load_model, load_tokenizer
from mgrpo.engine.rollout.curriculum import load_tasks, pick
from mgrpo.engine.store.database import read_password
from mgrpo.engine.types import Task
from reproduction import fault, held
from reproduction.episodes import Base
from reproduction.runs import new_folder
from toy import make_model, toy_config

folder = new_folder()
make_model(folder / "model")
config = toy_config(folder)
base = json.loads((folder / "model/config.json").read_text())


def model(change) -> None:
    into = Path(tempfile.mkdtemp(dir=folder)) / "m"
    shutil.copytree(folder / "model", into)
    change(into)
    agent = msgspec.structs.replace(config.agents["main"], model=str(into))
    load_tokenizer("main", agent)
    load_model("main", agent, config.compute)


def not_finite(into: Path) -> None:
    tensors = load_file(into / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, into / "model.safetensors", metadata={"format": "pt"})


def described(text: str):
    return lambda: model(lambda into: (into / "config.json").write_text(text))


def pickled(into: Path) -> None:
    (into / "model.safetensors").unlink()
    torch.save({"x": folder}, into / "pytorch_model.bin")


def toml(text: str) -> None:
    (folder / "x.toml").write_text(text)
    load_config(folder / "x.toml")


def tasks(value) -> str:
    found = load_tasks(type("E", (Base,), {"tasks": lambda self, split: value})(), "train")
    return pick(found, 0, 0).id


def password() -> None:
    (folder / "pw").write_bytes(b"\xff\xfe\n")
    (folder / "pw").chmod(0o600)
    read_password(str(folder / "pw"))


MODEL = "agents.main.model"
CASES = {  # what is done, and a word that the message must have
    "a model with NaN in its weights": (lambda: model(not_finite), "finite"),
    "config.json with 0 attention heads": (described(json.dumps(base | {"num_attention_heads": 0})), MODEL),
    "config.json nested 100,000 deep": (described("[" * 100_000), MODEL),
    "pytorch_model.bin that is no plain weights": (lambda: model(pickled), MODEL),
    "a TOML file nested 100,000 deep": (lambda: toml("x = " + "[" * 100_000), "TOML"),
    "a TOML number of 5,000 digits": (lambda: toml("steps = " + "9" * 5000), "TOML"),
    "tasks() that is a generator": (lambda: tasks(Task(str(i), {}) for i in range(3)), "tasks"),
    "tasks() that returns a dict": (lambda: tasks({"a": Task("a", {})}), "tasks"),
    "tasks() of plain strings": (lambda: tasks(["a", "b"]), "tasks"),
    "tasks() of a task whose id is a number": (lambda: tasks([Task(5, {})]), "id"),
    "a password file that is not UTF-8": (password, "password_file"),
}
model(lambda into: None)  # an exception of these healthy ones ends with status 2
tasks([Task("a", {})])
toml('run_dir = "x"\nenvironment.use = "x.py:X"\nagents.main.model = "x"')
bad = []
for what, (act, word) in CASES.items():
    try:
        act()
        bad.append(f"{what}: accepted")
    except ValueError as error:
        if word not in str(error):
            bad.append(f"{what}: ValueError: {str(error)[:140]}")
    except Exception as error:
        bad.append(f"{what}: {type(error).__name__}: {str(error)[:100]}")
if bad:
    fault("\n  ".join(["", *bad]))
held("each names its key")
