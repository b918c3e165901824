"""Train systems of several LLM agents by M-GRPO. The names in `__all__` are the public interface.

Nothing is loaded before its first use: `import mgrpo` alone loads neither torch nor numpy, and `mgrpo.kernels` needs
only torch and triton. `mgrpo.engine` knows the module that defines each name.
"""

# This file is installed as mgrpo/__init__.py. It is not kept in a folder named mgrpo/: such a folder at the top of a
# clone would hide the installed package from every Python that is started there.

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgrpo.engine import (
        MAIN,
        Action,
        AgentConfig,
        Answer,
        Batch,
        Call,
        CallScore,
        ChatLoop,
        ComputeConfig,
        Config,
        Delegate,
        Environment,
        Episode,
        GroupAdvantages,
        LoggedRollout,
        LoggedRun,
        Logger,
        Malformed,
        MathAnswers,
        Objective,
        Output,
        Policy,
        Score,
        Split,
        Task,
        TextGame,
        ToolCall,
        ToolError,
        Trajectory,
        Turn,
        advantages,
        align,
        load_config,
        pack,
        read_dataset,
        read_tasks,
    )

    __version__: str

__all__ = [
    "__version__",
    # the environment of a run
    "Environment",
    "TextGame",
    "ChatLoop",
    "Split",
    "Task",
    "read_tasks",
    "read_dataset",
    "MAIN",
    "Action",
    "Answer",
    "ToolCall",
    "Delegate",
    "Malformed",
    "ToolError",
    "Turn",
    "Call",
    "Episode",
    "CallScore",
    "Score",
    "Trajectory",
    "MathAnswers",
    # a run's configuration
    "Config",
    "AgentConfig",
    "ComputeConfig",
    "load_config",
    # your own logger of a run
    "Logger",
    "LoggedRun",
    "LoggedRollout",
    # parts for another trainer
    "Policy",
    "Batch",
    "Output",
    "Objective",
    "pack",
    "align",
    "advantages",
    "GroupAdvantages",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("mgrpo")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("mgrpo.engine"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
