"""The portable GEMM: its epilogue keeps the largest few features of each group of 64, nothing else.

A group is the 64 of a tile's columns that one thread holds (columns 8j + 2q + {0, 1} of a tensor-core
layout), so the epilogue needs no shuffle. Each value's low mantissa bits are replaced by its place in the
group, which makes the keys of a group distinct and carries the index for free: keys keep 17 bits of mantissa.

With a floor per token only keys above it are appended to the token's candidate list (with EXACT, which
costs registers, their values are kept to the last bit); a group that may have held more than M is reported,
never trusted. Without one every group's M largest keys are written (`[T, M, F / 64]`): over a sample of the
features they give the floor, `ranked_key`.
"""

# Shape suffixes: T tokens, D = d_in, F = d_sae. W is feature-major, [F, D].

# mypy: ignore-errors
# The functions below are compiled by Triton: their arguments are device values, not Python objects.

from __future__ import annotations

import triton
import triton.language as tl

from auditor_kernels.keys import pack_key

GROUP = tl.constexpr(64)
# Added to a token's count when one of its groups overflowed: more than any capacity.
OVERFLOW = tl.constexpr(1 << 20)


@triton.jit
def group_column(group, slot, BN: tl.constexpr):
    """Column within F of place `slot` of group number `group`."""
    per_tile: tl.constexpr = BN // 64
    tile = group // per_tile
    within = group % per_tile
    j = (within // 4) * 32 + slot // 2
    return tile * BN + j * 8 + (within % 4) * 2 + slot % 2


@triton.jit
def middle_bits(key, LOW: tl.constexpr):
    """The score of a key: the bits that the place displaced are gone, the middle of their range stands in."""
    return (key & -(1 << LOW)) | (1 << (LOW - 1))


@triton.jit
def _place_keys(raw, TWO_SIDED: tl.constexpr):
    """Keys of (rows, groups, 64) scores, the low bits of each replaced by place (and sign)."""
    place = tl.arange(0, 64)[None, None, :]
    if TWO_SIDED:
        return (raw & 0x7FFFFF80) | (place * 2 + ((raw >> 31) & 1))
    else:
        return (raw & -64) | place


@triton.jit(do_not_specialize=["T", "F", "CAP"])
def group_gemm(
    x_desc,
    w_desc,
    bias_ptr,
    threshold_ptr,
    floor_ptr,
    keys_ptr,
    count_ptr,
    cand_ptr,
    T,
    F,
    D: tl.constexpr,
    CAP,
    M: tl.constexpr,
    FILTER: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RASTER: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """One persistent launch over all tiles; grid is `(PROGRAMS,)`.

    `floor_ptr` float32 [T]: with FILTER, keys of scores at or above it are appended to `cand_ptr`
    int64 [T, CAP] and counted in `count_ptr` int32 [T] (zeroed by the caller). Without, all keys go to
    `keys_ptr` int32 [T, M, groups].
    """
    LOW: tl.constexpr = 7 if TWO_SIDED else 6
    low_mask: tl.constexpr = (1 << LOW) - 1
    per_tile: tl.constexpr = BN // 64
    tiles_m = tl.cdiv(T, BM)
    tiles_n = tl.cdiv(F, BN)
    groups = tiles_n * per_tile
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        # RASTER row-tiles at a time, column by column: their x stays in L2 while W streams past.
        band = tile // (RASTER * tiles_n)
        first = band * RASTER
        band_rows = tl.minimum(tiles_m - first, RASTER)
        inside = tile - band * RASTER * tiles_n
        m0 = (first + inside % band_rows) * BM
        n0 = (inside // band_rows) * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, D, BK):
            x_mk = x_desc.load([m0, k0])
            w_nk = w_desc.load([n0, k0])
            acc = tl.dot(x_mk, w_nk.T, acc, input_precision=PRECISION)
        cols = tl.arange(0, BN)
        in_range = n0 + cols < F
        # A column past F must never win: its products are 0, so its bias decides.
        acc += tl.load(bias_ptr + n0 + cols, mask=in_range, other=-3.0e38)[None, :]
        if HAS_THRESHOLD:
            threshold = tl.load(threshold_ptr + n0 + cols, mask=in_range, other=3.0e38)
            score = tl.abs(acc) if TWO_SIDED else acc
            acc = tl.where((score > threshold[None, :]) | (score != score), acc, 0.0)
        elif TWO_SIDED:
            acc = tl.where(in_range[None, :], acc, 0.0)
        # (BM, groups of the tile, 64): a relabelling of registers, no data moves.
        raw = tl.reshape(acc.to(tl.int32, bitcast=True), (BM, per_tile // 4, 32, 4, 2))
        raw = tl.reshape(tl.permute(raw, (0, 1, 3, 2, 4)), (BM, per_tile, 64))
        key = _place_keys(raw, TWO_SIDED)
        rows = m0 + tl.arange(0, BM)
        live = rows < T
        group = n0 // 64 + tl.arange(0, per_tile)
        live2 = live[:, None] & (group[None, :] < groups)
        if FILTER:
            floor = tl.load(floor_ptr + rows, mask=live, other=float("inf"))
            # A row that has overflowed is recomputed anyway: stop appending to it.
            full = tl.load(count_ptr + rows, mask=live, other=0) > CAP
            floor_key = tl.maximum((floor.to(tl.int32, bitcast=True) & ~low_mask) - 1, low_mask)
            floor_key = tl.where(full | (live == 0), 0x7FFFFFFF, floor_key)
            hits = tl.sum((key > floor_key[:, None, None]).to(tl.int32), axis=2)
            start = tl.atomic_add(
                count_ptr + rows[:, None] + group[None, :] * 0,
                tl.where(hits > M, OVERFLOW, hits),
                mask=(hits > 0) & live2,
                sem="relaxed",
            )
            for p in tl.static_range(M):
                top = tl.max(key, axis=2)
                if EXACT:
                    top_bits = tl.max(tl.where(key == top[:, :, None], raw & 0x7FFFFFFF, 0), axis=2)
                else:
                    top_bits = middle_bits(top, LOW)
                place = top & low_mask
                negative = place & 1 if TWO_SIDED else place * 0
                feature = group_column(group[None, :], place // 2 if TWO_SIDED else place, BN)
                at = rows[:, None].to(tl.int64) * CAP + start + p
                tl.store(
                    cand_ptr + at,
                    pack_key(top_bits, feature, negative),
                    mask=(p < hits) & (start + p < CAP) & live2,
                )
                if p < M - 1:
                    key = tl.where(key < top[:, :, None], key, 0)
        else:
            for p in tl.static_range(M):
                top = tl.max(key, axis=2)
                at = (rows[:, None].to(tl.int64) * M + p) * groups + group[None, :]
                tl.store(keys_ptr + at, top, mask=live2)
                if p < M - 1:
                    key = tl.where(key < top[:, :, None], key, -2147483648)


@triton.jit(do_not_specialize=["number", "rank"])
def ranked_key(keys_ptr, floor_ptr, number, rank, WIDTH: tl.constexpr):
    """One token per program: the `rank`-th largest of its `number` keys as a score, or 0."""
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    key = tl.load(keys_ptr + row.to(tl.int64) * number + at, mask=at < number, other=0)
    bound = 0
    # The low bits of a key are its place: 16 high bits are all that a floor needs.
    for step in range(15):
        trial = bound | (1 << (30 - step))
        enough = tl.sum((key >= trial).to(tl.int32), axis=0) >= rank
        bound = tl.where(enough, trial, bound)
    tl.store(floor_ptr + row, bound.to(tl.float32, bitcast=True))
