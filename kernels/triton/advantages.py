# mypy: allow-untyped-defs, allow-incomplete-defs
"""Group advantages in one Triton launch: checks, statistics, values, and the values of the rows' tokens.

Unlike `kernels/advantages.py`, the definition, this runs in float32, on rewards minus their group's lowest, with the
variance in a second pass. A program holds a tile of groups by rows and walks along the rows; it reads them four times,
all but the first from a cache. The kernel only flags bad input, so that the host waits for the GPU once.

Legend: R rows, G groups, T tokens; J groups of a tile, W rows of each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..advantages import Advantages

# (groups, rows, warps) of a tile, for groups of fewer than MANY rows on average, and for larger ones.
MANY = 128
FEW_ROWS_TILE = (4, 16, 1)
MANY_ROWS_TILE = (1, 1024, 4)
# Rows whose tokens are written together, and tokens of each at a time: 32 bytes, a memory transaction.
TOKEN_ROWS, TOKENS = tl.constexpr(32), tl.constexpr(8)


@triton.jit
def _rows(rewards_R, weights_R, first_J, length_J, start, WIDTH: tl.constexpr):
    """Load rewards and weights (0 past the group's end) of each group's next rows; return also places and mask."""
    step_W = start + tl.arange(0, WIDTH)
    inside_JW = step_W[None, :] < length_J[:, None]
    at_JW = first_J[:, None] + step_W[None, :]
    reward_JW = tl.load(rewards_R + at_JW, mask=inside_JW, other=0.0).to(tl.float32)
    if weights_R is None:
        weight_JW = inside_JW.to(tl.float32)
    else:
        weight_JW = tl.load(weights_R + at_JW, mask=inside_JW, other=0).to(tl.float32)
    return reward_JW, weight_JW, at_JW, inside_JW


@triton.jit
def _write_tokens(tokens_T, bounds_R1, values_R, first, last, tokens):
    """Write the values of rows first to last to their tokens; skip rows with bad bounds and return whether any has."""
    bad_W = tl.zeros((TOKEN_ROWS,), tl.int32)
    for start in range(first, last, TOKEN_ROWS):
        row_W = start + tl.arange(0, TOKEN_ROWS)
        value_W = tl.load(values_R + row_W, mask=row_W < last, other=0.0)
        from_W = tl.load(bounds_R1 + row_W, mask=row_W < last, other=0).to(tl.int64)
        to_W = tl.load(bounds_R1 + row_W + 1, mask=row_W < last, other=0).to(tl.int64)
        wrong_W = (from_W > to_W) | (from_W < 0) | (to_W > tokens)
        to_W = tl.where(wrong_W, from_W, to_W)
        bad_W |= wrong_W.to(tl.int32)
        for step in range(0, tl.max(to_W - from_W, 0), TOKENS):
            token_WT = from_W[:, None] + (step + tl.arange(0, TOKENS))[None, :]
            value_WT = tl.broadcast_to(value_W[:, None], token_WT.shape)
            tl.store(tokens_T + token_WT, value_WT, mask=token_WT < to_W[:, None])
    return tl.max(bad_W, 0)


@triton.jit(do_not_specialize=["groups", "rows", "tokens"])
def group_kernel(
    rewards_R,
    weights_R,
    offsets_G1,
    bounds_R1,
    tokens_T,
    values_R,
    mean_G,
    std_G,
    zero_std_G,
    problems,
    groups,
    rows,
    tokens,
    eps,
    LEAVE_ONE_OUT: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Process the groups of one tile.  Set problems, one number, to 1 if an offset, bound, reward or weight is bad."""
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
    zero_J = std_J < eps  # true where nothing counts, as the std there is 0

    scale_J = tl.where(zero_J, 1.0, std_J) if SCALED else tl.full((GROUPS,), 1.0, tl.float32)
    for start in range(0, longest, WIDTH):
        r_JW, w_JW, at_JW, inside_JW = _rows(rewards_R, weights_R, first_J, length_J, start, WIDTH)
        shifted_JW = r_JW - least_J[:, None]
        if LEAVE_ONE_OUT:
            rest_JW = weight_J[:, None] - w_JW
            # The other rows weigh nothing, or so little that float32 lost it.
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
    bad = tl.maximum(tl.max(bad_J.to(tl.int32), 0), tl.max(tl.max(bad_JW, 1), 0))
    if bounds_R1 is not None:
        tl.debug_barrier()  # other threads of this program wrote the rows' values
        first = tl.min(tl.where(length_J > 0, first_J, rows), 0)
        last = tl.max(tl.where(length_J > 0, last_J, 0), 0)
        bad = tl.maximum(bad, _write_tokens(tokens_T, bounds_R1, values_R, first, last, tokens))
    if bad > 0:
        tl.store(problems, 1)


def tile(rows: int, groups: int) -> tuple[int, int, int]:
    """Return (groups, rows, warps) of a tile: one of two, so that few kernels are ever compiled."""
    return MANY_ROWS_TILE if rows >= MANY * groups else FEW_ROWS_TILE


def launch_groups(
    rewards_R: Tensor,
    offsets_G1: Tensor,
    weights_R: Tensor | None,
    bounds_R1: Tensor | None,
    tokens: int,
    *,
    leave_one_out: bool,
    scaled: bool,
    eps: float,
) -> Advantages | None:
    """Return the advantages in float32, with the tokens' values if there are bounds; None if an input value is bad."""
    rows, groups = len(rewards_R), len(offsets_G1) - 1
    new = rewards_R.new_empty
    values_R, mean_G, std_G = (new(size, dtype=torch.float32) for size in (rows, groups, groups))
    zero_std_G, problems = new(groups, dtype=torch.uint8), rewards_R.new_zeros(1, dtype=torch.int32)
    tokens_T = None if bounds_R1 is None else new(tokens, dtype=torch.float32)
    tile_groups, width, warps = tile(rows, groups)
    with torch.cuda.device_of(rewards_R):
        group_kernel[(triton.cdiv(groups, tile_groups),)](
            rewards_R.contiguous(),
            None if weights_R is None else weights_R.contiguous(),
            offsets_G1.contiguous(),
            None if bounds_R1 is None else bounds_R1.contiguous(),
            tokens_T,
            values_R,
            mean_G,
            std_G,
            zero_std_G,
            problems,
            groups,
            rows,
            tokens,
            float(eps),
            LEAVE_ONE_OUT=leave_one_out,
            SCALED=scaled,
            GROUPS=tile_groups,
            WIDTH=width,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return None if bool(problems) else Advantages(values_R, mean_G, std_G, zero_std_G.view(torch.bool), tokens_T)
