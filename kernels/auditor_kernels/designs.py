"""A call as a sequence of launches: a floor per token, a filter, a certificate, exact rows for the rest."""

# Shape suffixes: T tokens of a chunk, N all tokens, F = d_sae, K = kept features.

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from auditor_kernels.launch import Launcher

# A guess of the k-th value is lowered by this: a token whose k-th value fell a little still certifies.
HINT_SLACK = 0.95
# Extra memory is held to this share of the bfloat16 pre-activations by going through the tokens in chunks.
MEMORY_SHARE = 0.05
# A workspace this small is never worth a second chunk, whatever the share.
FLOOR_BYTES = 64 << 20
# Tokens recomputed more often than this are not worth a faster first pass.
EXPECTED_RECOMPUTED = 1e-4
MAX_PER_GROUP = 12
ROW_SLICES = 64
# Where there is no guess, the scores of a 16th of the features stand for all: so many at least and at most.
SAMPLED_FEATURES = (2048, 4096)
# How often they may mislead.
MISLED = 1e-6
# Candidates that a bound on 8-bit scores cannot exclude, for each one that passes the floor.
INT8_CANDIDATES = 2


def per_group(expected: int, d_sae: int) -> int | None:
    """How many keys a group of 64 must keep so that few tokens overflow one, or None if too many would.

    `expected` candidates fall on G groups about evenly, so some group gets m + 1 of them with probability at
    most C(expected, m + 1) / G^m.
    """
    groups = -(-d_sae // 64)
    for m in range(1, MAX_PER_GROUP + 1):
        if math.comb(expected, m + 1) <= EXPECTED_RECOMPUTED * groups**m:
            return m
    return None


class Sample(NamedTuple):
    """Every `stride`-th feature is scored; the `rank`-th largest of those scores is the floor."""

    stride: int
    rank: int
    expected: int  # candidates of a token, on average
    capacity: int  # and at most, but for `MISLED` of the tokens


def _at_least(successes: int, trials: int, p: float) -> float:
    """P(a binomial variable reaches `successes`), the smaller tail summed."""
    below = [math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(min(successes, trials + 1))]
    above = (math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(successes, trials + 1))
    return 1 - sum(below) if len(below) < trials // 2 else sum(above)


@functools.cache
def choose_sample(kept: int, d_sae: int) -> Sample:
    """The least rank whose floor is almost never above the `kept`-th score, were the sample a random one."""
    least, most = SAMPLED_FEATURES
    stride = max(1, d_sae // min(max(least, d_sae // 16), most))
    p = 1 / stride
    # The floor is too high if `rank` of the `kept` largest are among the sampled.
    rank = next(r for r in range(1, kept + 2) if _at_least(r, kept, p) <= MISLED)
    capacity = rank * stride if stride > 1 else 2 * rank + 32
    # It is too low if fewer than `rank` of the `capacity` largest are.
    while stride > 1 and 1 - _at_least(rank, capacity, p) > MISLED:
        capacity += 16
    return Sample(stride, rank, rank * stride, min(capacity, d_sae))


def hint_capacity(kept: int, d_sae: int) -> int:
    """Slots of a token's candidate list where a guess is known: within the memory share where k allows it."""
    return max(5 * kept // 2, min(512, d_sae // 88), 32)


def chunk_tokens(num_tokens: int, bytes_per_token: int, d_sae: int) -> int:
    """Tokens per chunk, in whole tiles, so that the workspace stays within MEMORY_SHARE or FLOOR_BYTES."""
    allowed = max(FLOOR_BYTES, MEMORY_SHARE * 2 * d_sae * num_tokens)
    chunks = math.ceil(num_tokens * bytes_per_token / allowed)
    return min(num_tokens, math.ceil(num_tokens / (chunks * 256)) * 256)


# A filter over one chunk: (tokens, floor [T], count [T] zeroed, candidates [T, CAP]).
FilterPass = Callable[[slice, Tensor, Tensor, Tensor], None]


def _chunks(launcher: Launcher, bytes_per_token: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Chunks of tokens with counts [T], the list of the whole call [1 + N], both zeroed, candidates [T, CAP].

    When the last chunk is done, whatever is on the list is recomputed.
    """
    num_tokens, cap = launcher.x_ND.shape[0], launcher.cap
    size = chunk_tokens(num_tokens, bytes_per_token, launcher.d_sae)
    # The candidates' memory serves the recomputation too, which may need k keys for every token.
    space = launcher.x_ND.new_empty(max(size * cap, num_tokens * launcher.k), dtype=torch.int64)
    zeroed = launcher.x_ND.new_zeros(2 * num_tokens + 1, dtype=torch.int32)
    counts, listed = zeroed[:num_tokens], zeroed[num_tokens:]
    for start in range(0, num_tokens, size):
        part = slice(start, min(start + size, num_tokens))
        count = counts[part]
        yield part, count, listed, space[: count.shape[0] * cap].view(-1, cap)
    launcher.recompute(listed, space)


def encode_filter(launcher: Launcher, hint_N: Tensor | None, filter_pass: FilterPass | None = None) -> None:
    """One GEMM whose epilogue keeps what exceeds a floor per token; `filter_pass` replaces Triton's.

    The floor comes from a guess of the k-th value, or else from a second, small GEMM over some features.
    """
    sample = choose_sample(launcher.kept, launcher.d_sae)
    expected = sample.expected if hint_N is None else 2 * launcher.kept
    m = per_group(expected, launcher.d_sae) or MAX_PER_GROUP
    # A guess that is no number admits nothing, and the token is recomputed; below 0 it is as good as 0.
    floor_n = None if hint_N is None else hint_N.float() * HINT_SLACK
    for part, count, listed, cand in _chunks(launcher, 8 * launcher.cap):
        floor = launcher.sampled_floor(part, sample.stride, sample.rank) if floor_n is None else floor_n[part]
        if filter_pass is None:
            launcher.gemm(part, m, floor, count, cand)
        else:
            filter_pass(part, floor, count, cand)
        launcher.rank(part, floor, count, cand, listed)


def encode_rows(launcher: Launcher) -> None:
    """Every token by the exact row kernel: for few tokens, or k so large that no filter would certify."""
    num_tokens = launcher.x_ND.shape[0]
    listed = torch.arange(-1, num_tokens, dtype=torch.int32, device=launcher.x_ND.device)
    listed[0] = num_tokens
    slices = max(1, min(ROW_SLICES, FLOOR_BYTES // (8 * num_tokens * launcher.k)))
    space = launcher.x_ND.new_empty(num_tokens * slices * launcher.k, dtype=torch.int64)
    launcher.recompute(listed, space)
