"""Whether the SAE fits: the base before anything is audited, and every candidate before it gets a rate.

FVU is the energy of the residual, less the decoder's bias, that the kept features miss; L0 the mean number of
active features. docs/method.md says where the bounds come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_auditor.shard import TokenRows

MAX_FVU = 0.5  # of features that are all an SAE has active
MAX_FVU_CUT = 0.8  # where k cuts active features off, whose energy then counts as missed
SATURATED = 0.9  # of k: a mean L0 above says that k cuts features off
L0_RANGE = (0.25, 4.0)  # of what the architecture or the metadata tells
KNOWN_FVU_RATIO, KNOWN_FVU_SLACK = 2.0, 0.2  # suites differ from what an SAE was measured on
RECORDED_FVU_RATIO, RECORDED_FVU_SLACK = 1.5, 0.05  # of the same base and SAE on other suites, another engine
RECORDED_L0_RANGE = (0.5, 2.0)
CANDIDATE_FVU_RATIO, CANDIDATE_FVU_SLACK = 2.0, 0.1

MISFIT = "sae_misfit"


@dataclass(frozen=True)
class Fit:
    """How well an SAE fits a model: `fvu` and `l0`, over some tokens."""

    fvu: float
    l0: float


@dataclass(frozen=True)
class Bounds:
    """What the base's fit must lie in, both ends included, and where that comes from."""

    max_fvu: float
    min_l0: float
    max_l0: float
    source: str


def measure_fit(rows: TokenRows, suite: int | None = None) -> Fit:
    """The fit over all tokens, or over those of one suite; an FVU without any energy is 0."""
    picked = slice(None) if suite is None else rows.suite_N == suite
    total = float(rows.fvu_total_N[picked].sum(dtype=float))
    active_N = (rows.top_idx_NK[picked] >= 0).sum(1)
    return Fit(
        float(rows.fvu_err_N[picked].sum(dtype=float)) / total if total > 0 else 0.0,
        float(active_N.mean()) if len(active_N) else 0.0,
    )


def base_bounds(
    *,
    k: int,
    max_active: int | None,
    found: Fit,
    max_fvu: float | None = None,
    recorded: Sequence[Fit] = (),
    explained_variance: float | None = None,
    expected_l0: float | None = None,
) -> Bounds:
    """What the base's fit is held to, by the best knowledge there is.

    Args:
        k: Features kept per token.
        max_active: Features a TopK SAE can have active, None for another.
        found: The base's fit; without `max_active` its L0 tells whether k cuts features off.
        max_fvu: The user's own bound; replaces any other.
        recorded: Fits of the same base, SAE and k in calibrations, a suite each.
        explained_variance: The SAE's metadata, in (0, 1); of the uncut SAE.
        expected_l0: The same, above 0.
    """
    is_cut = k < max_active if max_active is not None else found.l0 > SATURATED * k
    usual = min(k, max_active or expected_l0 or k)
    low, high = (usual * ratio for ratio in L0_RANGE)
    if max_active is None and expected_l0 is None:
        low, high = 0.0, float(k)
    if recorded:
        worst = max(fit.fvu for fit in recorded)
        bounds = Bounds(
            RECORDED_FVU_RATIO * worst + RECORDED_FVU_SLACK,
            RECORDED_L0_RANGE[0] * min(fit.l0 for fit in recorded),
            RECORDED_L0_RANGE[1] * max(fit.l0 for fit in recorded),
            "recorded by calibrate",
        )
    elif explained_variance is not None and not is_cut:
        known = KNOWN_FVU_RATIO * (1 - explained_variance) + KNOWN_FVU_SLACK
        bounds = Bounds(min(known, MAX_FVU_CUT), low, high, "the SAE's own metadata")
    else:
        bounds = Bounds(MAX_FVU_CUT if is_cut else MAX_FVU, low, high, "the default")
    if max_fvu is None:
        return bounds
    return Bounds(max_fvu, bounds.min_l0, bounds.max_l0, "sae.max_fvu")


def check_base(found: Fit, bounds: Bounds, hook_name: str) -> None:
    """Refuse an SAE that does not fit its base.

    Raises:
        ValueError: It does not; names the value, the bound, and what may be wrong.
    """
    remedy = (
        f"check that the SAE was trained on this base, at {hook_name}, and with this engine.dtype; "
        "sae.max_fvu raises the bound on fvu"
    )
    if not found.fvu <= bounds.max_fvu:
        raise ValueError(
            f"sae_gate.fvu of the base must be at most {bounds.max_fvu:.3f} ({bounds.source}), "
            f"got {found.fvu:.3f}: the SAE does not fit the base; {remedy}"
        )
    if not bounds.min_l0 <= found.l0 <= bounds.max_l0:
        raise ValueError(
            f"sae_gate.l0 of the base must be in [{bounds.min_l0:.2f}, {bounds.max_l0:.2f}], "
            f"got {found.l0:.2f} active features a token: the SAE does not fit the base; {remedy}"
        )


def find_misfit(fvu: float, base_fvu: float) -> str | None:
    """Why a candidate gets no rate: its general FVU is both far above the base's and above it by much.

    Args:
        fvu: The candidate's, on the general suite.
        base_fvu: The base's, on the same tokens.

    Returns:
        The reason as it stands in the summary, None when the SAE still fits.
    """
    bound = max(CANDIDATE_FVU_RATIO * base_fvu, base_fvu + CANDIDATE_FVU_SLACK)
    if fvu <= bound:
        return None
    return (
        f"{MISFIT}:general_fvu: the SAE misses {fvu:.3f} of this candidate's residual on the general suite, "
        f"{base_fvu:.3f} of the base's, and at most {bound:.3f} can be compared; train an SAE on it"
    )


def fvu_of(prompt_rows: Any, suite: str) -> tuple[float, float]:
    """FVU of candidate and base on a suite, from a `reduce_prompts` table."""
    of_suite = np.array([name == suite for name in prompt_rows["suite"].to_pylist()], dtype=bool)
    sums: Mapping[str, float] = {
        name: float(prompt_rows[name].to_numpy()[of_suite].sum())
        for name in ("fvu_err", "fvu_total", "base_fvu_err", "base_fvu_total")
    }
    return (
        sums["fvu_err"] / sums["fvu_total"] if sums["fvu_total"] > 0 else 0.0,
        sums["base_fvu_err"] / sums["base_fvu_total"] if sums["base_fvu_total"] > 0 else 0.0,
    )
