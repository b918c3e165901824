"""mgrpo.engine: training policies, and the parts that another trainer may take. What follows is the public face.

Imported at first use: `import mgrpo.engine` by itself loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgrpo.engine.batch import Batch as Batch
    from mgrpo.engine.config import AgentConfig as AgentConfig
    from mgrpo.engine.config import ComputeConfig as ComputeConfig
    from mgrpo.engine.groups import Advantages as Advantages
    from mgrpo.engine.groups import advantages as advantages
    from mgrpo.engine.groups import align as align
    from mgrpo.engine.packing import pack as pack
    from mgrpo.engine.passes import Output as Output
    from mgrpo.engine.policy import Policy as Policy
    from mgrpo.kernels import Objective as Objective

_HOME = {
    "Policy": "policy",
    "Output": "passes",
    "Batch": "batch",
    "AgentConfig": "config",
    "ComputeConfig": "config",
    "pack": "packing",
    "align": "groups",
    "advantages": "groups",
    "Advantages": "groups",
}


def __getattr__(name: str) -> Any:
    if name == "Objective":
        return import_module("mgrpo.kernels").Objective
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME, "Objective"]
