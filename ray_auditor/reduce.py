"""From token rows to per-prompt sums: how much of the base's top features a candidate kept.

Everything after this reads the per-prompt sums alone. Overlap and shift are integers, so no order of tokens,
prompts or workers can change them.
"""

# Shape suffixes: N scored tokens, K = kept features, M = matched (token, feature) pairs, P prompts.

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ray_auditor.shard import TokenRows

DEFAULT_KS = (1, 5, 10, 20, 32)
MISS_FLOOR = 1e-6  # of the base's energy: a smaller reconstruction error is the rounding of fp32
CHUNK_TOKENS = 2048  # the working set of a chunk stays in cache


class NonfiniteActivations(ValueError):
    """A candidate has tokens whose residual is not finite.

    Attributes:
        code: `nonfinite_activations`, the reason's slug.
        num_tokens: How many of its scored tokens.
    """

    code = "nonfinite_activations"

    def __init__(self, num_tokens: int, total: int) -> None:
        super().__init__(
            f"{num_tokens} of {total} tokens have activations that are not finite; the weights are broken or "
            "overflow in this dtype"
        )
        self.num_tokens = num_tokens


def available_ks(k: int, ks: Sequence[int] = DEFAULT_KS) -> tuple[int, ...]:
    """The `ks` that rows with k kept features can serve, ascending, and k itself."""
    return tuple(sorted({kept for kept in ks if 1 <= kept < k} | {k}))


def reduce_prompts(
    base: TokenRows, cand: TokenRows, *, suites: Sequence[str], ks: Sequence[int] = DEFAULT_KS
) -> Any:
    """Compare a candidate's rows with the base's, prompt by prompt.

    For one token let A and B be the active features among the k largest of base and candidate, ties by
    lowest index. Overlap is |A & B|, shift is max(|A|, |B|, 1) - overlap; jaccard, at k = K, is
    sum(min) / sum(max) of the absolute activations over A | B, and 1 where both are empty.

    Args:
        base: Rows of the base.
        cand: Rows of the candidate over exactly the same tokens.
        suites: Suite names; `suite_N` counts into them.
        ks: Values of k to report, see `available_ks`.

    Returns:
        pa.Table: One row a prompt, in the order of the rows: `suite` (string), `prompt` (int32), `tokens`
        (int64), `overlap_{k}` and `shift_{k}` (int64) for every k, `shift_quartic` (int64, of shift^4 at K),
        `jaccard`, `fvu_err`, `fvu_total`, `base_fvu_err`, `base_fvu_total`, `log_miss` (of log(error of the
        candidate / error of the base)), `cosine`, `change`, `change_quartic` (float64, of change^4); all but
        the first two are sums over the prompt's tokens.

    Raises:
        ValueError: The rows differ in tokens or in K, or a suite has no name.
        NonfiniteActivations: The candidate has rows that are not finite.
    """
    _check_match(base, cand, len(suites))
    ks = available_ks(base.k, ks)
    N = base.num_tokens
    change_N = (np.diff(base.suite_N) != 0) | (np.diff(base.prompt_N) != 0)
    start_P = np.flatnonzero(np.append(True, change_N)) if N else np.empty(0, np.int64)
    prompt_of_N = np.repeat(np.arange(len(start_P)), np.diff(start_P, append=N))

    # column of the smallest k in ks that keeps a rank
    level_K = np.searchsorted(ks, np.arange(base.k), side="right")
    counts = np.zeros((len(start_P), len(ks)), np.int64)
    jaccard_N = np.empty(N)
    num_active_N, num_kept_N = np.empty(N, np.int64), np.empty(N, np.int64)
    for start in range(0, N, CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        left_idx_NK, left_acts_NK = rank_features(base.top_idx_NK[chunk], base.top_acts_NK[chunk])
        right_idx_NK, right_acts_NK = rank_features(cand.top_idx_NK[chunk], cand.top_acts_NK[chunk])
        token_M, left_M, right_M = match_features(left_idx_NK, right_idx_NK)
        # the prompts of a chunk are consecutive, so their histogram is small
        first, last = prompt_of_N[chunk][0], prompt_of_N[chunk][-1] + 1
        cell_M = (prompt_of_N[chunk] - first)[token_M] * len(ks) + level_K[np.maximum(left_M, right_M)]
        cells = np.bincount(cell_M, minlength=(last - first) * len(ks))
        counts[first:last] += cells.reshape(-1, len(ks))
        num_active_N[chunk] = ((left_idx_NK >= 0) | (right_idx_NK >= 0)).sum(1)  # active ones come first
        num_kept_N[chunk] = np.bincount(token_M, minlength=len(left_idx_NK))
        row_M = token_M * base.k
        smaller_M = np.minimum(left_acts_NK.take(row_M + left_M), right_acts_NK.take(row_M + right_M))
        smaller_N = np.bincount(token_M, weights=smaller_M, minlength=len(left_idx_NK))
        larger_N = left_acts_NK.sum(1, dtype=float) + right_acts_NK.sum(1, dtype=float) - smaller_N
        jaccard_N[chunk] = np.divide(smaller_N, larger_N, out=np.ones_like(larger_N), where=larger_N > 0)

    overlap = dict(zip(ks, counts.cumsum(1).T, strict=True))
    columns: dict[str, Any] = {
        "suite": pa.array([suites[suite] for suite in base.suite_N[start_P]], pa.string()),
        "prompt": base.prompt_N[start_P],
        "tokens": np.diff(start_P, append=N),
    }
    for k in ks:
        columns[f"overlap_{k}"] = overlap[k]
        columns[f"shift_{k}"] = _sum_P(np.clip(num_active_N, 1, k), start_P) - overlap[k]
    columns["shift_quartic"] = _sum_P((np.clip(num_active_N, 1, base.k) - num_kept_N) ** 4, start_P)
    columns["jaccard"] = _sum_P(jaccard_N, start_P)
    for prefix, rows in (("", cand), ("base_", base)):
        columns[f"{prefix}fvu_err"] = _sum_P(rows.fvu_err_N.astype(float), start_P)
        columns[f"{prefix}fvu_total"] = _sum_P(rows.fvu_total_N.astype(float), start_P)
    columns["log_miss"] = _sum_P(_log_miss(base, cand), start_P)
    columns["cosine"] = _sum_P(cand.cosine_N.astype(float), start_P)
    columns["change"] = _sum_P(cand.change_N.astype(float), start_P)
    columns["change_quartic"] = _sum_P(cand.change_N.astype(float) ** 4, start_P)
    return pa.table(columns)


def _log_miss(base: TokenRows, cand: TokenRows) -> npt.NDArray[np.float64]:
    """Log of a token's reconstruction error over the base's, [N]; rounding counts as none."""
    floor_N = MISS_FLOOR * base.fvu_total_N.astype(float) + np.finfo(float).tiny
    log_N: npt.NDArray[np.float64] = np.log(
        np.maximum(cand.fvu_err_N, floor_N) / np.maximum(base.fvu_err_N, floor_N)
    )
    return log_N


def rank_features(
    idx_NK: npt.NDArray[np.int32], acts_NK: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Features and absolute activations of every token: largest first, ties by lowest index, -1 last."""
    # the bits of floats >= 0 order as the floats do, so one integer sort orders by both keys
    bits_NK = np.abs(acts_NK).view(np.uint32).astype(np.uint64)
    keys_NK = ((np.uint64(0x7FFFFFFF) - bits_NK) << np.uint64(32)) | idx_NK.view(np.uint32)
    keys_NK.sort(axis=1)
    bits_NK = np.uint64(0x7FFFFFFF) - (keys_NK >> np.uint64(32))
    return keys_NK.astype(np.uint32).view(np.int32), bits_NK.astype(np.uint32).view(np.float32)


def match_features(
    left_idx_NK: npt.NDArray[np.int32], right_idx_NK: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Features active on both sides of a token: token, column on the left, column on the right; [M] each."""
    N, K = left_idx_NK.shape
    largest = max(left_idx_NK.max(initial=0), right_idx_NK.max(initial=0))
    dtype: type[np.unsignedinteger[Any]] = np.uint32 if largest < (1 << 24) - 4 else np.uint64
    # feature, side, column: sorted, a feature of both sides is a pair of neighbours of different side;
    # the last column keeps one token's keys from meeting the next token's
    keys = np.full((N, 2 * K + 1), -1).astype(dtype)
    for side, idx_NK in enumerate((left_idx_NK, right_idx_NK)):
        idx_NK = np.where(idx_NK < 0, -2 - side, idx_NK)  # inactive never matches inactive
        tag_K = np.arange(side << 7, (side << 7) + K, dtype=dtype)
        keys[:, side * K : (side + 1) * K] = (idx_NK.astype(dtype) << 8) | tag_K
    keys[:, :-1].sort(axis=1)
    flat = keys.ravel()
    pair_M = np.flatnonzero((flat[1:] ^ flat[:-1]) >> 7 == 1)
    column_M, other_M = flat[pair_M] & 127, flat[pair_M + 1] & 127
    return pair_M // (2 * K + 1), column_M.astype(np.int64), other_M.astype(np.int64)


def _sum_P(values_N: npt.NDArray[Any], start_P: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    return np.add.reduceat(values_N, start_P) if len(start_P) else values_N[:0]


def _check_match(base: TokenRows, cand: TokenRows, num_suites: int) -> None:
    if base.k != cand.k or base.num_tokens != cand.num_tokens:
        raise ValueError(
            f"candidate has {cand.num_tokens} tokens with k {cand.k}, the base {base.num_tokens} with k "
            f"{base.k}; compare units of the same suites and k"
        )
    differs_N = (
        (base.suite_N != cand.suite_N)
        | (base.prompt_N != cand.prompt_N)
        | (base.position_N != cand.position_N)
    )
    if differs_N.any():
        at = int(np.flatnonzero(differs_N)[0])
        names = ("suite", "prompt", "position")
        a, b = (
            dict(zip(names, map(int, (r.suite_N[at], r.prompt_N[at], r.position_N[at])), strict=True))
            for r in (base, cand)
        )
        raise ValueError(
            f"row {at} is {b} in the candidate and {a} in the base; they must be the same tokens"
        )
    if base.num_tokens and not 0 <= base.suite_N[0] <= base.suite_N[-1] < num_suites:
        raise ValueError(f"suite must be in [0, {num_suites}), got {base.suite_N[0]} to {base.suite_N[-1]}")
    broken = np.isnan(cand.top_acts_NK[:, 0]) | ~np.isfinite(cand.fvu_err_N) | ~np.isfinite(cand.fvu_total_N)
    if broken.any():
        raise NonfiniteActivations(int(broken.sum()), cand.num_tokens)
