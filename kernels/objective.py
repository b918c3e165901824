"""The objective: its settings, and the value and slope of each row in closed form.

Everything here works on vectors over rows, never on the vocabulary, so all losses share it, and a caller's `Rule` can
replace it. The clip is written in the log domain: `A * exp(clamp(log rho))` equals `min(rho A, clip(rho) A)`, and a
ratio that overflows is never multiplied by zero. The literal form is in `reference.py`; tests compare the two.

Legend: L live rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Importance = Literal["token", "sequence", "trajectory"]
Kl = Literal["k1", "k2", "k3"]


class RuleRows(NamedTuple):
    """Hold what a rule sees of the rows that count: (L,) each, in nats, float32 or float64 for float64 inputs.

    logprobs, entropies: those of the weights being trained, differentiable. The others are constants: advantages;
    weights, by which the rule's terms are multiplied afterwards; old (on-policy: the log-probs, detached); sampler and
    ref, None if not given. segments: the sequence of each row, int64 in [0, sequences), None without cu_seqlens.
    """

    logprobs: Tensor
    entropies: Tensor
    advantages: Tensor
    weights: Tensor
    old: Tensor
    sampler: Tensor | None
    ref: Tensor | None
    segments: Tensor | None
    sequences: int


@dataclass(frozen=True)
class Objective:
    """Describe what is maximised per row (M-GRPO, arXiv 2511.13288, Eqs. 8-17).

    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; clip_high may be inf.
    dual_clip: for a negative advantage A the term is at least dual_clip * A (arXiv 1912.09729). Must be more than 1;
        None: off.
    importance: the ratio is that of each "token", or one that the sequence shares: "sequence" (geometric mean, GSPO) or
        "trajectory" (product).
    kl_coef, kl: penalty against `ref_logprobs` by estimator k1 (d), k2 (d^2/2), k3 (exp(-d) + d - 1), d = logp - ref.
    entropy_coef: bonus (a negative coefficient is a penalty).
    sampler_cap: rows are weighted by min(exp(old - sampler), sampler_cap), a constant in the gradient. inf: the weight
        is not truncated. None: rows are not weighted, but the gap is still measured.
    rule: a caller's function that replaces all of the above: rule(rows, objective) -> (L,) terms to minimise,
        differentiable in the log-probs and, if wanted, in the entropies. It sees all rows of a micro-batch that count,
        as vectors. Loss and gradient stay fused, at the cost of one more matmul.
    Raises ValueError that names the field.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    importance: Importance = "token"
    kl_coef: float = 0.0
    kl: Kl = "k3"
    entropy_coef: float = 0.0
    sampler_cap: float | None = 2.0
    rule: "Rule | None" = None

    def __post_init__(self) -> None:
        _require("clip_low", self.clip_low, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        _require("clip_high", self.clip_high, lambda x: x >= 0, "a number >= 0")
        _require("kl_coef", self.kl_coef, lambda x: 0 <= x < math.inf, "a finite number >= 0")
        _require("entropy_coef", self.entropy_coef, math.isfinite, "a finite number")
        if self.dual_clip is not None:
            _require("dual_clip", self.dual_clip, lambda x: 1 < x < math.inf, "a finite number > 1 or None")
        if self.sampler_cap is not None:
            _require("sampler_cap", self.sampler_cap, lambda x: x > 0, "a number > 0 or None")
        if self.importance not in get_args(Importance):
            raise ValueError(f"importance: got {self.importance!r}, expected one of {get_args(Importance)}")
        if self.kl not in get_args(Kl):
            raise ValueError(f"kl: got {self.kl!r}, expected one of {get_args(Kl)}")
        if not (self.rule is None or callable(self.rule)):
            raise ValueError(f"rule: got {self.rule!r}, expected a function or None")

    @property
    def needs_every_row(self) -> bool:
        """Whether rows of advantage 0 have a gradient too."""
        return self.kl_coef != 0 or self.entropy_coef != 0 or self.rule is not None

    @property
    def log_low(self) -> float:
        """The lowest log ratio, log(1 - clip_low)."""
        return math.log1p(-self.clip_low) if self.clip_low < 1 else -math.inf

    @property
    def log_high(self) -> float:
        """The highest log ratio, log(1 + clip_high)."""
        return math.log1p(self.clip_high)

    @property
    def log_dual(self) -> float:
        """The log of dual_clip, inf when that is off."""
        return math.inf if self.dual_clip is None else math.log(self.dual_clip)


Rule = Callable[[RuleRows, Objective], Tensor]


def _require(field: str, value: object, holds: Callable[[float], bool], expected: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and holds(value)):  # type: ignore[arg-type]
        raise ValueError(f"{field}: got {value!r}, expected {expected}")


def policy_gain(log_ratio_L: Tensor, advantages_L: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the clipped gain of each row and its derivative with respect to the log of the ratio.

    A ratio at a bound is inside, and keeps its derivative.
    """
    below_L = log_ratio_L.clamp(objective.log_low, objective.log_dual)
    above_L = log_ratio_L.clamp(max=objective.log_high)
    clipped_L = torch.where(advantages_L < 0, below_L, above_L)
    gain_L = advantages_L * clipped_L.exp()
    return gain_L, torch.where(clipped_L == log_ratio_L, gain_L, 0)  # d/dx A exp(x) = A exp(x), and 0 where clipped


def _k1(delta_L: Tensor) -> tuple[Tensor, Tensor]:
    return delta_L, torch.ones_like(delta_L)


def _k2(delta_L: Tensor) -> tuple[Tensor, Tensor]:
    return delta_L.square() / 2, delta_L


def _k3(delta_L: Tensor) -> tuple[Tensor, Tensor]:
    expm1_L = torch.expm1(-delta_L)
    return expm1_L + delta_L, -expm1_L


# Each returns an estimate of KL(current || reference) per row and its derivative, from delta = logp - ref (Schulman,
# "Approximating KL divergence", 2020).
KL_TERMS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"k1": _k1, "k2": _k2, "k3": _k3}
