"""`Policy.load_state` takes a state without some or all of its moments; the optimizer begins anew, silently.

Its documentation promises a ValueError for a state that is not whole or is another model's. Other damage is an
AssertionError, a KeyError or a SafetensorError instead.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mgrpo.engine import Objective, pack
from mgrpo.engine.policy.policy import Policy
from reproduction import fault, held
from reproduction.runs import new_folder
from toy import make_model, toy_config

folder = new_folder()
make_model(folder / "model")
config = toy_config(folder)
policy = Policy("main", config.agents["main"], config.compute)
(batches,) = pack([np.arange(1, 9, dtype=np.int32)], [np.ones(8, bool)], [1.0], [0.1], cap=64)
policy.step(batches, Objective(sampler_cap=None))
policy.save_state(folder / "whole")


def moments(change):
    """Return damage that changes a saved state's moments."""

    def edit(into: Path) -> None:
        tensors = load_file(into / "moments.safetensors")
        change(tensors)
        save_file(tensors, into / "moments.safetensors")

    return edit


DAMAGE = {
    "no moments.safetensors": lambda into: (into / "moments.safetensors").unlink(),
    "half of the moments": moments(lambda tensors: [tensors.pop(key) for key in list(tensors)[::2]]),
    "a moment of an unknown weight": moments(lambda tensors: tensors.update({"exp_avg/nope": torch.zeros(3)})),
    "a moment of another shape": moments(lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3)})),
    "weights.safetensors cut off": lambda into: os.truncate(into / "weights.safetensors", 5000),
}
Policy("main", config.agents["main"], config.compute).load_state(folder / "whole")  # raises nothing: it is whole
bad = []
for what, damage in DAMAGE.items():
    into = folder / what.replace(" ", "-")
    shutil.copytree(folder / "whole", into)
    damage(into)
    fresh = Policy("main", config.agents["main"], config.compute)
    try:
        fresh.load_state(into)
        found, all_of_them = (sum(map(len, p.optimizer.state.values())) for p in (fresh, policy))
        bad.append(f"{what}: loaded, {found} moments of {all_of_them}")
    except ValueError as error:
        print(f"  {what}: {error}")
    except Exception as error:
        bad.append(f"{what}: {type(error).__name__}: {error}")
if bad:
    fault("\n  ".join(["", *bad]))
held("all refused")
