"""Compare the kernels of the rows' vectors, which check them, pick the live ones and add up, with plain PyTorch."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, as_good, kernels_take_the_tensors, placed, skip_unless_kernels_run

from mgrpo.kernels import Objective, dispatch, linear_grpo_loss, logprob_loss, token_logprob
from mgrpo.kernels.inputs import find_live, given_rows
from mgrpo.kernels.metrics import loss_and_metrics
from mgrpo.kernels.terms import LossRows
from numerics import OBJECTIVES, double, gradients, loss_case, ragged

skip_unless_kernels_run()
__all__ = ["kernels_take_the_tensors"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")]
EVERYTHING = Objective(kl_coef=0.1, entropy_coef=0.1, dual_clip=3.0)


def plainly(function):
    """Call the function without the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "takes_kernels", lambda *_: False)
        for module in ("inputs", "metrics", "logprob"):
            patch.setattr(f"mgrpo.kernels.{module}.takes_kernels", lambda *_: False)
        return function()


def vectors(count, seed, kinds=(torch.float32,) * 5):
    """Return advantages, weights (a third of both 0), old, sampler and reference log-probs; bounds and targets."""
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(count, generator=g) for _ in kinds]
    for values_N in values[:2]:
        values_N[torch.rand(count, generator=g) < 1 / 3] = 0
    values = [values_N.to(kind) for values_N, kind in zip(values, kinds, strict=True)]
    return placed((values, ragged(count, g), torch.randint(50, (count,), generator=g)))


def same(got, plain):
    """Compare what two calls of `find_live` return, to the bit; a segment that nothing reads may be left out."""
    assert got[0].sequences == plain[0].sequences
    pairs = [*zip(vars(got[0]).items(), vars(plain[0]).values(), strict=True)][:-1]
    for (name, a), b in [*pairs, *((("", a), b) for a, b in zip(got[1:], plain[1:], strict=True))]:
        if name == "segment_L" and a is None:
            continue
        assert type(a) is type(b), name
        assert a == b if not torch.is_tensor(a) else a.dtype == b.dtype and torch.equal(a, b), name


@given(
    st.integers(0, 2**20),
    st.integers(1, 40),
    st.sampled_from(["token", "sequence"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, ()]) | st.just("rows"),
)
@settings(max_examples=60, derandomize=True)
def test_the_live_rows_are_those_of_plain_torch(seed, count, importance, every, bounded, temperature):
    values, bounds, targets = vectors(count, seed)
    values[3] = None if seed % 2 else values[3]
    objective = Objective(importance=importance, entropy_coef=0.1 if every else 0.0)
    if temperature is not None:
        temperature = torch.rand(count if temperature == "rows" else (), device=DEVICE) + 0.5
    bounds = bounds if bounded or importance != "token" else None

    def found():
        rows = given_rows(tuple(values), bounds, count, objective, torch.float32, targets.device)
        return find_live(rows, targets, 1.0 if temperature is None else temperature, 50)

    same(found(), plainly(found))


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 2049, 5000])
@pytest.mark.parametrize("objective", [Objective(), Objective(importance="trajectory"), Objective(kl_coef=0.1)])
def test_more_rows_than_a_program_has(objective, count):
    kinds = (torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.float32)
    values, bounds, targets = vectors(count, count, kinds)

    def found():
        rows = given_rows(tuple(values), bounds.int(), count, objective, torch.float32, targets.device)
        return find_live(rows, targets, 1.0, 50)

    same(found(), plainly(found))


GOOD = {
    "hidden_NH": torch.ones(3, 4),
    "weight_VH": torch.ones(7, 4),
    "targets_N": torch.tensor([0, 6, -1]),
    "advantages_N": torch.tensor([1.0, 1.0, torch.nan]),
    "loss_weights_N": torch.tensor([1.0, 1.0, 0.0]),
    "old_logprobs_N": torch.tensor([0.0, torch.inf, torch.nan]),
    "temperature": torch.tensor([1.0, 2.0, -1.0]),
    "cu_seqlens": torch.tensor([0, 3]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages_N": torch.tensor([0, torch.nan, 0])}, "advantages_N: got nan at row 1"),
        ({"advantages_N": torch.tensor([0, 0, 0, torch.inf])[1:], "loss_weights_N": torch.ones(3)}, "inf at row 2"),
        ({"loss_weights_N": torch.tensor([0, 0, torch.inf])}, "loss_weights_N: got inf at row 2"),
        ({"loss_weights_N": torch.tensor([torch.nan, 0, 0])}, "loss_weights_N: got nan at row 0"),
        ({"targets_N": torch.tensor([0, 7, 0])}, "targets_N: got 7 at row 1"),
        ({"targets_N": torch.tensor([-100, 0, 0])}, "targets_N: got -100 at row 0"),
        ({"old_logprobs_N": torch.tensor([0, torch.nan, 0])}, "old_logprobs_N: got nan at row 1"),
        ({"sampler_logprobs_N": torch.tensor([torch.nan, 0, 0])}, "sampler_logprobs_N: got nan at row 0"),
        ({"ref_logprobs_N": torch.tensor([torch.nan, 0, 0])}, "ref_logprobs_N: got nan at row 0"),
        ({"temperature": torch.tensor([1.0, torch.inf, 1.0])}, "temperature: got inf at row 1"),
        ({"temperature": torch.tensor([0.0, 1.0, 1.0])}, "temperature: got 0.0 at row 0"),
        ({"temperature": torch.tensor(torch.nan)}, "temperature: got nan"),
        ({"cu_seqlens": torch.tensor([0, 2])}, r"cu_seqlens: got first and last \(0, 2\)"),
        ({"cu_seqlens": torch.tensor([1, 3])}, r"cu_seqlens: got first and last \(1, 3\)"),
        ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens: got first and last \(0, 0\)"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, "cu_seqlens: got a fall"),
        ({"cu_seqlens": torch.tensor([0, 9, 3])}, "cu_seqlens: got a fall"),
        ({"cu_seqlens": torch.tensor([0, -9, 3])}, "cu_seqlens: got a fall"),
    ],
)
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_a_bad_value_is_named_and_one_that_does_not_count_is_not_read(change, message, importance):
    linear_grpo_loss(objective=Objective(importance=importance), **placed(GOOD))
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(objective=Objective(importance=importance), **placed(GOOD | change))


def test_a_number_that_only_float64_can_hold_is_refused_on_both_paths():
    huge = placed(GOOD | {"loss_weights_N": torch.tensor([0.0, 1e300, 0.0], dtype=torch.float64)})
    for call in (plainly, lambda function: function()):
        with pytest.raises(ValueError, match="loss_weights_N: got inf at row 1"):
            call(lambda: linear_grpo_loss(objective=Objective(), **huge))


@pytest.mark.parametrize("name", ["logprobs_N", "entropies_N"])
def test_log_probs_that_are_inputs_are_checked_too(name):
    given = {"logprobs_N": torch.zeros(3), "entropies_N": torch.zeros(3), "advantages_N": torch.ones(3)}
    given = placed(given | {"loss_weights_N": torch.tensor([1.0, 1.0, 0.0]), "objective": Objective()})
    given[name][2] = torch.nan
    assert logprob_loss(**given).loss == -2
    given[name][1] = torch.nan
    with pytest.raises(ValueError, match=f"{name}: got nan at row 1"):
        logprob_loss(**given)


@pytest.mark.parametrize("target", [-1, 5])
def test_log_probs_check_every_row(target):
    targets, logits = placed(torch.tensor([0, 4])), torch.zeros(2, 5, device=DEVICE)
    token_logprob(logits, targets)
    targets[1] = target
    with pytest.raises(ValueError, match=f"targets_N: got {target} at row 1"):
        token_logprob(logits, targets)


def rows_of(values, bounds, segments):
    segment_L = torch.repeat_interleave(torch.arange(len(bounds) - 1, device=DEVICE), bounds.diff())
    return LossRows(*values, segment_L if segments else None, len(bounds) - 1)


@given(st.integers(0, 2**20), st.integers(1, 40), OBJECTIVES, st.sets(st.sampled_from([2, 3, 4])), st.floats(0.01, 20))
@settings(max_examples=150, derandomize=True)
def test_loss_metrics_and_slopes_are_as_good_as_plain(seed, count, objective, missing, spread):
    values, bounds, _ = vectors(count, seed)
    g = torch.Generator().manual_seed(seed)
    logprobs, entropy = placed([-torch.rand(count, generator=g) * 5, torch.rand(count, generator=g)])
    for place in (2, 3, 4):
        values[place] = logprobs + values[place] * spread / 5
        if place in missing and not (place == 4 and objective.kl_coef):
            values[place] = None
    rows = rows_of(values, bounds, objective.importance != "token")

    def all_of(logprobs, entropy, rows):
        loss, metrics, slopes = loss_and_metrics(logprobs, entropy, rows, objective, with_slopes=True)
        return {"loss": loss} | metrics | {f"slope {i}": x for i, x in enumerate(slopes) if x is not None}

    got = all_of(logprobs, entropy, rows)
    plain = plainly(lambda: all_of(logprobs, entropy, rows))
    truth = plainly(lambda: all_of(*double([logprobs, entropy]), LossRows(**double(vars(rows)))))
    assert got.keys() == plain.keys()
    for name, value in got.items():
        assert value.dtype == torch.float32 and value.shape == plain[name].shape
        if name not in ("clip_low", "clip_high", "sampler_capped"):  # counts may differ by a ratio at the bound
            size = float(truth["slope 0"].abs().sum()) if name == "loss" else count * 5.0
            assert as_good(value, plain[name], truth[name], size), name
        else:
            assert abs(value - plain[name]) <= 1


def test_rows_at_a_bound_and_counts_are_those_of_plain_torch():
    log_ratio = torch.tensor([0.0, -9.0, 9.0, -9.0, 9.0, 0.0])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, 0.0])
    values = placed([advantages, torch.ones(6), -log_ratio, -log_ratio - 9, None])
    for objective in (Objective(), Objective(clip_low=0.0, clip_high=0.0), Objective(dual_clip=3.0)):
        zero = torch.zeros(6, device=DEVICE)
        rows = LossRows(*values, None, 0)
        task = partial(loss_and_metrics, zero, zero, rows, objective, with_slopes=True)
        got, plain = task(), plainly(task)
        for name in plain[1]:
            torch.testing.assert_close(got[1][name], plain[1][name], msg=name)
        assert torch.equal(got[2][0] == 0, plain[2][0] == 0)


@pytest.mark.parametrize("count", [1023, 1025, 4100])
def test_sums_over_several_steps_of_the_program(count):
    values, _, _ = vectors(count, 3)
    logprobs, entropy = placed([-torch.rand(count), torch.rand(count)])
    rows = LossRows(*values, None, 0)
    got = loss_and_metrics(logprobs, entropy, rows, EVERYTHING)[:2]
    truth = plainly(lambda: loss_and_metrics(*double([logprobs, entropy]), LossRows(**double(vars(rows))), EVERYTHING))
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-4, atol=1e-3)
    for name in truth[1]:
        torch.testing.assert_close(got[1][name].double(), truth[1][name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_the_loss_and_the_metrics(bad):
    """Give a log-prob and a sampler's log-prob that is not finite: no minimum or maximum may hide it."""
    values = placed([torch.ones(4), torch.ones(4), torch.zeros(4), torch.zeros(4), torch.zeros(4)])
    entropy = torch.ones(4, device=DEVICE)
    for place in (None, 3):
        logprobs, rows = torch.zeros(4, device=DEVICE), LossRows(*(x.clone() for x in values), None, 0)
        (logprobs if place is None else rows.sampler_L)[1] = bad
        task = partial(loss_and_metrics, logprobs, entropy, rows, Objective())
        got, plain = task(), plainly(task)
        torch.testing.assert_close(got[0], plain[0], equal_nan=True)
        for name in plain[1]:
            torch.testing.assert_close(got[1][name], plain[1][name], equal_nan=True, msg=name)


@given(st.integers(0, 2**20), st.integers(1, 30), OBJECTIVES)
@settings(max_examples=30, derandomize=True)
def test_the_gradient_of_log_probs_is_as_good_as_plain(seed, count, objective):
    _, (_, *others), keywords = loss_case(seed, count, 7, off_policy=True, bias=False, row_temperature=False)
    named = {name: keywords[name] for name in keywords if name not in ("bias_V", "temperature")}
    others, named = placed(others, torch.float32), placed(named, torch.float32)
    leaves = [x.requires_grad_() for x in placed([-torch.rand(count) * 4, torch.rand(count)])]

    def both(leaves, others, named):
        loss = logprob_loss(leaves[0], *others, objective, entropies_N=leaves[1], **named).loss
        return [loss.detach(), *gradients(lambda: loss, leaves)]

    got = both(leaves, others, named)
    plain = plainly(lambda: both(leaves, others, named))
    truth = both([x.requires_grad_() for x in double(leaves)], double(others), double(named))
    for a, b, c in zip(got, plain, truth, strict=True):
        assert as_good(a, b, c, float(others[1].max()))
