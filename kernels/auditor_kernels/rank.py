"""The certificate and the exact way out: rank what was captured, recompute what cannot be certified.

No step asks the host: a token that fails its certificate is put on a list on the device, and the launches
that recompute listed tokens read the list's length there and end at once when it is empty.
"""

# Shape suffixes: T tokens, D = d_in, F = d_sae. W is feature-major, [F, D].

# mypy: ignore-errors
# The functions below are compiled by Triton: their arguments are device values, not Python objects.

from __future__ import annotations

import triton
import triton.language as tl

from auditor_kernels.keys import INF_KEY, LIST, LOG_LIST, merge_keys, pack_key, sort_keys, write_row


@triton.jit
def _rank_list(list_ptr, count, out_val_ptr, out_idx_ptr, token, k, kept, LOG: tl.constexpr):
    """Sort one token's candidates, at most 2^LOG, and write its row."""
    slot = tl.arange(0, 1 << LOG)
    keys = tl.load(list_ptr + slot, mask=slot < count, other=0)
    write_row(sort_keys(keys, 0, 0, LOG), out_val_ptr, out_idx_ptr, token, k, kept, 1 << LOG)


@triton.jit
def _shorten(list_ptr, count, kept, LOG_WIDE: tl.constexpr):
    """Move the candidates that may be among the `kept` largest to the front of the list; how many they are.

    The largest value that `kept` of them reach is found bit by bit; more remain only if they equal it, and a
    token where too many do for one sort is recomputed.
    """
    slot = tl.arange(0, 1 << LOG_WIDE)
    keys = tl.load(list_ptr + slot, mask=slot < count, other=0)
    bits = (keys >> 32).to(tl.int32)
    bound = 0
    for step in range(31):
        trial = bound | (1 << (30 - step))
        bound = tl.where(tl.sum((bits >= trial).to(tl.int32), axis=0) >= kept, trial, bound)
    reaches = (bits >= bound) & (keys > 0)
    number = reaches.to(tl.int32)
    tl.debug_barrier()  # all have read the list before any of it is overwritten
    tl.store(list_ptr + tl.cumsum(number, axis=0) - 1, keys, mask=reaches)
    tl.debug_barrier()
    return tl.sum(number, axis=0)


@triton.jit(do_not_specialize=["first", "k", "kept", "CAP", "overflow_bound"])
def rank_candidates(
    x_ptr,
    floor_ptr,
    count_ptr,
    cand_ptr,
    out_val_ptr,
    out_idx_ptr,
    listed_ptr,
    first,
    D,
    k,
    kept,
    CAP,
    overflow_bound,
    LOG_WIDE: tl.constexpr,
):
    """Certify and rank one token per program; row 0 of this chunk is token `first` of the call.

    Every feature whose score exceeds the token's floor was appended and counted. So if the count fits the
    list and is at least `kept`, or the floor was 0, the list holds the answer, whatever the floor was worth.
    A token whose count says otherwise, or whose residual is so large that a pre-activation might not be
    finite (`sum |x| >= overflow_bound`; also when x itself is not), is appended to `listed_ptr` (int32
    [1 + T]: length, then tokens).
    """
    row = tl.program_id(0)
    token = first + row
    count = tl.load(count_ptr + row)
    certified = (count <= CAP) & ((count >= kept) | (tl.load(floor_ptr + row) <= 0))
    size = tl.zeros((512,), dtype=tl.float32)
    for d0 in range(0, D, 512):
        d = d0 + tl.arange(0, 512)
        size += tl.abs(tl.load(x_ptr + token.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32))
    certified = certified & (tl.sum(size, axis=0) < overflow_bound)
    list_ptr = cand_ptr + row.to(tl.int64) * CAP
    certified = certified & (count <= (1 << LOG_WIDE))
    if certified & (count > LIST):
        if count <= 256:
            count = _shorten(list_ptr, count, kept, 8)
        elif count <= 512:
            count = _shorten(list_ptr, count, kept, 9)
        else:
            count = _shorten(list_ptr, count, kept, LOG_WIDE)
    if certified & (count <= LIST):
        if (count <= 64) & (k <= 64):
            _rank_list(list_ptr, count, out_val_ptr, out_idx_ptr, token, k, kept, 6)
        else:
            _rank_list(list_ptr, count, out_val_ptr, out_idx_ptr, token, k, kept, 7)  # LIST
    else:
        at = tl.atomic_add(listed_ptr, 1)
        tl.store(listed_ptr + 1 + at, token)


@triton.jit
def _slices(length, k, space, F):
    """Slices of features per listed token: as many as the space for their lists allows, at most 64."""
    wanted = space // (tl.maximum(length, 1).to(tl.int64) * k)
    return tl.maximum(tl.minimum(tl.minimum(wanted, 64), tl.cdiv(F, LIST)), 1).to(tl.int32)


@triton.jit(do_not_specialize=["F", "k", "space"])
def recompute_slices(
    x_ptr,
    w_desc,
    bias_ptr,
    threshold_ptr,
    listed_ptr,
    part_ptr,
    F,
    D,
    k,
    space,
    TWO_SIDED: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG_BR: tl.constexpr,
    BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Exact top k of each slice of features, for every listed token.

    Holds for any data: a block of LIST features is merged into a sorted list unless nothing in it can
    enter. Writes `part_ptr` int64 [length, slices, k]; `space` is how many keys it can hold, at
    least k per token.
    """
    BR: tl.constexpr = 1 << LOG_BR
    length = tl.load(listed_ptr)
    slices = _slices(length, k, space, F)
    blocks = tl.cdiv(tl.cdiv(F, LIST), slices)
    for item in range(tl.program_id(0), tl.cdiv(length, BR) * slices, PROGRAMS):
        part = item % slices
        number = (item // slices) * BR + tl.arange(0, BR)
        live = number < length
        rows = tl.load(listed_ptr + 1 + number, mask=live, other=0).to(tl.int64)
        slot = tl.arange(0, LIST)
        best = tl.zeros((BR, LIST), dtype=tl.int64)
        for block in range(part * blocks, (part + 1) * blocks):
            cols = block * LIST + tl.arange(0, LIST)
            in_range = cols < F
            # Features along the tensor core's tall side, the few tokens along its narrow one.
            acc_nr = tl.zeros((LIST, BR), dtype=tl.float32)
            for k0 in range(0, D, BK):
                d = k0 + tl.arange(0, BK)
                x_at = x_ptr + rows[:, None] * D + d[None, :]
                x_rk = tl.load(x_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
                w_nk = w_desc.load([block * LIST, k0])
                acc_nr = tl.dot(w_nk, tl.trans(x_rk), acc_nr, input_precision=PRECISION)
            acc = tl.trans(acc_nr)
            acc += tl.load(bias_ptr + cols, mask=in_range, other=0.0)[None, :]
            threshold = tl.load(threshold_ptr + cols, mask=in_range, other=0.0)
            score = tl.abs(acc) if TWO_SIDED else acc
            bits = tl.where(score > threshold[None, :], score.to(tl.int32, bitcast=True), 0)
            key = tl.where(bits > 0, pack_key(bits, cols[None, :], (acc < 0).to(tl.int32)), 0)
            key = tl.where(tl.abs(acc) < float("inf"), key, INF_KEY)
            key = tl.where(live[:, None] & in_range[None, :], key, 0)
            worst = tl.max(tl.where(slot[None, :] >= k - 1, best, 0), axis=1)
            if tl.max((key > worst[:, None]).to(tl.int32)) > 0:
                best = merge_keys(best, sort_keys(key, 1, LOG_BR, LOG_LIST), LOG_BR, LOG_LIST)
        at = (number * slices + part) * k.to(tl.int64)
        tl.store(part_ptr + at[:, None] + slot[None, :], best, mask=live[:, None] & (slot[None, :] < k))


@triton.jit(do_not_specialize=["F", "k", "kept", "space"])
def rank_slices(listed_ptr, part_ptr, out_val_ptr, out_idx_ptr, F, k, kept, space, PROGRAMS: tl.constexpr):
    """Merge the slices of each listed token and write its row."""
    length = tl.load(listed_ptr)
    slices = _slices(length, k, space, F)
    slot = tl.arange(0, LIST)
    for number in range(tl.program_id(0), length, PROGRAMS):
        row = tl.load(listed_ptr + 1 + number)
        best = tl.zeros((LIST,), dtype=tl.int64)
        for part in range(slices):
            at = (number * slices + part) * k.to(tl.int64)
            upwards = LIST - 1 - slot  # each slice is read backwards: ascending
            keys = tl.load(part_ptr + at + upwards, mask=upwards < k, other=0)
            best = merge_keys(best, keys, 0, LOG_LIST)
        write_row(best, out_val_ptr, out_idx_ptr, row, k, kept, LIST)
