"""How far each candidate strays on each suite from what a reference population leads one to expect.

Three channels are read from the per-prompt sums, and each prompt is held to its own history: how much it
moves in the reference finetunes, and how much they differ on it. docs/method.md has the formulas.
"""

# Shape suffixes: C candidates, Q reference finetunes, P prompts of all suites, S suites.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from ray_auditor.rates import SuiteSums

Matrix = npt.NDArray[np.float64]

CHANNELS = ("shift", "change", "miss")
SHIFT_FLOOR = 0.01  # of k: added to a prompt's shift before its log
CHANGE_FLOOR = 0.005  # added to a prompt's relative residual change before its log
TAIL = 0.3  # share of a suite's prompts that speak for it, the highest
MIN_SPREAD = 0.005  # finetunes never agree so well on a prompt that less than half a percent is their spread
MIN_SCALE = 0.05  # of a prompt's spread: the same for the tail of a suite
OWN_SCALE = 0.25  # share of the suite's own spread in its scale, the rest is that of all suites
SETTLED_SHIFT = 0.03  # of k: on a suite that moved by as much a score is halved
MAD_TO_SIGMA = 0.6745
FIT_STEPS = 8
ROWS_PER_SUITE = 5  # that a covariance of suites takes


@dataclass(frozen=True)
class Prompts:
    """One row a finetune over the same prompts, suites by name; the general one is among them.

    `values` holds each channel as [C, P]; `moved_CS` is the mean shift of a suite, a share of k.
    """

    names: tuple[str, ...]
    suites: tuple[str, ...]
    suite_P: npt.NDArray[np.int64]
    values: Mapping[str, Matrix]
    moved_CS: Matrix

    @cached_property
    def of_suite(self) -> tuple[slice, ...]:
        """The prompts of every suite."""
        ends = np.searchsorted(self.suite_P, np.arange(len(self.suites) + 1))
        return tuple(slice(int(a), int(b)) for a, b in pairwise(ends))

    def suite_means(self, values_CP: Matrix) -> Matrix:
        """Mean over the prompts of each suite, [C, S]."""
        return np.stack([values_CP[:, where].mean(axis=1) for where in self.of_suite], axis=1)


def read_prompts(sums: Mapping[str, Mapping[str, SuiteSums]], k: int) -> Prompts:
    """Line up the sums of several finetunes, by name; all must be over the same prompts.

    Per prompt of T tokens: shift = log((sum of n^4 / T)^(1/4) + 0.01 k), change the same of the residual's
    relative change with 0.005, miss = mean over tokens of log(reconstruction error / the base's). The fourth
    power lets the tokens that moved most speak for the prompt.
    """
    names = tuple(sorted(sums))
    suites = tuple(sorted(sums[names[0]]))
    columns: dict[str, list[Matrix]] = {channel: [] for channel in CHANNELS}
    moved = np.empty((len(names), len(suites)))
    for c, name in enumerate(names):
        parts = [sums[name][suite] for suite in suites]
        tokens_P = np.concatenate([one.tokens_P for one in parts])
        for channel, quartics, floor in (
            ("shift", [one.shift_quartic_P for one in parts], SHIFT_FLOOR * k),
            ("change", [one.change_quartic_P for one in parts], CHANGE_FLOOR),
        ):
            columns[channel].append(np.log((np.concatenate(quartics) / tokens_P) ** 0.25 + floor))
        columns["miss"].append(np.concatenate([one.log_miss_P for one in parts]) / tokens_P)
        moved[c] = [one.shift / k for one in parts]
    for channel, rows in columns.items():
        if not np.isfinite(rows).all():
            raise ValueError(
                f"the sums of {channel} must be finite; delete store/sums and run the sweep again"
            )
    lengths = [len(sums[names[0]][suite].prompt_P) for suite in suites]
    return Prompts(
        names,
        suites,
        np.repeat(np.arange(len(suites)), lengths),
        {channel: np.array(rows) for channel, rows in columns.items()},
        moved,
    )


@dataclass(frozen=True)
class Norms:
    """What one channel's reference finetunes lead one to expect.

    Attributes:
        effect_P: How much more a prompt moves than others of the same finetune: the median of the reference.
        scale_P: Robust standard deviation of the reference on the prompt, raised by the median prompt's.
        centre_S: Median of the reference's suite scores.
        scale_S: Their robust standard deviation, drawn towards that of all suites.
    """

    effect_P: Matrix
    scale_P: Matrix
    centre_S: Matrix
    scale_S: Matrix


def fit_norms(prompts: Prompts, values_QP: Matrix) -> Norms:
    """Fit prompt effects to a reference by a median polish, and the spread that is left.

    Source: Tukey 1977, Exploratory Data Analysis, chapter 11.
    """
    effect_P = np.median(values_QP, axis=0)
    for _ in range(FIT_STEPS):
        size_Q1 = _sizes(prompts, values_QP - effect_P)
        effect_P = np.median(values_QP - size_Q1, axis=0)
    left_QP = values_QP - effect_P
    left_QP -= _sizes(prompts, left_QP)
    own_P = np.median(np.abs(left_QP), axis=0) / MAD_TO_SIGMA
    scale_P = own_P + max(float(np.median(own_P)), MIN_SPREAD)
    raw_QS = _suite_scores(prompts, left_QP / scale_P)
    centre_S = np.median(raw_QS, axis=0)
    stray_QS = np.abs(_centred(raw_QS - centre_S)) / MAD_TO_SIGMA
    scale_S = OWN_SCALE * np.median(stray_QS, axis=0) + (1 - OWN_SCALE) * np.median(stray_QS)
    return Norms(effect_P, scale_P, centre_S, np.maximum(scale_S, MIN_SCALE))


def score_suites(prompts: Prompts, norms: Norms, values_CP: Matrix) -> Matrix:
    """How far each finetune strays on each suite, [C, S], in robust standard deviations of the reference."""
    raw_CS = _suite_scores(prompts, _stray(prompts, norms, values_CP))
    z_CS: Matrix = _centred(raw_CS - norms.centre_S) / norms.scale_S
    return z_CS


def settle(moved_CS: Matrix) -> Matrix:
    """Factor, [C, S], that keeps what hardly moved from standing out by a ratio of nothings."""
    factor_CS: Matrix = moved_CS / (moved_CS + SETTLED_SHIFT)
    return factor_CS


def resampled_score(prompts: Prompts, norms: Norms, row_P: Matrix, suite: int, weights_BP: Matrix) -> Matrix:
    """`score_suites` of one finetune on one suite in every resample of the suite's prompts, [B].

    The reference, and what the finetune does on other suites, stay as they are.
    """
    raw_S = _suite_scores(prompts, _stray(prompts, norms, row_P[None]))[0]
    rest = np.median(raw_S - norms.centre_S)
    stray_P = _stray(prompts, norms, row_P[None])[0, prompts.of_suite[suite]]
    order_P = np.argsort(-stray_P, kind="stable")
    count = _tail_count(len(stray_P))
    before_BP = np.cumsum(weights_BP[:, order_P], axis=1) - weights_BP[:, order_P]
    taken_BP = np.clip(count - before_BP, 0, weights_BP[:, order_P])
    raw_B = taken_BP @ stray_P[order_P] / count
    score_B: Matrix = (raw_B - norms.centre_S[suite] - rest) / norms.scale_S[suite]
    return score_B


def joint_distances(z_CS: Matrix, reference: Sequence[int]) -> Matrix | None:
    """Give p-values of the robust Mahalanobis distance of each finetune over its suites together, [C].

    Source: Rousseeuw and Van Driessen 1999, A fast algorithm for the minimum covariance determinant.

    Args:
        z_CS: Scores on suites.
        reference: Rows that the covariance is estimated from.

    Returns:
        None when the reference has fewer than `ROWS_PER_SUITE` rows for each suite.
    """
    num_suites = z_CS.shape[1]
    if len(reference) < ROWS_PER_SUITE * num_suites:
        return None
    from sklearn.covariance import MinCovDet

    fit = MinCovDet(random_state=0).fit(z_CS[list(reference)])
    p_C: Matrix = chi2.sf(fit.mahalanobis(z_CS), num_suites)
    return p_C


def _stray(prompts: Prompts, norms: Norms, values_CP: Matrix) -> Matrix:
    left_CP = values_CP - norms.effect_P
    stray_CP: Matrix = (left_CP - _sizes(prompts, left_CP)) / norms.scale_P
    return stray_CP


def _sizes(prompts: Prompts, values_CP: Matrix) -> Matrix:
    """How much a finetune moves everywhere, [C, 1]: the median of its suites' means."""
    size_C1: Matrix = np.median(prompts.suite_means(values_CP), axis=1, keepdims=True)
    return size_C1


def _suite_scores(prompts: Prompts, stray_CP: Matrix) -> Matrix:
    """Mean of the highest `TAIL` of each suite's prompts, [C, S]."""
    columns = []
    for where in prompts.of_suite:
        part_CP = -stray_CP[:, where]
        count = _tail_count(part_CP.shape[1])
        columns.append(-np.sort(part_CP, axis=1)[:, :count].mean(axis=1))
    return np.stack(columns, axis=1)


def _tail_count(num_prompts: int) -> int:
    return max(1, round(TAIL * num_prompts))


def _centred(values_CS: Matrix) -> Matrix:
    centred_CS: Matrix = values_CS - np.median(values_CS, axis=1, keepdims=True)
    return centred_CS


def distinct(prompts: Prompts, members: Sequence[int]) -> list[int]:
    """The members without copies: of finetunes with the same sums on every prompt, the first by name."""
    seen: dict[bytes, int] = {}
    for member in sorted(members):
        seen.setdefault(b"".join(prompts.values[channel][member].tobytes() for channel in CHANNELS), member)
    return list(seen.values())
