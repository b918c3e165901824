"""`python -m mgrpo.bench.gpu check|bench FILE [--rehearse]`: run the cases and write the JSON after every one of them.

--rehearse runs the same cases on a CPU, on shapes so small that their figures say nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import torch

from mgrpo.bench.gpu.session import Session

# What a case needs is imported when it is run, so that what is not installed is left out by its name.
CASES: Mapping[str, Mapping[str, str]] = {
    "check": {
        "attention": "paths.flash",
        "attention in blocks": "paths.blocks",
        "losses": "paths.losses",
        "log-probs": "paths.logprobs",
        "group advantages": "paths.advantages",
        "sampling": "paths.sampling",
        "a policy's step": "paths.policy",
        "a compiled policy's step": "paths.compiled",
        "matmuls": "gemms.rates",
        "the loss in chunks": "chunks.settings",
    },
    "bench": {"a model's forward and backward": "model.speed"},
}


def case(place: str) -> Callable[[Session], None]:
    """Return the function of a case, imported when it is called."""

    def run(session: Session) -> None:
        module, name = place.split(".")
        getattr(import_module(f"mgrpo.bench.gpu.{module}"), name)(session)

    return run


def main(command: str, file: Path, rehearse: bool) -> bool:
    """Run the cases of a command; return whether none of them failed."""
    device = torch.device("cpu" if rehearse else "cuda")
    session = Session(f"gpu {command}", device, file)
    for name, place in CASES[command].items():
        session.run(name, case(place))
    return not session.failed


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1], Path(sys.argv[2]), "--rehearse" in sys.argv[3:]) else 1)
