"""Help the kernel tests: random cases, errors against a float64 truth, and measures of cost."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mgrpo.kernels import Objective

# A kernel's error may be twice that of plain torch in the same dtype, plus this share of the truth's largest value.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}

OBJECTIVES = st.builds(
    Objective,
    clip_low=st.sampled_from([0.0, 0.1, 0.2, 1.0]),
    clip_high=st.sampled_from([0.0, 0.1, 0.28]),
    dual_clip=st.sampled_from([None, 1.3, 3.0]),
    importance=st.sampled_from(["token", "sequence", "trajectory"]),
    kl_coef=st.sampled_from([0.0, 0.3]),
    kl=st.sampled_from(["k1", "k2", "k3"]),
    entropy_coef=st.sampled_from([0.0, 0.2, -0.1]),
    sampler_cap=st.sampled_from([None, 1.1, 2.0, float("inf")]),
)


def double(args: Any) -> Any:
    """Detach every float tensor of a dict, list or tuple, or a single one, and convert it to float64."""
    if isinstance(args, dict):
        return {name: double(value) for name, value in args.items()}
    if isinstance(args, list | tuple):
        return type(args)(double(value) for value in args)
    return args.detach().double() if isinstance(args, Tensor) and args.is_floating_point() else args


def error(got: Tensor, truth: Tensor) -> float:
    """Return the largest absolute error as a share of the truth's largest absolute value."""
    assert got.shape == truth.shape, (got.shape, truth.shape)
    if not truth.numel():
        return 0.0
    got, truth = got.detach().double(), truth.detach()
    return float((got - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def close(got: Tensor, truth: Tensor, tolerance: float = 1e-10) -> bool:
    """Return whether a tensor equals a float64 truth, absolutely or relatively."""
    assert got.shape == truth.shape, (got.shape, truth.shape)
    return bool(torch.isfinite(got).all()) and torch.allclose(got.double(), truth, rtol=tolerance, atol=tolerance)


def within_rule(got: Tensor, plain: Tensor, truth: Tensor) -> bool:
    """Return whether the error is at most twice the plain version's plus the dtype's floor; print the worst if not."""
    good = error(got, truth) <= 2 * error(plain, truth) + FLOOR[plain.dtype]
    return good or tell_worst(got, plain, truth)


def tell_worst(got: Tensor, plain: Tensor, truth: Tensor) -> bool:
    """Print the element with the largest error, for pytest to show; return False, so that it can end a condition."""
    got, plain, truth = (t.detach().double().flatten() for t in (got, plain, truth))
    at = int((got - truth).abs().nan_to_num(torch.inf).argmax())
    print(f"worst element {at}: {got[at]}, where plain torch gives {plain[at]} and the truth is {truth[at]}")
    return False


def ragged(count: int, generator: torch.Generator) -> Tensor:
    """Return the bounds of up to five sequences, some of them empty."""
    cuts = torch.randint(count + 1, (4,), generator=generator).sort().values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([count])])


def loss_case(
    seed: int,
    count: int,
    vocabulary: int,
    width: int = 6,
    *,
    off_policy: bool,
    bias: bool,
    row_temperature: bool,
    scale: float = 1.0,
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """Make random float64 inputs of `linear_grpo_loss`: differentiable ones, other positional ones, keywords.

    A third of the rows is masked and a third has advantage 0; every row's values are valid.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    hidden, weight, bias_V = scale * normal(count, width), normal(vocabulary, width), normal(vocabulary)
    targets = torch.randint(vocabulary, (count,), generator=g)
    some = torch.rand(2, count, generator=g) > 0.33
    temperature = normal(count).abs() + 0.5 if row_temperature else 0.8
    logits = hidden @ weight.T + (bias_V if bias else 0)
    scaled = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logprobs = scaled.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    keywords = {
        "old_logprobs_N": logprobs + 0.3 * normal(count) if off_policy else None,
        "sampler_logprobs_N": logprobs + 0.4 * normal(count) if seed % 2 else None,
        "ref_logprobs_N": logprobs + 0.5 * normal(count),
        "cu_seqlens": ragged(count, g),
        "temperature": temperature,
        "bias_V": bias_V if bias else None,
    }
    return [hidden, weight], [targets, normal(count) * some[0], normal(count).abs() * some[1]], keywords


def gradients(loss: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradient of loss() with respect to each leaf."""
    return list(torch.autograd.grad(loss(), leaves, materialize_grads=True))


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that torch held at once during the work, beyond those held before."""
    watched = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=watched, profile_memory=True, acc_events=True) as profile:
        kept = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


class HostReads(TorchDispatchMode):
    """Count the operations that make the host wait for a GPU: reads of values, and sizes that depend on values."""

    ALWAYS = ("_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select", "unique_dim", "_unique2")

    def __enter__(self) -> "HostReads":
        self.names: list[str] = []
        self._tolist = Tensor.tolist
        Tensor.tolist = lambda tensor: (self.names.append("tolist"), self._tolist(tensor))[1]  # type: ignore
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype == torch.bool for t in (args[1] if isinstance(args[1], list) else ())
        )
        unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in self.ALWAYS or by_mask or unknown_size:
            self.names.append(name)
        return func(*args, **kwargs)
