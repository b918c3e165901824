"""mgrpo.engine: training policies, and the parts that another trainer may take. What follows is the public face.

Imported at first use: `import mgrpo.engine` by itself loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgrpo.engine.batch.groups import GroupAdvantages as GroupAdvantages
    from mgrpo.engine.batch.groups import advantages as advantages
    from mgrpo.engine.batch.groups import align as align
    from mgrpo.engine.batch.micro_batches import Batch as Batch
    from mgrpo.engine.batch.packing import pack as pack
    from mgrpo.engine.config.schema import AgentConfig as AgentConfig
    from mgrpo.engine.config.schema import ComputeConfig as ComputeConfig
    from mgrpo.engine.policy.forward import Output as Output
    from mgrpo.engine.policy.policy import Policy as Policy
    from mgrpo.kernels import Objective as Objective

_HOME = {
    "Policy": "policy.policy",
    "Output": "policy.forward",
    "Batch": "batch.micro_batches",
    "AgentConfig": "config.schema",
    "ComputeConfig": "config.schema",
    "pack": "batch.packing",
    "align": "batch.groups",
    "advantages": "batch.groups",
    "Advantages": "batch.groups",
}


def __getattr__(name: str) -> Any:
    if name == "Objective":
        return import_module("mgrpo.kernels").Objective
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME, "Objective"]
