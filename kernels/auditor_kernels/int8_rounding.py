"""Rows as 8-bit integers, rounded at random, with what bounds the error of their products.

The dimensions in which tokens are largest would coarsen every step. They are split: a dimension taken n
times, each with an n-th of the token's value and the whole weight, leaves every product as it is.
"""

# Shape suffixes: T tokens, D = d_in, E = dimensions after the split, F = d_sae. W is feature-major.

# mypy: ignore-errors
# Two functions below are compiled by Triton: their arguments are device values, not Python objects.

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from auditor_kernels.prepared import Prepared

# Tokens from which the large dimensions are learned, and how much larger than usual is too large.
LEARNED_TOKENS, TOO_LARGE = 1024, 2.0
# Depth of one step of the filter; its tiles of features.
STEP, TILE = 128, 256
# One below the largest int8, so that rounding up never leaves the range.
LARGEST = tl.constexpr(126.0)


@triton.jit
def _take(rows_ptr, source_ptr, share_ptr, e, E, live, SPLIT: tl.constexpr):
    """The values that dimensions `e` are taken from, and their shares of them."""
    if SPLIT:
        share = tl.load(share_ptr + e, mask=e < E, other=0.0)[None, :]
        source = tl.load(source_ptr + e, mask=e < E, other=0)[None, :]
        x = tl.load(rows_ptr + source, mask=live, other=0.0).to(tl.float32)
        return x, x * share
    else:
        x = tl.load(rows_ptr + e[None, :], mask=live, other=0.0).to(tl.float32)
        return x, x


@triton.jit(do_not_specialize=["T", "seed"])
def round_rows(
    x_ptr,
    source_ptr,
    share_ptr,
    q_ptr,
    scalars_ptr,
    T,
    D,
    E,
    seed,
    SPLIT: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    """BR rows per program: int8 [T, E], and float32 [T, 4]: step, norm of what was rounded, of the row, 0.

    Dimension e takes the row's `source[e]`-th value times `share[e]`; without SPLIT, its own.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    first = row[:, None].to(tl.int64) * D
    top = tl.zeros((BR, BE), dtype=tl.float32)
    rest = tl.zeros((BR, BE), dtype=tl.float32)
    whole = tl.zeros((BR, BE), dtype=tl.float32)
    for e0 in range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        live = (row < T)[:, None] & (e < E)[None, :]
        x, part = _take(x_ptr + first, source_ptr, share_ptr, e, E, live, SPLIT)
        top = tl.maximum(top, tl.abs(part))
        rest += part * part
        whole += x * x  # at least the row's own
    largest = tl.max(top, axis=1)
    scale = tl.where(largest > 0, LARGEST / largest, 0.0)[:, None]
    for e0 in range(0, E, 4 * BE):
        # One counter gives four coins: those of a dimension and of its neighbours BE, 2 BE and 3 BE away.
        counter = row[:, None] * (E // 4 + BE) + e0 // 4 + tl.arange(0, BE)[None, :]
        u0, u1, u2, u3 = tl.rand4x(seed, counter)
        for i in tl.static_range(4):
            e = e0 + i * BE + tl.arange(0, BE)
            live = (row < T)[:, None] & (e < E)[None, :]
            _, part = _take(x_ptr + first, source_ptr, share_ptr, e, E, live, SPLIT)
            uniform = u0 if i == 0 else (u1 if i == 1 else (u2 if i == 2 else u3))
            rounded = tl.minimum(tl.maximum(tl.floor(part * scale + uniform), -127.0), 127.0)
            tl.store(q_ptr + row[:, None].to(tl.int64) * E + e[None, :], rounded.to(tl.int8), mask=live)
    tl.store(scalars_ptr + row * 4, largest / LARGEST, mask=row < T)
    tl.store(scalars_ptr + row * 4 + 1, tl.sqrt(tl.sum(rest, axis=1)), mask=row < T)
    tl.store(scalars_ptr + row * 4 + 2, tl.sqrt(tl.sum(whole, axis=1)), mask=row < T)
    tl.store(scalars_ptr + row * 4 + 3, 0.0, mask=row < T)


@dataclass(frozen=True)
class Rounded:
    """Rows as int8 [N, E]; step, norm of what was rounded, norm of the row, 0 (float32 [N, 4])."""

    q: Tensor
    scalars: Tensor


def round_to_int8(rows: Tensor, source_E: Tensor, share_E: Tensor, split: bool, seed: int) -> Rounded:
    """Round every row at random, its dimensions, if `split`, as `source_E` and `share_E` say."""
    q = torch.empty(len(rows), len(source_E), dtype=torch.int8, device=rows.device)
    scalars = torch.empty(len(rows), 4, dtype=torch.float32, device=rows.device)
    block = (4, 256) if rows.is_cuda else (256, 64)
    grid = (triton.cdiv(len(rows), block[0]),)
    round_rows[grid](rows, source_E, share_E, q, scalars, *rows.shape, len(source_E), seed, split, *block)
    return Rounded(q, scalars)


def split_dimensions(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Which dimension each of E takes, and what share of its value, learned from some tokens.

    Other tokens may be large elsewhere: their bounds are then looser, never wrong.
    """
    width = x_TD.shape[1]
    some = x_TD[:: max(1, len(x_TD) // LEARNED_TOKENS)].float().abs().nan_to_num(0.0, 0.0, 0.0)
    size = torch.sort(some, dim=0).values[int(0.99 * (len(some) - 1))].cpu()
    spare = -width % STEP
    if float(size.max()) > TOO_LARGE * float(size.median()) > 0:
        spare += STEP
    low, high = float(size.max()) / (spare + 1), float(size.max())
    for _ in range(40):  # the smallest level at which the spare dimensions suffice
        level = (low + high) / 2
        fits = high > 0 and float((size / level).ceil().clamp(min=1).sum()) <= width + spare
        low, high = (low, level) if fits else (level, high)
    copies = (
        (size / max(high, 1e-30)).ceil().clamp(1, spare + 1).long() if spare else torch.ones(width).long()
    )
    source = torch.repeat_interleave(torch.arange(width), copies)
    share = 1.0 / copies[source].float()
    missing = -len(source) % 16
    source = functional.pad(source, (0, missing)).to(torch.int32)
    return source.to(x_TD.device), functional.pad(share, (0, missing)).to(x_TD.device)


@dataclass(frozen=True)
class Screen:
    """An encoder's features as int8, with what bounds their errors."""

    source_E: Tensor
    share_E: Tensor
    split: bool
    q_FE: Tensor
    step_F: Tensor
    table_F4: Tensor  # norm of the rounded feature, step, bias, threshold
    tiles: Tensor  # of each TILE features the largest norm, step and |bias|, and the least threshold


def make_screen(prepared: Prepared, x_TD: Tensor) -> Screen:
    """Split by what these tokens need, and round the features."""
    source_e, share_e = split_dimensions(x_TD)
    whole_e = (share_e > 0).float()  # every copy has the whole weight, padding none
    split = len(source_e) != x_TD.shape[1]
    w = round_to_int8(prepared.w_FD, source_e, whole_e, split, secrets.randbits(31))
    step, norm = w.scalars[:, 0], w.scalars[:, 1] * 1.0001
    bias, threshold = prepared.bias_F, prepared.threshold_F
    table = torch.stack([norm + step * math.sqrt(len(source_e)), step, bias, threshold], dim=1)
    tiles = functional.pad(
        torch.stack([table[:, 0], step, bias.abs(), -threshold], dim=1),
        (0, 0, 0, -len(bias) % TILE),
        value=-torch.inf,
    )
    tiles = tiles.view(-1, TILE, 4).amax(1)
    tiles[:, 3].neg_()
    return Screen(source_e, share_e, split, w.q, step.contiguous(), table, tiles.contiguous())
