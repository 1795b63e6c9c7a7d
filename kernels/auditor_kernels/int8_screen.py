"""A filter that multiplies 8-bit integers, and the proof of what it leaves out. Off unless it is asked for.

Tokens and features are rounded to int8 at random, up or down, so that the error is 0 on average whatever the
data: only the coins are random. The product of integers is exact. With steps s_x and s_w, the error of a
score is a sum of independent terms of width s_x |w'_d| and s_w |x_d|, so by Hoeffding's inequality

    P(exact - score > c * sqrt(s_x^2 |w'|^2 + s_w^2 |x|^2)) <= exp(-2 c^2),   |w'| <= |w| + s_w sqrt(D).

Every feature whose score plus this bound reaches the token's floor is scored again exactly; those whose exact
score reaches it are the candidates, with the certificate of every filter. A row can be wrong only if one of
its k features was underestimated by more than the bound. Which features those are does not depend on the
coins: for T tokens the union over T k pairs gives `FAILURE` per call with `c^2 = ln(T k / FAILURE) / 2`. The
coins are Philox counters, with one seed for the weights and another, new in each call, for the tokens.

The dimensions in which tokens are largest would coarsen every step: they are multiplied unrounded, apart.
"""

# Shape suffixes: T tokens of a chunk, D = d_in, F = d_sae, O = dimensions that are not rounded. W is
# feature-major, [F, D].

# mypy: ignore-errors
# Most functions below are compiled by Triton: their arguments are device values, not Python objects.

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from auditor_kernels.groups import OVERFLOW
from auditor_kernels.keys import pack_key
from auditor_kernels.launch import Launcher
from auditor_kernels.prepared import Prepared

FAILURE = 1e-6
OUTLIERS = 32
# One below the largest int8, so that rounding up never leaves the range.
LARGEST = tl.constexpr(126.0)


@triton.jit(do_not_specialize=["T", "seed"])
def round_rows(
    x_ptr, kept_ptr, q_ptr, step_ptr, rest_ptr, norm_ptr, T, D, seed, BR: tl.constexpr, BD: tl.constexpr
):
    """BR rows per program: int8 [D], its step, the norm of what was rounded, and the whole norm.

    `kept_ptr` float32 [D] is 0 in dimensions that are to be left out.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    first = row[:, None].to(tl.int64) * D
    top = tl.zeros((BR, BD), dtype=tl.float32)
    rest = tl.zeros((BR, BD), dtype=tl.float32)
    whole = tl.zeros((BR, BD), dtype=tl.float32)
    for d0 in range(0, D, BD):
        d = (d0 + tl.arange(0, BD))[None, :]
        live = (row < T)[:, None] & (d < D)
        x = tl.load(x_ptr + first + d, mask=live, other=0.0).to(tl.float32)
        part = x * tl.load(kept_ptr + d, mask=d < D, other=0.0)
        top = tl.maximum(top, tl.abs(part))
        rest += part * part
        whole += x * x
    largest = tl.max(top, axis=1)
    scale = tl.where(largest > 0, LARGEST / largest, 0.0)[:, None]
    for d0 in range(0, D, BD):
        d = (d0 + tl.arange(0, BD))[None, :]
        live = (row < T)[:, None] & (d < D)
        x = tl.load(x_ptr + first + d, mask=live, other=0.0).to(tl.float32)
        part = x * tl.load(kept_ptr + d, mask=d < D, other=0.0)
        rounded = tl.floor(part * scale + tl.rand(seed, (first + d).to(tl.int32)))
        tl.store(q_ptr + first + d, tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8), mask=live)
    tl.store(step_ptr + row, largest / LARGEST, mask=row < T)
    tl.store(rest_ptr + row, tl.sqrt(tl.sum(rest, axis=1)), mask=row < T)
    tl.store(norm_ptr + row, tl.sqrt(tl.sum(whole, axis=1)), mask=row < T)


@triton.jit(do_not_specialize=["T", "F", "CAP", "coins", "sums"])
def screen(
    x_ptr,
    x_side_ptr,
    x_step_ptr,
    x_rest_ptr,
    x_norm_ptr,
    w_ptr,
    w_side_ptr,
    w_step_ptr,
    w_norm_ptr,
    bias_ptr,
    threshold_ptr,
    floor_ptr,
    count_ptr,
    cand_ptr,
    T,
    F,
    D,
    CAP,
    coins,
    sums,
    TWO_SIDED: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Append and count every feature that the bound does not exclude; one tile per program."""
    tiles_m = tl.cdiv(T, BM)
    rows = (tl.program_id(0) % tiles_m) * BM + tl.arange(0, BM)
    cols = (tl.program_id(0) // tiles_m) * BN + tl.arange(0, BN)
    live, in_range = rows < T, cols < F
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for k0 in range(0, D, BK):
        d = k0 + tl.arange(0, BK)
        x_at = x_ptr + rows[:, None].to(tl.int64) * D + d[None, :]
        w_at = w_ptr + cols[None, :].to(tl.int64) * D + d[:, None]
        x = tl.load(x_at, mask=live[:, None] & (d < D)[None, :], other=0)
        w = tl.load(w_at, mask=in_range[None, :] & (d < D)[:, None], other=0)
        acc = tl.dot(x, w, acc)
    out = tl.arange(0, OUT)
    x_side = tl.load(x_side_ptr + rows[:, None] * OUT + out[None, :], mask=live[:, None], other=0.0)
    w_side = tl.load(w_side_ptr + cols[None, :] * OUT + out[:, None], mask=in_range[None, :], other=0.0)
    x_step = tl.load(x_step_ptr + rows, mask=live, other=0.0)[:, None]
    w_step = tl.load(w_step_ptr + cols, mask=in_range, other=0.0)[None, :]
    w_norm = tl.load(w_norm_ptr + cols, mask=in_range, other=0.0)[None, :]
    bias = tl.load(bias_ptr + cols, mask=in_range, other=0.0)[None, :]
    score = acc.to(tl.float32) * x_step * w_step + bias + tl.dot(x_side, w_side, input_precision="ieee")
    rounded = tl.sqrt(D.to(tl.float32)) * w_step + w_norm
    x_rest = tl.load(x_rest_ptr + rows, mask=live, other=0.0)[:, None]
    x_norm = tl.load(x_norm_ptr + rows, mask=live, other=0.0)[:, None]
    by_x, by_w = x_step * rounded, w_step * x_rest
    error = coins * tl.sqrt(by_x * by_x + by_w * by_w) + sums * (x_norm * w_norm + tl.abs(bias))
    most = (tl.abs(score) if TWO_SIDED else score) + error
    floor = tl.load(floor_ptr + rows, mask=live, other=0.0)[:, None]
    threshold = tl.load(threshold_ptr + cols, mask=in_range, other=0.0)[None, :]
    # Written so that a bound that is no number excludes nothing.
    excluded = (most < floor) | (most < threshold) | (most < 0)
    hit = live[:, None] & in_range[None, :] & (excluded == 0)
    number = hit.to(tl.int32)
    hits = tl.sum(number, axis=1)
    start = tl.atomic_add(count_ptr + rows, hits, mask=live & (hits > 0), sem="relaxed")
    slot = start[:, None] + tl.cumsum(number, axis=1) - 1
    at = cand_ptr + rows[:, None].to(tl.int64) * CAP + slot
    tl.store(at, (cols[None, :] + rows[:, None] * 0).to(tl.int64), mask=hit & (slot < CAP))


@triton.jit(do_not_specialize=["CAP"])
def rescore(
    x_ptr,
    w_ptr,
    bias_ptr,
    threshold_ptr,
    floor_ptr,
    count_ptr,
    cand_ptr,
    D,
    CAP,
    TWO_SIDED: tl.constexpr,
    BZ: tl.constexpr,
    BD: tl.constexpr,
):
    """One token per program: features on its list give way to the keys of those that reach its floor."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    floor = tl.load(floor_ptr + row)
    floor = tl.where(floor > 0, floor, 0.0)
    written = 0
    for z0 in range(0, tl.minimum(count, CAP), BZ):
        z = z0 + tl.arange(0, BZ)
        listed = z < tl.minimum(count, CAP)
        feature = tl.load(cand_ptr + row * CAP + z, mask=listed, other=0)
        acc = tl.zeros((BZ, BD), dtype=tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            w_at = w_ptr + feature[:, None] * D + d[None, :]
            w = tl.load(w_at, mask=listed[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            acc += x[None, :] * w
        pre = tl.sum(acc, axis=1) + tl.load(bias_ptr + feature, mask=listed, other=0.0)
        score = tl.abs(pre) if TWO_SIDED else pre
        enough = (score > 0) & (score > tl.load(threshold_ptr + feature, mask=listed, other=0.0))
        keep = listed & enough & (score >= floor)
        number = keep.to(tl.int32)
        slot = written + tl.cumsum(number, axis=0) - 1
        key = pack_key(score.to(tl.int32, bitcast=True), feature.to(tl.int32), (pre < 0).to(tl.int32))
        tl.store(cand_ptr + row * CAP + slot, key, mask=keep)
        written += tl.sum(number, axis=0)
    tl.store(count_ptr + row, tl.where(count > CAP, OVERFLOW, written))


@dataclass(frozen=True)
class Rounded:
    """Rows as int8 with their steps and norms."""

    q: Tensor
    step: Tensor
    rest: Tensor
    norm: Tensor


def round_to_int8(rows: Tensor, kept_D: Tensor, seed: int) -> Rounded:
    """Round every row at random, but for the dimensions where `kept_D` is 0."""
    scalars = [torch.empty(len(rows), dtype=torch.float32, device=rows.device) for _ in range(3)]
    q = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    block = (4, 256) if rows.is_cuda else (256, 64)
    grid = (triton.cdiv(len(rows), block[0]),)
    round_rows[grid](rows, kept_D, q, *scalars, *rows.shape, seed, *block)
    return Rounded(q, *scalars)


_CACHE: WeakKeyDictionary[Prepared, Rounded] = WeakKeyDictionary()


def coins(num_tokens: int, kept: int) -> float:
    """The factor c of the bound at which a whole call fails with probability `FAILURE`."""
    return math.sqrt(math.log(num_tokens * kept / FAILURE) / 2)


def filter_pass(launcher: Launcher, part: slice, floor: Tensor, count: Tensor, cand: Tensor) -> None:
    """Run the filter over one chunk; same contract as `Launcher.gemm` with the filter."""
    prepared, x_td = launcher.prepared, launcher.x_ND[part]
    tokens, width = x_td.shape
    kept_d = torch.ones(width, device=x_td.device)
    if prepared not in _CACHE:
        _CACHE[prepared] = round_to_int8(prepared.w_FD, kept_d, secrets.randbits(31))
    w = _CACHE[prepared]
    outliers = x_td.abs().amax(0).topk(min(OUTLIERS, width)).indices
    kept_d[outliers] = 0.0
    missing = OUTLIERS - len(outliers)
    x_side, w_side = (
        torch.nn.functional.pad(m.index_select(1, outliers), (0, missing)) for m in (x_td, prepared.w_FD)
    )
    x = round_to_int8(x_td, kept_d, secrets.randbits(31))
    tile = 128 if x_td.is_cuda else 32
    screen[(triton.cdiv(tokens, tile) * triton.cdiv(launcher.d_sae, tile),)](
        x.q,
        x_side,
        x.step,
        x.rest,
        x.norm,
        w.q,
        w_side,
        w.step,
        w.norm,
        prepared.bias_F,
        prepared.threshold_F,
        floor,
        count,
        cand,
        tokens,
        launcher.d_sae,
        width,
        launcher.cap,
        coins(len(launcher.x_ND), launcher.kept) * 1.001,
        (width / 64 + 64) * 2.0**-23,
        prepared.two_sided,
        OUTLIERS,
        tile,
        tile,
        64,
        num_warps=8,
    )
    rescore[(tokens,)](
        x_td,
        prepared.w_FD,
        prepared.bias_F,
        prepared.threshold_F,
        floor,
        count,
        cand,
        width,
        launcher.cap,
        prepared.two_sided,
        16,
        min(128, triton.next_power_of_2(width)),
    )
