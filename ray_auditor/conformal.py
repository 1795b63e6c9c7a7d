"""p-values from a null population, and how many candidates may be called at a level.

A p-value here is a rank: how many finetunes known to be benign score as high as the candidate. Its guarantee
asks only that a benign candidate is exchangeable with the null; no distribution is assumed. The null's size
bounds what can be said: no p-value is below 1 / (n + 1).
"""

# Shape suffixes: C candidates, Q null members.

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control

Vector = npt.NDArray[np.float64]


def cross_conformal_p(scores_QC: npt.ArrayLike, null_Q: npt.ArrayLike) -> Vector:
    """Rank p-values, (1 + #{null >= score}) / (n + 1): ties count against a flag, NaN scores have p 1.

    Each null member may have its own fit: member q is compared with a candidate under the fit without it.

    Every member then serves both to fit and to calibrate, and never both at once. In practice a benign
    candidate has p <= a with probability about a; with folds no bound near that is proven.

    Source: Vovk, Gammerman, Shafer 2005, Algorithmic Learning in a Random World; Vovk 2015, Cross-conformal
    predictors; Barber et al. 2021, Predictive inference with the jackknife+.

    Args:
        scores_QC: [Q, C], score of a candidate under the fit that left out member q's fold.
        null_Q: [Q], member q's own score under that fit.

    Raises:
        ValueError: There is no null member, or one has no score.
    """
    scores_QC, null_Q = np.asarray(scores_QC, np.float64), np.asarray(null_Q, np.float64)
    if not len(null_Q) or np.isnan(null_Q).any():
        raise ValueError(f"a null must hold scores, got {len(null_Q)} with {np.isnan(null_Q).sum()} missing")
    not_below_QC = ~(null_Q[:, None] < scores_QC)  # NaN scores are never above
    p_C: Vector = (1 + not_below_QC.sum(axis=0)) / (len(null_Q) + 1)
    return p_C


def q_values(p_C: npt.ArrayLike) -> Vector:
    """Benjamini-Hochberg: calling every candidate with q <= a keeps the expected share of false calls <= a.

    It holds for split conformal p-values that share one null (they are positively dependent); for
    cross-conformal ones it is what is found, not proven. Source: Benjamini and Hochberg 1995; Bates et al.
    2023.
    """
    p_C = np.asarray(p_C, dtype=np.float64)
    q_C: Vector = false_discovery_control(p_C, method="bh") if len(p_C) else p_C
    return q_C


def smallest_level(num_null: int, num_candidates: int, num_outliers: int = 1) -> float:
    """The smallest level at which `num_outliers` of `num_candidates` could be called with such a null.

    With r outliers all above the null, their p is 1 / (n + 1) and their q is m / (r (n + 1)).
    """
    return min(1.0, num_candidates / (max(num_outliers, 1) * (num_null + 1)))


def null_size_needed(level: float, num_candidates: int, num_outliers: int = 1) -> int:
    """How large a null has to be before `num_outliers` of `num_candidates` can be called at `level`."""
    return max(0, math.ceil(num_candidates / (level * max(num_outliers, 1)) - 1 - 1e-9))
