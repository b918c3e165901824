"""Define what the user writes: tasks, prompts, tools and scores; and how that code is loaded and called."""

from mgrpo.engine.environment.base import Environment, ToolError, read_tasks

__all__ = ["Environment", "ToolError", "read_tasks"]
