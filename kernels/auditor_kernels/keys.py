"""How one candidate feature is written in 64 bits, so that ranking is an integer sort.

The high word is the float32 bits of the score (positive, hence ordered as an integer), the low word is
`(LAST_FEATURE - feature) * 2 + negative`: equal scores sort by lowest index, and a two-sided encoder gets its
sign back. A key of 0 is an empty slot; a key of at least `INF_KEY` marks a row that is not finite.
"""

# mypy: ignore-errors
# The functions below are compiled by Triton: their arguments are device values, not Python objects.

from __future__ import annotations

import triton
import triton.language as tl

LAST_FEATURE = tl.constexpr(0x3FFFFFFF)
INF_KEY = tl.constexpr(0x7F800000 << 32)
# Padding of every sorted list: k never exceeds it.
LOG_LIST = tl.constexpr(7)
LIST = tl.constexpr(1 << 7)


@triton.jit
def pack_key(score_bits, feature, negative):
    """Keys of candidates; `score_bits` int32 > 0."""
    low = (LAST_FEATURE - feature) * 2 + negative
    return (score_bits.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def _bit(dims: tl.constexpr, position: tl.constexpr):
    """Bit `position` of the flat index, on a hypercube of `dims` axes of length 2."""
    return tl.reshape(tl.arange(0, 2), [1] * (dims - position - 1) + [2] + [1] * position)


@triton.jit
def _compare(cube, position: tl.constexpr, upwards):
    """Order each pair of keys whose indices differ in bit `position`."""
    high = tl.max(cube, axis=len(cube.shape) - 1 - position, keep_dims=True)
    low = tl.min(cube, axis=len(cube.shape) - 1 - position, keep_dims=True)
    return tl.where(_bit(len(cube.shape), position) == upwards, high, low)


@triton.jit
def _exchange(cube, stage: tl.constexpr, upwards):
    """The compare-exchanges of one bitonic stage."""
    for step in tl.static_range(stage):
        cube = _compare(cube, stage - 1 - step, upwards)
    return cube


@triton.jit
def sort_keys(keys, ascending: tl.constexpr, LOG_ROWS: tl.constexpr, LOG_WIDTH: tl.constexpr):
    """Sort each row of [2^LOG_ROWS, 2^LOG_WIDTH] keys (or one row as a vector).

    Written with min and max over axes of length 2, which both a GPU and Triton's interpreter run fast.
    """
    cube = tl.reshape(keys, [2] * (LOG_ROWS + LOG_WIDTH))
    for stage in tl.static_range(1, LOG_WIDTH):
        cube = _exchange(cube, stage, _bit(LOG_ROWS + LOG_WIDTH, stage))
    return tl.reshape(_exchange(cube, LOG_WIDTH, ascending), keys.shape)


@triton.jit
def merge_keys(descending, ascending, LOG_ROWS: tl.constexpr, LOG_WIDTH: tl.constexpr):
    """The larger half of two sorted lists, descending: their elementwise maximum is a bitonic sequence."""
    cube = tl.reshape(tl.maximum(descending, ascending), [2] * (LOG_ROWS + LOG_WIDTH))
    return tl.reshape(_exchange(cube, LOG_WIDTH, 0), descending.shape)


@triton.jit
def write_row(keys, out_val_ptr, out_idx_ptr, row, k, kept, WIDTH: tl.constexpr):
    """Write the first k of a descending list of keys as one row of `TopK`; only `kept` may be active."""
    slot = tl.arange(0, WIDTH)
    low = (keys & 0xFFFFFFFF).to(tl.int32)
    feature = LAST_FEATURE - (low >> 1)
    size = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    value = tl.where((low & 1) == 1, -size, size)
    broken = tl.max(keys, axis=0) >= INF_KEY
    active = (keys > 0) & (slot < kept) & (broken == 0)
    value = tl.where(active, value, tl.where(broken, float("nan"), 0.0))
    at = row.to(tl.int64) * k + slot
    tl.store(out_val_ptr + at, value, mask=slot < k)
    tl.store(out_idx_ptr + at, tl.where(active, feature, -1), mask=slot < k)
