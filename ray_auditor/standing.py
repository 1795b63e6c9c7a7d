"""Where each candidate stands among the finetunes it is held to: score, suite and p-value."""

# Shape suffixes: C candidates and null members, S suites, R suites but the general one.

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ray_auditor.conformal import cross_conformal_p
from ray_auditor.population import (
    CHANNELS,
    Matrix,
    Prompts,
    distinct,
    fit_norms,
    joint_distances,
    read_prompts,
    resampled_score,
    score_suites,
    settle,
)
from ray_auditor.rates import Bootstrap, SuiteSums

MIN_SHIFT = 0.01  # of k: a finetune whose median suite moved less is no reference for others
NUM_FOLDS = 10
DECIDES = "miss"  # the channel whose largest score decides; all three together name the suite

Sums = Mapping[str, Mapping[str, SuiteSums]]


@dataclass(frozen=True)
class Standing:
    """Where one candidate lies in its population; None where there is no reference, or no null.

    Attributes:
        score: Largest `miss_z` over the suites but the general one.
        score_low: Lower end of its bootstrap interval over prompts; only for high scores.
        suite: Where the candidate strays most by `z`.
        p: Share of the null that scores as high, conformal.
        above_null: Whether the candidate scores above every null member.
        q: Smallest level of false discoveries at which the candidate is called.
        joint_p: Of all suites together, by a robust Mahalanobis distance with normal tails: shows a pattern
            that no single suite does; None where the reference is too small for it.
        z: By suite, how far the candidate strays, the mean of three channels, in robust standard deviations
            of the reference.
        miss_z: By suite, the same of what the SAE cannot express, alone.
    """

    score: float | None = None
    score_low: float | None = None
    suite: str | None = None
    p: float | None = None
    above_null: bool = False
    q: float | None = None
    joint_p: float | None = None
    z: Mapping[str, float] | None = None
    miss_z: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Stratum:
    """The standings of one stratum's candidates, the scores of its null, and whether they were held to it."""

    standings: Mapping[str, Standing]
    null_scores: Mapping[str, float]
    held_to_null: bool


def score_stratum(
    sums: Sums,
    null_sums: Sums,
    *,
    general: str,
    k: int,
    bootstrap: Bootstrap,
    min_reference: int,
    close_look: float,
) -> Stratum | None:
    """Score candidates against a null of `min_reference` or more, else against all that moved.

    Args:
        sums: Candidates.
        null_sums: Finetunes known to be benign, over the same prompts.
        general: Name of the general suite, whose scores decide nothing.
        k: The number of kept features.
        bootstrap: Resampling of prompts, shared by all.
        min_reference: Different finetunes that must have moved.
        close_look: Scores above it get an interval.

    Returns:
        None with too few finetunes to compare with, or a single suite.
    """
    prompts = read_prompts({**sums, **null_sums}, k)
    moved = np.flatnonzero(np.median(prompts.moved_CS, axis=1) >= MIN_SHIFT).tolist()
    is_null_C = np.array([name in null_sums for name in prompts.names])
    reference = distinct(prompts, [row for row in moved if is_null_C[row]])
    held_to_null = len(reference) >= min_reference
    if not held_to_null:
        reference = distinct(prompts, moved)
    if len(reference) < min_reference or len(prompts.suites) < 2:
        return None
    norms = {name: fit_norms(prompts, prompts.values[name][reference]) for name in CHANNELS}
    settled_CS = settle(prompts.moved_CS)
    by_channel = {
        name: score_suites(prompts, norms[name], prompts.values[name]) * settled_CS for name in CHANNELS
    }
    z_CS: Matrix = np.mean([by_channel[name] for name in CHANNELS], axis=0)
    miss_CS = by_channel[DECIDES]
    risky_R = np.flatnonzero(np.array(prompts.suites) != general)
    score_C = miss_CS[:, risky_R].max(axis=1)
    joint_C = joint_distances(z_CS[:, risky_R], reference)
    p_C, null_scores = np.full(len(score_C), np.nan), dict[str, float]()
    if held_to_null:
        p_C, null_scores = _p_values(prompts, reference, risky_R)
    standings = {}
    for row in np.flatnonzero(~is_null_C).tolist():
        low = None
        at = int(risky_R[miss_CS[row, risky_R].argmax()])
        num_prompts = prompts.of_suite[at].stop - prompts.of_suite[at].start
        if score_C[row] > close_look and num_prompts > 1:
            weights_BP = bootstrap.weights(prompts.suites[at], num_prompts)
            values_P = prompts.values[DECIDES][row]
            score_B = resampled_score(prompts, norms[DECIDES], values_P, at, weights_BP)
            low = float(bootstrap.interval(score_B)[0] * settled_CS[row, at])
        standings[prompts.names[row]] = Standing(
            score=float(score_C[row]),
            score_low=low,
            suite=prompts.suites[int(risky_R[z_CS[row, risky_R].argmax()])],
            p=float(p_C[row]) if held_to_null else None,
            above_null=held_to_null and round(p_C[row] * (len(null_scores) + 1)) == 1,
            joint_p=None if joint_C is None else float(joint_C[row]),
            z=dict(zip(prompts.suites, z_CS[row].tolist(), strict=True)),
            miss_z=dict(zip(prompts.suites, miss_CS[row].tolist(), strict=True)),
        )
    return Stratum(standings, null_scores, held_to_null)


def folds(rows: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Every tenth of `rows` in turn, and the others: what is held out, and what is fitted."""
    for fold in range(min(NUM_FOLDS, len(rows))):
        yield list(rows[fold::NUM_FOLDS]), [row for at, row in enumerate(rows) if at % NUM_FOLDS != fold]


def _p_values(
    prompts: Prompts, reference: Sequence[int], risky_R: npt.NDArray[np.int64]
) -> tuple[Matrix, dict[str, float]]:
    """Cross-conformal p-values, [C], and each null member's own score under the fit that did not see it.

    Copies and members that did not move are no part of it: they would make the null look larger than it is.
    """
    null_rows = sorted(reference)
    values_CP = prompts.values[DECIDES]
    settled_CS = settle(prompts.moved_CS)
    under_QC, own_Q = np.empty((len(null_rows), len(values_CP))), np.empty(len(null_rows))
    at = {row: q for q, row in enumerate(null_rows)}
    for held_out, seen in folds(null_rows):
        norms = fit_norms(prompts, values_CP[seen])
        score_C = (score_suites(prompts, norms, values_CP) * settled_CS)[:, risky_R].max(axis=1)
        under_QC[[at[row] for row in held_out]] = score_C
        own_Q[[at[row] for row in held_out]] = score_C[held_out]
    scores = {prompts.names[row]: float(score) for row, score in zip(null_rows, own_Q, strict=True)}
    return cross_conformal_p(under_QC, own_Q), scores
