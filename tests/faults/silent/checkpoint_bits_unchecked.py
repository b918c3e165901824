"""Changed bytes in a checkpoint's weights, moments or state.json are loaded and trained on, silently.

A checkpoint is verified by the sizes of its files alone. Published weights have a SHA-256, checkpoints have none.
"""

import msgspec
import torch

from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.directory import RunDirectory
from mgrpo.engine.training.leader import CheckpointInfo, read_checkpoint_info
from reproduction import cannot, fault, held
from reproduction.runs import new_folder
from toy import make_model, toy_config

folder = new_folder()
make_model(folder / "model")
config = toy_config(folder)
policy = Policy("main", config.agents["main"], config.compute)


def save(into) -> None:
    state = policy.save_state(into / "main")
    info = CheckpointInfo(stage="rl", step=6, policy=state, groups=12)
    (into / "state.json").write_bytes(msgspec.json.encode(info))


def is_whole() -> bool:
    """Load the checkpoint into a new policy and return whether it is the one that was saved."""
    saved = read_checkpoint_info(where)
    fresh = Policy("main", config.agents["main"], config.compute)
    fresh.load_state(where / "main")
    pairs = zip(policy.masters.weights.values(), fresh.masters.weights.values(), strict=True)
    return saved.groups == 12 and all(torch.equal(a, b) for a, b in pairs)


where = RunDirectory(folder / "run").save_checkpoint("rl-00006", save, 2)
if not is_whole():
    cannot("an undamaged checkpoint does not load as it was saved")
bad = []
for name in ("main/weights.safetensors", "state.json"):
    file = where / name
    before = file.read_bytes()
    flipped = before[:-3] + bytes([before[-3] ^ 0x40]) + before[-2:]
    file.write_bytes(before.replace(b'"groups":12', b'"groups":92') if name == "state.json" else flipped)
    try:
        if not is_whole():
            bad.append(f"{name}: one byte changed, loaded without a word")
    except ValueError as error:
        print(f"  {name}: {error}")
    file.write_bytes(before)
if bad:
    fault("; ".join(bad))
held("refused")
