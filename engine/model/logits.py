"""Describe what a model does to the head's output to get its logits: it may cap them and multiply them.

The check at start (model/probe.py) finds it and keeps it with the model. The trainer hands it to the kernels; the
sampler applies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

KEPT = "mgrpo_logit_map"  # attribute of a model
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # keys of a config: the logits' bound
ONE = 1e-2  # a slope so near to 1 is 1, measured with rounding


@dataclass(frozen=True)
class LogitMap:
    """Map the head's output x to logits: scale * x or, with a softcap c, scale * c * tanh(x / c).

    A model that multiplies by s before it caps at c has such a map too, with the scale s and the softcap c / s.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, head_output: Tensor) -> Tensor:
        capped = head_output
        if self.softcap is not None:
            capped = (head_output / self.softcap).tanh() * self.softcap
        return capped * self.scale


def logit_map(model: PreTrainedModel) -> LogitMap:
    """Return how the model's logits follow from the head's output, as the check at start found."""
    found: LogitMap = vars(model).get(KEPT, LogitMap())
    return found


def keep_logit_map(model: PreTrainedModel, found: LogitMap) -> None:
    """Keep that map with the model; deep copies of it have it too."""
    vars(model)[KEPT] = found


def softcap_of(config: Any) -> float | None:
    """Return the bound of the logits that a model's config names, if any."""
    text = config.get_text_config()
    return next((float(value) for name in CAPS if (value := getattr(text, name, None))), None)


def possible_maps(pairs: Sequence[tuple[Tensor, Tensor]], bound: float | None) -> Iterator[LogitMap]:
    """Yield the maps that a model with this bound may have, given some of the head's output and the logits made of it.

    pairs: vectors of float64 over the vocabulary. The slope of the map at 0 is taken from the smallest of them.
    """
    plain_V, truth_V = min(pairs, key=lambda pair: float(pair[0].abs().max()))
    slope = float(plain_V @ truth_V / (plain_V @ plain_V))
    if not slope > 0:
        return
    scale = 1.0 if abs(slope - 1) < ONE else slope
    yield LogitMap(scale)
    if bound is not None:
        yield LogitMap(scale, bound / scale)  # the model multiplies, then caps
        yield LogitMap(scale, bound)
