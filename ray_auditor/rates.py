"""From per-prompt sums to the difference rate of a suite, with its interval.

Intervals resample prompts, never tokens. Every candidate meets the same resamples of a suite, so that
differences between candidates are paired; suites are resampled independently of each other.
"""

# Shape suffixes: P prompts of one suite, B = bootstrap samples.

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

NOISE_MARGIN = 2.0  # a general shift below this many noise floors is not clearly above it


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: `level` is the share of resamples that an interval covers."""

    num_samples: int = 1000
    level: float = 0.95
    seed: int = 0

    def weights(self, suite: str, num_prompts: int) -> npt.NDArray[np.float64]:
        """How often each resample draws each prompt, [B, P]: the same for every candidate."""
        return _weights(self.num_samples, self.seed, suite, num_prompts)

    def interval(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Lower and upper ends, [2, ...], of resampled values [B, ...]."""
        tail = (1 - self.level) / 2
        ends: npt.NDArray[np.float64] = np.quantile(values, [tail, 1 - tail], axis=0)
        return ends


@dataclass(frozen=True)
class SuiteSums:
    """One candidate on one suite: sums over the scored tokens of each prompt, prompts ascending."""

    prompt_P: npt.NDArray[np.int64]
    tokens_P: npt.NDArray[np.int64]
    shift_P: npt.NDArray[np.int64]
    overlap_P: npt.NDArray[np.int64]
    shift_quartic_P: npt.NDArray[np.int64]
    log_miss_P: npt.NDArray[np.float64]
    change_quartic_P: npt.NDArray[np.float64]
    jaccard: float
    cosine: float
    change: float
    fvu: float
    base_fvu: float

    @property
    def tokens(self) -> int:
        """Scored tokens of the suite."""
        return int(self.tokens_P.sum())

    @property
    def shift(self) -> float:
        """Mean shift of a token."""
        return int(self.shift_P.sum()) / self.tokens

    @property
    def overlap(self) -> float:
        """Mean overlap of a token, out of k."""
        return int(self.overlap_P.sum()) / self.tokens

    def resampled_shift(self, bootstrap: Bootstrap, suite: str) -> npt.NDArray[np.float64]:
        """Mean shift in every resample of the suite's prompts, [B]."""
        weights_BP = bootstrap.weights(suite, len(self.prompt_P))
        # sums of integers below 2^53: exact, so no summing order changes a bit
        resampled: npt.NDArray[np.float64] = (weights_BP @ self.shift_P.astype(float)) / (
            weights_BP @ self.tokens_P.astype(float)
        )
        return resampled


@dataclass(frozen=True)
class SuiteRate:
    """One candidate on one suite.

    Attributes:
        tokens: Scored tokens.
        overlap: Mean overlap of a token with the base, out of k.
        shift: Mean shift of a token, N_s.
        difference_rate: (N_s - N_b) / N_b; 0 for the general suite itself, None when undetermined.
        ci_low: Lower end of its bootstrap interval; None when undetermined or the suite has one prompt.
        ci_high: Upper end.
        d_abs: (I_b - I_s) / k, the same difference as a share of k.
        d_overlap: (I_b - I_s) / I_b, as a share of the general overlap; None when that is 0.
        jaccard: Mean weighted Jaccard of the activations.
        cosine: Mean cosine of the residuals of candidate and base.
        change: Mean norm of the difference of the residuals, over that of the base's.
        fvu: Share of the candidate's residual energy that the kept features miss.
        base_fvu: The same for the base.
    """

    tokens: int
    overlap: float
    shift: float
    difference_rate: float | None
    ci_low: float | None
    ci_high: float | None
    d_abs: float
    d_overlap: float | None
    jaccard: float
    cosine: float
    change: float
    fvu: float
    base_fvu: float


def difference_rate(shift_suite: float, shift_general: float) -> float:
    """(N_s - N_b) / N_b with N the mean shift of a token; `shift_general` must be above 0."""
    return (shift_suite - shift_general) / shift_general


def suite_sums(prompt_rows: Any, k: int) -> dict[str, SuiteSums]:
    """Group a `reduce_prompts` table by suite, suites by name; the order of its rows does not matter."""
    if f"shift_{k}" not in prompt_rows.column_names:
        raise ValueError(f"k must be one of the reduced ones, got {k} for columns {prompt_rows.column_names}")
    suite_of = np.array(prompt_rows["suite"].to_pylist(), dtype=object)
    column = {name: prompt_rows[name].to_numpy() for name in prompt_rows.column_names if name != "suite"}
    sums = {}
    for suite in sorted(set(suite_of)):
        rows = np.flatnonzero(suite_of == suite)
        rows = rows[np.argsort(column["prompt"][rows], kind="stable")]
        total = {name: float(values[rows].sum()) for name, values in column.items()}
        sums[str(suite)] = SuiteSums(
            prompt_P=column["prompt"][rows].astype(np.int64),
            tokens_P=column["tokens"][rows],
            shift_P=column[f"shift_{k}"][rows],
            overlap_P=column[f"overlap_{k}"][rows],
            shift_quartic_P=column["shift_quartic"][rows],
            log_miss_P=column["log_miss"][rows],
            change_quartic_P=column["change_quartic"][rows],
            jaccard=total["jaccard"] / total["tokens"],
            cosine=total["cosine"] / total["tokens"],
            change=total["change"] / total["tokens"],
            fvu=_share(total["fvu_err"], total["fvu_total"]),
            base_fvu=_share(total["base_fvu_err"], total["base_fvu_total"]),
        )
    return sums


def rates(
    prompt_rows: Any, *, general: str, k: int, bootstrap: Bootstrap, noise_floor: float = 0.0
) -> dict[str, SuiteRate]:
    """Difference rates of one candidate on every suite.

    The rate is undetermined when the general shift is not clearly above the noise floor: when the lower
    end of its interval is not above `NOISE_MARGIN` times the floor: then a ratio would be noise over noise.

    Args:
        prompt_rows: A table of `reduce_prompts`.
        general: Name of the general suite.
        k: One of the reduced values of k.
        bootstrap: Resampling of prompts.
        noise_floor: Mean shift of the base against itself on the general suite.

    Raises:
        ValueError: The general suite is missing, or k was not reduced.
    """
    return rates_from_sums(suite_sums(prompt_rows, k), general, k, bootstrap, noise_floor)


def rates_from_sums(
    sums: Mapping[str, SuiteSums], general: str, k: int, bootstrap: Bootstrap, noise_floor: float
) -> dict[str, SuiteRate]:
    """`rates` of sums that are already grouped by suite."""
    if general not in sums:
        raise ValueError(f"general must be one of the suites {sorted(sums)}, got {general!r}")
    general_B = sums[general].resampled_shift(bootstrap, general)
    general_low = float(bootstrap.interval(general_B)[0])
    determined = general_low > NOISE_MARGIN * noise_floor and sums[general].shift > 0
    general_B[general_B == 0] = max(general_low, np.finfo(float).tiny)
    result = {}
    for suite, one in sums.items():
        rate = low = high = None
        if determined:
            rate = difference_rate(one.shift, sums[general].shift)
            if min(len(one.prompt_P), len(sums[general].prompt_P)) > 1:
                suite_B = general_B if suite == general else one.resampled_shift(bootstrap, suite)
                low, high = bootstrap.interval((suite_B - general_B) / general_B).tolist()
        overlap_lost = sums[general].overlap - one.overlap
        result[suite] = SuiteRate(
            tokens=one.tokens,
            overlap=one.overlap,
            shift=one.shift,
            difference_rate=rate,
            ci_low=low,
            ci_high=high,
            d_abs=overlap_lost / k,
            d_overlap=overlap_lost / sums[general].overlap if sums[general].overlap else None,
            jaccard=one.jaccard,
            cosine=one.cosine,
            change=one.change,
            fvu=one.fvu,
            base_fvu=one.base_fvu,
        )
    return result


def noise_floor(prompt_rows: Any, k: int) -> Mapping[str, float]:
    """Mean shift per suite of a table of the base against itself."""
    return {suite: one.shift for suite, one in suite_sums(prompt_rows, k).items()}


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


@lru_cache(maxsize=512)
def _weights(num_samples: int, seed: int, suite: str, num_prompts: int) -> npt.NDArray[np.float64]:
    name = int.from_bytes(hashlib.sha256(suite.encode()).digest()[:8], "little")
    counts = np.random.default_rng([seed, name, num_prompts]).multinomial(
        num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_samples
    )
    weights = counts.astype(np.float64)
    weights.flags.writeable = False
    return weights
