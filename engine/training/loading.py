"""Show how far transformers is with the weights of a model, in place of its own bar."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils.logging import set_tqdm_hook

from mgrpo.engine.report.display import Display

WEIGHTS = "Loading weights"  # what transformers calls the bar


@contextmanager
def loading(display: Display, what: str) -> Iterator[None]:
    """Show what is loaded, and which part of it is, for as long as the block runs."""
    display.doing(what)

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if args and options.get("desc") == WEIGHTS:
            return _counted(args[0], lambda part: display.doing(what, part))
        return factory(*args, **options | {"disable": True})

    before = set_tqdm_hook(bar)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _counted(items: Collection[Any], report: Callable[[float], None]) -> Iterator[Any]:
    for number, each in enumerate(items, 1):
        yield each
        report(number / len(items))
