"""A trajectory file whose bytes changed is trained on as it is, though the store has a digest of the tokens.

A flipped bit on a disk, a copy that went wrong, or a store row that points to another trajectory go unnoticed: nothing
compares the tokens with `CallRecord.digest`.
"""

from pathlib import Path

import numpy as np

from mgrpo.engine.policy.policy import Policy
from mgrpo.engine.run.trajectories import Position, TrajectoryWriter
from mgrpo.engine.store import CallRecord
from mgrpo.engine.training.trainer import AgentTrainer
from mgrpo.engine.types import Trajectory
from reproduction import cannot, fault, held
from reproduction.runs import new_folder
from toy import make_model, toy_config

folder = new_folder()
make_model(folder / "model")
config = toy_config(folder)
root = str(folder / "trajectories")
writer = TrajectoryWriter(root, "main")
sampled = np.arange(20) > 9
logprobs = np.where(sampled, np.float32(-1), np.float32(0))
written = [Trajectory(np.full(20, 60 + i, np.int32), sampled, logprobs, 0) for i in range(2)]
positions = writer.append(written)
writer.close()
trainer = AgentTrainer(config, Policy("main", config.agents["main"], config.compute), root)


def read(position: Position) -> Trajectory:
    """Read the first trajectory as the trainer does, by a record that says where it is."""
    t = written[0]
    record = CallRecord(
        "main", 0, 0, 0, True, None, 0, 20, 10, 1, False, "answer", position, 0, 0, t.rows, t.digest, t.sampler_digest
    )
    (found,) = trainer._read([record])
    return found


if read(positions[0]).digest != written[0].digest:
    cannot("an undamaged file is not read as it was written")
file = Path(root) / positions[0].file
whole = file.read_bytes()
at = whole.index((60).to_bytes(4, "little") * 20)
CASES = {  # the file's bytes, and where the record points to
    "a token's bit flipped in the file": (whole[:at] + b"\x3d" + whole[at + 1 :], positions[0]),
    "the row's position off by one": (whole, Position(positions[0].file, positions[0].offset, 1)),
}
bad = []
for what, (content, position) in CASES.items():
    file.write_bytes(content)
    try:
        found = read(position)
        if found.digest != written[0].digest:
            tokens = f"{found.tokens[:3].tolist()}… instead of {written[0].tokens[:3].tolist()}…"
            bad.append(f"{what}: read without a word, tokens {tokens}")
    except ValueError as error:
        print(f"  {what}: {error}")
if bad:
    fault("; ".join(bad))
held("both refused")
