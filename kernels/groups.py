# mypy: allow-untyped-defs, allow-incomplete-defs
"""Group advantages in one Triton launch: checks, statistics and values.

Departs from `advantages.py`, the definition, in its dtype: float32, on rewards shifted by their group's least, the
variance in a second pass. A program holds a tile of groups by rows and walks along the rows; it reads them four times,
all but the first from a cache. Bad input is flagged, not refused, so that the host waits for the GPU once.

Legend: R rows, G groups; J groups of a tile, W rows of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# (groups, rows) of a tile and its warps, for groups of fewer than MANY rows on average, and of more.
MANY = 128
FEW_ROWS_TILE = (4, 16, 1)
MANY_ROWS_TILE = (1, 1024, 4)


@triton.jit
def _rows(rewards_R, weights_R, first_J, length_J, start, WIDTH: tl.constexpr):
    """Rewards and weights, 0 past the group's end, of the next rows of each group; their places; which are inside."""
    step_W = start + tl.arange(0, WIDTH)
    inside_JW = step_W[None, :] < length_J[:, None]
    at_JW = first_J[:, None] + step_W[None, :]
    reward_JW = tl.load(rewards_R + at_JW, mask=inside_JW, other=0.0).to(tl.float32)
    if weights_R is None:
        weight_JW = inside_JW.to(tl.float32)
    else:
        weight_JW = tl.load(weights_R + at_JW, mask=inside_JW, other=0).to(tl.float32)
    return reward_JW, weight_JW, at_JW, inside_JW


@triton.jit(do_not_specialize=["groups", "rows"])
def group_kernel(
    rewards_R,
    weights_R,
    offsets_G1,
    values_R,
    mean_G,
    std_G,
    zero_std_G,
    problems,
    groups,
    rows,
    eps,
    LEAVE_ONE_OUT: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The groups of one tile.  problems, one number, becomes 1 if an offset, a reward or a weight is bad."""
    group_J = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    real_J = group_J < groups
    first_J = tl.load(offsets_G1 + group_J, mask=real_J, other=0).to(tl.int64)
    last_J = tl.load(offsets_G1 + group_J + 1, mask=real_J, other=0).to(tl.int64)
    bad_J = real_J & ((first_J > last_J) | (first_J < 0) | (last_J > rows))
    bad_J |= (group_J == 0) & (first_J != 0)
    bad_J |= (group_J == groups - 1) & (last_J != rows)
    length_J = tl.where(bad_J, 0, last_J - first_J)
    longest = tl.max(length_J, 0)

    least_JW = tl.full((GROUPS, WIDTH), float("inf"), tl.float32)
    weight_JW = tl.zeros((GROUPS, WIDTH), tl.float32)
    bad_JW = tl.zeros((GROUPS, WIDTH), tl.int32)
    for start in range(0, longest, WIDTH):
        r_JW, w_JW, at_JW, inside_JW = _rows(rewards_R, weights_R, first_J, length_J, start, WIDTH)
        bad_JW |= 1 - ((tl.abs(r_JW) < float("inf")) & (w_JW >= 0) & (w_JW < float("inf"))).to(tl.int32)
        least_JW = tl.where(w_JW > 0, tl.minimum(least_JW, r_JW), least_JW)
        weight_JW += w_JW
    weight_J = tl.sum(weight_JW, 1)
    least_J = tl.where(weight_J > 0, tl.min(least_JW, 1), 0.0)
    safe_J = tl.where(weight_J > 0, weight_J, 1.0)

    sum_JW = tl.zeros((GROUPS, WIDTH), tl.float32)
    for start in range(0, longest, WIDTH):
        r_JW, w_JW, at_JW, inside_JW = _rows(rewards_R, weights_R, first_J, length_J, start, WIDTH)
        sum_JW += w_JW * (r_JW - least_J[:, None])
    sum_J = tl.sum(sum_JW, 1)
    mean_J = sum_J / safe_J

    square_JW = tl.zeros((GROUPS, WIDTH), tl.float32)
    for start in range(0, longest, WIDTH):
        r_JW, w_JW, at_JW, inside_JW = _rows(rewards_R, weights_R, first_J, length_J, start, WIDTH)
        off_JW = r_JW - least_J[:, None] - mean_J[:, None]
        square_JW += w_JW * off_JW * off_JW
    std_J = tl.sqrt(tl.sum(square_JW, 1) / safe_J)
    zero_J = std_J < eps  # as it is, at 0, where nothing counts

    scale_J = tl.where(zero_J, 1.0, std_J) if SCALED else tl.full((GROUPS,), 1.0, tl.float32)
    for start in range(0, longest, WIDTH):
        r_JW, w_JW, at_JW, inside_JW = _rows(rewards_R, weights_R, first_J, length_J, start, WIDTH)
        shifted_JW = r_JW - least_J[:, None]
        if LEAVE_ONE_OUT:
            rest_JW = weight_J[:, None] - w_JW
            # Nothing else counts, or so little that float32 lost it.
            alone_JW = rest_JW <= 1e-9 * weight_J[:, None]
            others_JW = (sum_J[:, None] - w_JW * shifted_JW) / tl.where(alone_JW, 1.0, rest_JW)
            off_JW = tl.where(alone_JW, 0.0, shifted_JW - others_JW)
        else:
            off_JW = shifted_JW - mean_J[:, None]
        value_JW = tl.where(zero_J[:, None], 0.0, off_JW / scale_J[:, None])
        tl.store(values_R + at_JW, value_JW, mask=inside_JW)

    tl.store(mean_G + group_J, mean_J + least_J, mask=real_J)
    tl.store(std_G + group_J, std_J, mask=real_J)
    tl.store(zero_std_G + group_J, zero_J.to(tl.uint8), mask=real_J)
    if tl.maximum(tl.max(bad_J.to(tl.int32), 0), tl.max(tl.max(bad_JW, 1), 0)) > 0:
        tl.store(problems, 1)


def tile(rows: int, groups: int) -> tuple[int, int, int]:
    """(groups, rows, warps) of a tile: one of two, so that at most two kernels are ever compiled."""
    return MANY_ROWS_TILE if rows >= MANY * groups else FEW_ROWS_TILE


def group_statistics(
    rewards_R: Tensor, offsets_G1: Tensor, weights_R: Tensor | None, *, leave_one_out: bool, scaled: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """values_R, mean_G, std_G (float32) and zero_std_G; None if a reward, a weight or an offset is bad."""
    rows, groups = len(rewards_R), len(offsets_G1) - 1
    new = rewards_R.new_empty
    values_R, mean_G, std_G = (new(size, dtype=torch.float32) for size in (rows, groups, groups))
    zero_std_G, problems = new(groups, dtype=torch.uint8), rewards_R.new_zeros(1, dtype=torch.int32)
    tile_groups, width, warps = tile(rows, groups)
    with torch.cuda.device_of(rewards_R):
        group_kernel[(triton.cdiv(groups, tile_groups),)](
            rewards_R.contiguous(),
            None if weights_R is None else weights_R.contiguous(),
            offsets_G1.contiguous(),
            values_R,
            mean_G,
            std_G,
            zero_std_G,
            problems,
            groups,
            rows,
            float(eps),
            LEAVE_ONE_OUT=leave_one_out,
            SCALED=scaled,
            GROUPS=tile_groups,
            WIDTH=width,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return None if bool(problems) else (values_R, mean_G, std_G, zero_std_G.view(torch.bool))
