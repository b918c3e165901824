"""Run a head that is split by vocabulary in several processes, and compare it with the whole head."""

from __future__ import annotations

import datetime
import itertools
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from mgrpo.kernels import Objective, linear_grpo_loss, linear_logprob
from mgrpo.kernels import dispatch as device
from numerics import close, gradients, loss_case

VOCABULARY = 23
SPLITS = {2: [(11, 12), (23, 0), (1, 22)], 3: [(8, 8, 7), (20, 0, 3), (0, 0, 23)]}
FULL = {"kl_coef": 0.1, "entropy_coef": 0.1, "dual_clip": 3.0}
OBJECTIVES = [Objective(), *(Objective(importance=i, **FULL) for i in ("token", "sequence", "trajectory"))]


def run_ranks(work, ranks, folder, *, where="cpu"):
    """Call work(rank, group) in as many processes; an assertion that fails in any of them fails here."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    spawn(_join, (work, ranks, f"file://{folder}/rendezvous", where, interpreted), nprocs=ranks)


def _join(rank, work, ranks, rendezvous, where, interpreted):
    device.interpreted = interpreted
    torch.set_default_device(where)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
    )
    work(rank, dist.group.WORLD)
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends: "terminate called without an active exception"


def shards(leaves, split, rank):
    """Return the hidden states as they are, and this rank's rows of weight and bias."""
    start = sum(split[:rank])
    parts = [leaves[0], *(leaf[start : start + split[rank]] for leaf in leaves[1:])]
    return [part.detach().clone().requires_grad_() for part in parts]


def assert_shards_agree(function, leaves, split, rank, group, tolerance):
    """Check that function(leaves, group) returns the same tensors, and gradients of the first, as without a group."""
    mine = shards(leaves, split, rank)
    whole = [leaf.detach().requires_grad_() for leaf in leaves]
    got, truth = function(mine, group), function(whole, None)
    for a, b in zip(got, truth, strict=True):
        assert close(a.detach(), b.detach().double(), tolerance), (split, a, b)
    start = sum(split[:rank])
    rows = [slice(None), *([slice(start, start + split[rank])] * (len(leaves) - 1))]
    grads = zip(gradients(lambda: got[0] / 3, mine), gradients(lambda: truth[0] / 3, whole), rows, strict=True)
    for a, b, own in grads:
        assert a.dtype == b.dtype and close(a, b[own].double(), tolerance), (split, a, b[own])
    everywhere = [torch.empty_like(got[0]) for _ in split]
    dist.all_gather(everywhere, got[0].detach(), group=group)
    assert all(torch.equal(x, got[0]) for x in everywhere)


def kernels_dtype():
    """Return the dtype of the case and the tolerance for it: the kernels take float32 at most."""
    narrow = device.interpreted or torch.get_default_device().type == "cuda"
    return (torch.float32, 2e-5) if narrow else (torch.float64, 1e-9)


def moved(args, dtype):
    """Move the tensors of a dict or a list to the default device, those of floats to the dtype."""
    if isinstance(args, dict):
        return dict(zip(args, moved(list(args.values()), dtype), strict=True))
    where = torch.get_default_device()
    return [x.to(where, dtype if x.is_floating_point() else x.dtype) if torch.is_tensor(x) else x for x in args]


def losses_agree(rank, group):
    """Check the losses of all objectives, and their gradients."""
    dtype, tolerance = kernels_dtype()
    for (seed, split), (at, objective) in itertools.product(enumerate(SPLITS[group.size()]), enumerate(OBJECTIVES)):
        with torch.device("cpu"):
            settings = {"off_policy": at != 2, "bias": bool((seed + at) % 2), "row_temperature": bool(at % 2)}
            heads, others, keywords = loss_case(seed, 14, VOCABULARY, **settings)
        bias = keywords.pop("bias_V")
        leaves = moved([*heads, *([] if bias is None else [bias])], dtype)
        others, keywords = moved(others, dtype), moved(keywords, dtype)

        keywords["softcap"] = 2.0 if at == 3 else None

        def loss(parts, group, others=others, objective=objective, keywords=keywords):
            extra = {"bias_V": parts[2]} if len(parts) > 2 else {}
            got = linear_grpo_loss(*parts[:2], *others, objective, **keywords, **extra, chunk_rows=5, group=group)
            return [got.loss, got.logprobs_N, got.entropy_N, *got.metrics.values()]

        assert_shards_agree(loss, leaves, split, rank, group, tolerance)


def masters_get_their_rows(rank, group):
    """Check that the master of a rank's rows, possibly none, gets what autograd adds to them."""
    dtype, tolerance = kernels_dtype()
    heads, others, keywords = loss_case(4, 14, VOCABULARY, off_policy=True, bias=False, row_temperature=False)
    leaves, others, keywords = moved(heads, dtype), moved(others, dtype), moved(keywords, dtype)
    for split in SPLITS[group.size()]:
        plain, summed = (shards(leaves, split, rank) for _ in range(2))
        master = torch.nn.Parameter(summed[1].detach().clone())
        for given, extra in ((plain, {}), (summed, {"master_VH": master})):
            for _ in range(2):
                linear_grpo_loss(*given, *others, Objective(), **keywords, **extra, group=group).loss.backward()
        assert summed[1].grad is None and close(master.grad, plain[1].grad.double(), tolerance)
        assert torch.equal(summed[0].grad, plain[0].grad)


def logprobs_agree(rank, group):
    """Check log-probs and entropies, also with a shard of no possible token and one that dominates."""
    dtype, tolerance = kernels_dtype()
    g = torch.Generator().manual_seed(9)
    shapes = ((9, 6), (VOCABULARY, 6), (VOCABULARY,))
    leaves = moved([torch.randn(*shape, generator=g, device="cpu") for shape in shapes], dtype)
    leaves[2][:11] = -torch.inf  # a shard without a single token that may be chosen
    leaves[2][12] = 1e4  # and one that dominates
    targets = torch.tensor([11, 12, 22, 13, 14, 15, 16, 12, 20])

    def work(softcap, parts, group):
        settings = {"temperature": 0.6, "softcap": softcap}
        logprobs, entropy = linear_logprob(*parts[:2], targets, bias_V=parts[2], group=group, **settings)
        at = torch.arange(9, dtype=dtype)
        return [(logprobs * at.cos()).sum() + (entropy * at.sin()).sum(), logprobs, entropy]

    for split, softcap in itertools.product(SPLITS[group.size()], (None, 2.0)):
        assert_shards_agree(partial(work, softcap), leaves, split, rank, group, tolerance)


def mistakes_are_refused_everywhere(rank, group):
    """Check that a mistake of any rank is an error on all."""

    def call(rows=3, **changes):
        inputs = {
            "hidden_NH": torch.ones(2, 4, requires_grad=True),
            "weight_VH": torch.ones(rows, 4, requires_grad=True),
            "targets_N": torch.tensor([0, 5]),
        }
        return linear_logprob(**(inputs | changes), group=group)

    call()
    total = 3 * group.size()
    for message, changes in (
        (rf"targets_N: got {total} at row 1, expected in \[0, {total}\)", {"targets_N": torch.tensor([0, total])}),
        ("targets_N: got -1 at row 0", {"targets_N": torch.tensor([-1, 0])}),
        ("weight_VH: got no rows on any rank", {"rows": 0}),
        ("group: got rows .* by rank", {"hidden_NH": torch.ones(2 + rank, 4)}),
        ("group: got chunk_rows", {"chunk_rows": 1 + rank}),
        ("group: got buffer_bytes", {"buffer_bytes": 1 + rank}),
        ("group: got gradient of hidden_NH", {"hidden_NH": torch.ones(2, 4, requires_grad=rank == 0)}),
        # Only one rank makes a mistake: its error says which, and those of the others that there was one.
        (r"group: got sound head \[0, 1" if rank else "weight_VH", {"weight_VH": torch.ones(3, 4 + (rank == 0))}),
        ("bias_V" if rank == 1 else "group: got sound head", {"bias_V": torch.ones(3 + (rank == 1))}),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)
    call()


def everything(rank, group):
    """Check all of the above."""
    losses_agree(rank, group)
    masters_get_their_rows(rank, group)
    logprobs_agree(rank, group)
    mistakes_are_refused_everywhere(rank, group)
