"""The Hopper filter over 8-bit integers, and the proof of what it leaves out.

Tokens and features are rounded to int8 at random, up or down, so that the error is 0 on average whatever the
data: only the coins are random. The product of integers is exact. With steps s_x and s_w, the error of a
score is a sum of independent terms of width s_x |w'_d| and s_w |x_d|, so by Hoeffding's inequality

    P(exact - score > c * sqrt(s_x^2 |w'|^2 + s_w^2 |x|^2)) <= exp(-2 c^2),   |w'| <= |w| + s_w sqrt(D).

Every feature whose score plus this bound exceeds the token's floor is a candidate. Candidates are scored
again exactly from the top down, until the k-th exact score is at least every bound that is left. A row can be
wrong only if one of its k features was underestimated by more than the bound. Which features those are does
not depend on the coins: for T tokens the union over T k pairs gives `FAILURE` per call with
`c^2 = ln(T k / FAILURE) / 2`. The coins are Philox counters, with one seed for the weights and another, new
in each call, for the tokens.
"""

# Shape suffixes: T tokens of a chunk, D = d_in, F = d_sae. W is feature-major.

# mypy: ignore-errors
# Most functions below are compiled by Triton: their arguments are device values, not Python objects.

from __future__ import annotations

import math
import secrets
from weakref import WeakKeyDictionary

import triton
import triton.language as tl
from torch import Tensor

from auditor_kernels import hopper
from auditor_kernels.groups import OVERFLOW
from auditor_kernels.int8_rounding import Screen, make_screen, round_to_int8
from auditor_kernels.keys import LAST_FEATURE, pack_key
from auditor_kernels.launch import Launcher
from auditor_kernels.prepared import Prepared

FAILURE = 1e-6


@triton.jit
def _kth_bits(bits, kept):
    """The largest multiple of 2^15 that `kept` of these positive floats' bits reach."""
    bound = 0
    for step in range(16):
        trial = bound | (1 << (30 - step))
        bound = tl.where(tl.sum((bits >= trial).to(tl.int32), axis=0) >= kept, trial, bound)
    return bound


@triton.jit
def _score_again(
    x_ptr, w_ptr, table_ptr, list_ptr, floor, row, first, last, written, D, BZ: tl.constexpr, BD: tl.constexpr
):
    """Candidates `first` to `last` give way, from `written` on, to the keys of those above the floor."""
    for z0 in range(first, last, BZ):
        z = z0 + tl.arange(0, BZ)
        listed = z < last
        low = (tl.load(list_ptr + z, mask=listed, other=0) & 0xFFFFFFFF).to(tl.int32)
        feature = tl.where(listed, LAST_FEATURE - (low >> 1), 0)
        acc = tl.zeros((BZ, BD), dtype=tl.float32)
        for d0 in tl.range(0, D, BD, num_stages=4):
            d = d0 + tl.arange(0, BD)
            x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            w_at = w_ptr + feature.to(tl.int64)[:, None] * D + d[None, :]
            w = tl.load(w_at, mask=listed[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            acc += x[None, :] * w
        pre = tl.sum(acc, axis=1) + tl.load(table_ptr + feature * 4 + 2)
        keep = listed & (pre > floor) & (pre > tl.load(table_ptr + feature * 4 + 3))
        number = keep.to(tl.int32)
        slot = written + tl.cumsum(number, axis=0) - 1
        tl.debug_barrier()  # what is overwritten has been read: `written` never passes z0
        tl.store(list_ptr + slot, pack_key(pre.to(tl.int32, bitcast=True), feature, feature * 0), mask=keep)
        written += tl.sum(number, axis=0)
    tl.debug_barrier()
    return written


@triton.jit(do_not_specialize=["kept", "CAP", "coins", "sums"])
def rescore(
    x_ptr,
    w_ptr,
    scalars_ptr,
    table_ptr,
    floor_ptr,
    count_ptr,
    cand_ptr,
    D,
    kept,
    CAP,
    coins,
    sums,
    WIDTH: tl.constexpr,
    BZ: tl.constexpr,
    BD: tl.constexpr,
):
    """One token per program: scores on its list give way to the exact keys of all that may be its largest.

    `table_ptr` float32 [F, 4]: norm of the rounded feature, step, bias, threshold.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    floor = tl.load(floor_ptr + row)
    floor = tl.where(floor > 0, floor, 0.0)
    list_ptr = cand_ptr + row * CAP
    if count <= CAP:
        slot = tl.arange(0, WIDTH)
        keys = tl.load(list_ptr + slot, mask=slot < count, other=0)
        feature = tl.where(slot < count, LAST_FEATURE - ((keys & 0xFFFFFFFF).to(tl.int32) >> 1), 0)
        score = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        norm = tl.load(table_ptr + feature * 4)
        by_x = tl.load(scalars_ptr + row * 4) * norm
        by_w = tl.load(scalars_ptr + row * 4 + 1) * tl.load(table_ptr + feature * 4 + 1)
        size = tl.load(scalars_ptr + row * 4 + 2) * norm + tl.abs(tl.load(table_ptr + feature * 4 + 2))
        error = coins * tl.sqrt(by_x * by_x + by_w * by_w) + sums * size
        most = tl.where(slot < count, score + error, 0.0)
        none = count * 0
        # The k-th exact score is about the k-th bound less its error: all above that come first.
        kth = _kth_bits(most.to(tl.int32, bitcast=True), kept).to(tl.float32, bitcast=True)
        enough = kth - 1.1 * tl.max(tl.where(slot < count, error, 0.0), axis=0)
        early = (slot < count) & (most >= enough)
        late = (slot < count) & (most < enough)
        num_early = tl.sum(early.to(tl.int32), axis=0)
        at = tl.where(
            early, tl.cumsum(early.to(tl.int32), axis=0), num_early + tl.cumsum(late.to(tl.int32), axis=0)
        )
        tl.debug_barrier()
        tl.store(list_ptr + at - 1, keys, mask=slot < count)
        tl.debug_barrier()
        written = _score_again(
            x_ptr, w_ptr, table_ptr, list_ptr, floor, row, none, num_early, none, D, BZ, BD
        )
        exact = (tl.load(list_ptr + slot, mask=slot < written, other=0) >> 32).to(tl.int32)
        proven = _kth_bits(exact, kept).to(tl.float32, bitcast=True)
        if proven < enough:
            written = _score_again(
                x_ptr, w_ptr, table_ptr, list_ptr, floor, row, num_early, count, written, D, BZ, BD
            )
        count = written
    tl.store(count_ptr + row, tl.where(count > CAP, OVERFLOW, count))


_CACHE: WeakKeyDictionary[Prepared, Screen] = WeakKeyDictionary()


def coins(num_tokens: int, kept: int) -> float:
    """The factor c of the bound at which a whole call fails with probability `FAILURE`."""
    return math.sqrt(math.log(num_tokens * kept / FAILURE) / 2)


def filter_pass(launcher: Launcher, part: slice, floor: Tensor, count: Tensor, cand: Tensor) -> None:
    """Run the filter over one chunk; same contract as `Launcher.gemm`.

    Raises:
        ValueError: forced on a dtype or an encoder that it does not take.
        RuntimeError: there is no library, or the launch failed.
    """
    prepared, x_td = launcher.prepared, launcher.x_ND[part]
    hopper.check_takes(prepared, x_td)
    if prepared not in _CACHE:
        _CACHE[prepared] = make_screen(prepared, launcher.x_ND)
    screen = _CACHE[prepared]
    x = round_to_int8(x_td, screen.source_E, screen.share_E, screen.split, secrets.randbits(31))
    c = coins(len(launcher.x_ND), launcher.kept) * 1.001
    sums = (launcher.width / 64 + 64) * 2.0**-23
    hopper.filter_int8(launcher, screen, x, c, sums, floor, count, cand)
    rescore[(len(x_td),)](
        x_td,
        prepared.w_FD,
        x.scalars,
        screen.table_F4,
        floor,
        count,
        cand,
        launcher.width,
        launcher.kept,
        launcher.cap,
        c,
        sums,
        triton.next_power_of_2(launcher.cap),
        16,
        min(256, triton.next_power_of_2(launcher.width)),
        num_warps=4,
    )
