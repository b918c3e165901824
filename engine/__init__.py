"""Train policies, and offer the parts that another trainer may take: this module has the engine's public names.

Each name is imported at its first use, so that `import mgrpo.engine` by itself loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgrpo.engine.batch.advantages import GroupAdvantages as GroupAdvantages
    from mgrpo.engine.batch.advantages import advantages as advantages
    from mgrpo.engine.batch.advantages import align as align
    from mgrpo.engine.batch.micro_batches import Batch as Batch
    from mgrpo.engine.batch.packing import pack as pack
    from mgrpo.engine.config.schema import AgentConfig as AgentConfig
    from mgrpo.engine.config.schema import ComputeConfig as ComputeConfig
    from mgrpo.engine.config.schema import Config as Config
    from mgrpo.engine.config.schema import load_config as load_config
    from mgrpo.engine.environment.adapters import ChatLoop as ChatLoop
    from mgrpo.engine.environment.adapters import TextGame as TextGame
    from mgrpo.engine.environment.base import Environment as Environment
    from mgrpo.engine.environment.base import Split as Split
    from mgrpo.engine.environment.base import ToolError as ToolError
    from mgrpo.engine.environment.base import read_tasks as read_tasks
    from mgrpo.engine.environment.math_answers import MathAnswers as MathAnswers
    from mgrpo.engine.hub.data import read_dataset as read_dataset
    from mgrpo.engine.policy.forward import Output as Output
    from mgrpo.engine.policy.policy import Policy as Policy
    from mgrpo.engine.report.loggers.base import LoggedRollout as LoggedRollout
    from mgrpo.engine.report.loggers.base import LoggedRun as LoggedRun
    from mgrpo.engine.report.loggers.base import Logger as Logger
    from mgrpo.engine.types import MAIN as MAIN
    from mgrpo.engine.types import Action as Action
    from mgrpo.engine.types import Answer as Answer
    from mgrpo.engine.types import Call as Call
    from mgrpo.engine.types import CallScore as CallScore
    from mgrpo.engine.types import Delegate as Delegate
    from mgrpo.engine.types import Episode as Episode
    from mgrpo.engine.types import Malformed as Malformed
    from mgrpo.engine.types import Score as Score
    from mgrpo.engine.types import Task as Task
    from mgrpo.engine.types import ToolCall as ToolCall
    from mgrpo.engine.types import Trajectory as Trajectory
    from mgrpo.engine.types import Turn as Turn
    from mgrpo.kernels import Objective as Objective

_HOME = {
    "Environment": "environment.base",
    "Split": "environment.base",
    "ToolError": "environment.base",
    "read_tasks": "environment.base",
    "read_dataset": "hub.data",
    "ChatLoop": "environment.adapters",
    "MathAnswers": "environment.math_answers",
    "TextGame": "environment.adapters",
    "Config": "config.schema",
    "load_config": "config.schema",
    "Logger": "report.loggers.base",
    "LoggedRun": "report.loggers.base",
    "LoggedRollout": "report.loggers.base",
    "MAIN": "types",
    "Action": "types",
    "Answer": "types",
    "Call": "types",
    "CallScore": "types",
    "Delegate": "types",
    "Episode": "types",
    "Malformed": "types",
    "Score": "types",
    "Task": "types",
    "ToolCall": "types",
    "Trajectory": "types",
    "Turn": "types",
    "Policy": "policy.policy",
    "Output": "policy.forward",
    "Batch": "batch.micro_batches",
    "AgentConfig": "config.schema",
    "ComputeConfig": "config.schema",
    "pack": "batch.packing",
    "align": "batch.advantages",
    "advantages": "batch.advantages",
    "GroupAdvantages": "batch.advantages",
}


def __getattr__(name: str) -> Any:
    if name == "Objective":
        return import_module("mgrpo.kernels").Objective
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME, "Objective"]
