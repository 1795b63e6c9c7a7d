"""What moved: the features a candidate keeps more or less often than the base, with tokens to look at."""

# Shape suffixes: N scored tokens of one suite, K = kept features, F = d_sae.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_auditor.reduce import match_features
from ray_auditor.shard import TokenRows
from ray_auditor.store import SuitePrompt

SIDE_FEATURES = 8  # of a token, base and candidate beside each other


@dataclass(frozen=True)
class MovedFeature:
    """One feature on one suite.

    Attributes:
        feature: Its index in the SAE.
        rate_base: Share of the suite's tokens on which the base keeps it among its k largest.
        rate_candidate: The same for the candidate.
        delta: `rate_candidate - rate_base`.
        general_delta: The same difference on the general suite.
        mean_act_base: Mean activation where the base keeps it; None where it never does.
        mean_act_candidate: The same for the candidate.
        mean_rank_base: Mean place among a token's features where the base keeps it; 1 is the largest.
        mean_rank_candidate: The same for the candidate.
        examples: (prompt, position) of the tokens whose activation moved most in delta's direction, one a
            prompt, largest first.
    """

    feature: int
    rate_base: float
    rate_candidate: float
    delta: float
    general_delta: float
    mean_act_base: float | None
    mean_act_candidate: float | None
    mean_rank_base: float | None
    mean_rank_candidate: float | None
    examples: tuple[tuple[int, int], ...]


def moved_features(
    base: TokenRows,
    cand: TokenRows,
    suite: int,
    general: int,
    *,
    num_features: int = 5,
    num_examples: int = 3,
) -> list[MovedFeature]:
    """The features whose firing rate changed on a suite by more than it did in general.

    Ordered by |delta - general_delta|, ties by lowest index; features that moved alike are left out.

    Args:
        base: Rows of the base.
        cand: Rows of the candidate, over the same tokens.
        suite: Number of the suite, as in `suite_N`.
        general: Number of the general suite.
        num_features: At most so many features.
        num_examples: At most so many tokens for each.
    """
    on_suite, in_general = ([_of_suite(rows, at) for rows in (base, cand)] for at in (suite, general))
    num_known = 1 + max(int(rows.top_idx_NK.max(initial=0)) for rows in (*on_suite, *in_general))
    rate_base_F, rate_cand_F = (_rates(rows, num_known) for rows in on_suite)
    delta_F = rate_cand_F - rate_base_F
    general_base_F, general_cand_F = (_rates(rows, num_known) for rows in in_general)
    general_delta_F = general_cand_F - general_base_F
    contrast_F = np.abs(delta_F - general_delta_F)
    moved = []
    for feature in np.argsort(-contrast_F, kind="stable")[:num_features].tolist():
        if contrast_F[feature] == 0:
            break
        acts_base_N, acts_cand_N = (_acts_of(rows, feature) for rows in on_suite)
        gain_N = (acts_cand_N - acts_base_N) * (1 if delta_F[feature] >= 0 else -1)
        moved.append(
            MovedFeature(
                feature=feature,
                rate_base=float(rate_base_F[feature]),
                rate_candidate=float(rate_cand_F[feature]),
                delta=float(delta_F[feature]),
                general_delta=float(general_delta_F[feature]),
                mean_act_base=_mean_active(acts_base_N),
                mean_act_candidate=_mean_active(acts_cand_N),
                mean_rank_base=_mean_rank(on_suite[0], acts_base_N),
                mean_rank_candidate=_mean_rank(on_suite[1], acts_cand_N),
                examples=_top_tokens(on_suite[0], gain_N, num_examples),
            )
        )
    return moved


def describe_features(
    moved: Sequence[MovedFeature],
    base: TokenRows,
    cand: TokenRows,
    prompts: Sequence[SuitePrompt],
    *,
    num_context: int = 16,
) -> list[dict[str, Any]]:
    """The records of `summary.json`'s `details`: moved features with their tokens in context.

    Args:
        moved: Features of one suite, from `moved_features`.
        base: Rows of the base.
        cand: Rows of the candidate.
        prompts: The prompts of that suite, from `Store.read_suites`.
        num_context: Tokens shown before and after an example's own.
    """
    by_number = {prompt.prompt: prompt for prompt in prompts}
    records = []
    for one in moved:
        examples: list[dict[str, Any]] = []
        for number, position in one.examples:
            prompt = by_number[number]
            overlaps = [-1] * len(prompt.token_ids)
            for at, overlap in _overlaps(base, cand, prompt.suite_id, number):
                overlaps[at] = overlap
            first = max(0, position - num_context)
            window = slice(first, position + num_context + 1)
            example = {
                "prompt": number,
                "tokens": list(prompt.token_texts[window]),
                "overlaps": overlaps[window],
                "focus": position - first,
            }
            if not examples:
                place = (prompt.suite_id, number, position)
                example["sides"] = {"base": _largest(base, place), "candidate": _largest(cand, place)}
            examples.append(example)
        record = {name: value for name, value in vars(one).items() if name != "examples"}
        records.append(record | {"examples": examples})
    return records


def _of_suite(rows: TokenRows, suite: int) -> TokenRows:
    start, stop = np.searchsorted(rows.suite_N, [suite, suite + 1])
    return TokenRows(*(column[start:stop] for column in vars(rows).values()))


def _rates(rows: TokenRows, num_known: int) -> npt.NDArray[np.float64]:
    kept = rows.top_idx_NK[rows.top_idx_NK >= 0]
    return np.bincount(kept, minlength=num_known) / max(rows.num_tokens, 1)


def _acts_of(rows: TokenRows, feature: int) -> npt.NDArray[np.float64]:
    acts_N: npt.NDArray[np.float64] = np.where(rows.top_idx_NK == feature, rows.top_acts_NK, 0).sum(
        1, dtype=float
    )
    return acts_N


def _mean_active(acts_N: npt.NDArray[np.float64]) -> float | None:
    active = acts_N[acts_N != 0]
    return float(active.mean()) if len(active) else None


def _mean_rank(rows: TokenRows, acts_N: npt.NDArray[np.float64]) -> float | None:
    active_N = acts_N != 0
    larger_N = (np.abs(rows.top_acts_NK) > np.abs(acts_N)[:, None]).sum(1)
    return float(1 + larger_N[active_N].mean()) if active_N.any() else None


def _top_tokens(
    rows: TokenRows, gain_N: npt.NDArray[np.float64], num_examples: int
) -> tuple[tuple[int, int], ...]:
    best: dict[int, int] = {}
    for at in np.argsort(-gain_N, kind="stable"):
        if gain_N[at] <= 0 or len(best) == num_examples:
            break
        best.setdefault(int(rows.prompt_N[at]), int(rows.position_N[at]))
    return tuple(best.items())


def _largest(rows: TokenRows, place: tuple[int, int, int]) -> list[tuple[int, float]]:
    """(feature, activation) of one token, largest activation first, at most `SIDE_FEATURES`."""
    suite, prompt, position = place
    (row,) = np.flatnonzero(
        (rows.suite_N == suite) & (rows.prompt_N == prompt) & (rows.position_N == position)
    )
    idx_K, acts_K = rows.top_idx_NK[row], rows.top_acts_NK[row]
    order = [at for at in np.argsort(-np.abs(acts_K), kind="stable") if idx_K[at] >= 0]
    return [(int(idx_K[at]), float(acts_K[at])) for at in order[:SIDE_FEATURES]]


def _overlaps(base: TokenRows, cand: TokenRows, suite: int, prompt: int) -> list[tuple[int, int]]:
    """(position, overlap at k = K) of the scored tokens of one prompt."""
    at = np.flatnonzero((base.suite_N == suite) & (base.prompt_N == prompt))
    token_M, _, _ = match_features(base.top_idx_NK[at], cand.top_idx_NK[at])
    overlap_N = np.bincount(token_M, minlength=len(at))
    return list(zip(base.position_N[at].tolist(), overlap_N.tolist(), strict=True))
