"""Simpler scores of the same finetunes, which the audit's own has to beat.

A rival that speaks of suites is centred as the audit's channels are, on the same reference: what a suite and
a finetune's size lead one to expect is taken away, and the rest is in robust standard deviations.
"""

# Shape suffixes: C finetunes, S suites.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_auditor.population import (
    CHANNELS,
    Matrix,
    Prompts,
    fit_norms,
    read_prompts,
    score_suites,
    settle,
)
from ray_auditor.rates import SuiteSums, suite_sums
from ray_auditor.reduce import DEFAULT_KS
from ray_auditor.standing import folds

TINY = 1e-9


@dataclass(frozen=True)
class Rival:
    """One score: larger is more unusual.

    Attributes:
        name: What it is.
        needs_sae: Whether it reads features.
        scores: By finetune; those without a value are left out.
        first: By finetune, the suite it names; empty when it names none.
    """

    name: str
    needs_sae: bool
    scores: Mapping[str, float]
    first: Mapping[str, str]


def score_rivals(
    tables: Mapping[str, Any],
    notes: Mapping[str, Mapping[str, Any]],
    *,
    general: str,
    k: int,
    null: Sequence[str],
) -> list[Rival]:
    """Score every finetune by every rival.

    Args:
        tables: `reduce_prompts` tables of candidates and null members.
        notes: By finetune, the commit's `weights` and `mean_difference`.
        general: Name of the general suite.
        k: The number of kept features.
        null: The null members among them; none: all are the reference.
    """
    names = tuple(sorted(tables))
    ks = sorted({one for one in (*DEFAULT_KS, k) if f"shift_{one}" in tables[names[0]].column_names})
    sums = {one: {name: suite_sums(tables[name], one) for name in names} for one in ks}
    suites = tuple(sorted(sums[k][names[0]]))
    reference = [row for row, name in enumerate(names) if name in set(null)] or list(range(len(names)))

    def matrix(value: Callable[[SuiteSums], float], kept: int = k) -> Matrix:
        return np.array([[value(sums[kept][name][suite]) for suite in suites] for name in names])

    def of_suites(name: str, needs_sae: bool, values_CS: Matrix, *, centre: bool = True) -> Rival:
        if centre:
            values_CS = centred(names, suites, values_CS, reference)
        risky = [at for at, suite in enumerate(suites) if suite != general]
        best_C = values_CS[:, risky].argmax(axis=1)
        return Rival(
            name,
            needs_sae,
            dict(zip(names, values_CS[:, risky].max(axis=1).tolist(), strict=True)),
            {one: suites[risky[best]] for one, best in zip(names, best_C.tolist(), strict=True)},
        )

    at_general = suites.index(general)
    rivals = []
    for kept in ks:
        shift_CS = matrix(lambda one: one.shift, kept)
        rate_CS = shift_CS / np.maximum(shift_CS[:, [at_general]], TINY) - 1
        rivals.append(of_suites(f"difference rate, k {kept}", True, rate_CS, centre=False))
        rivals.append(of_suites(f"centred log shift, k {kept}", True, np.log(shift_CS + 0.01 * kept)))
    miss_CS = matrix(lambda one: np.log(max(one.fvu, TINY) / max(one.base_fvu, TINY)))
    change_CS = matrix(lambda one: one.change)
    rivals += [
        of_suites("centred weighted Jaccard", True, np.log(matrix(lambda one: 1 - one.jaccard) + 0.01)),
        of_suites("centred log FVU ratio", True, miss_CS),
        of_suites("centred residual change", False, np.log(change_CS + 0.005)),
        of_suites("centred residual cosine", False, np.log(matrix(lambda one: 1 - one.cosine) + 1e-4)),
    ]
    prompts = read_prompts(sums[k], k)
    for channel in CHANNELS:  # what each channel of the audit's own score reaches by itself
        needs_sae = channel != "change"
        z_CS = held_out_scores(prompts, prompts.values[channel], reference)
        if needs_sae:  # it speaks of features
            z_CS *= settle(prompts.moved_CS)
        rivals.append(of_suites(f"{channel} channel, prompt by prompt", needs_sae, z_CS, centre=False))
    means = {name: notes[name].get("mean_difference") or {} for name in names}
    if all(means[name].keys() >= set(suites) for name in names):
        mean_CS = np.array([[means[name][suite] for suite in suites] for name in names])
        rivals.append(of_suites("centred mean difference", False, np.log(mean_CS + 0.005)))
    rivals.append(
        Rival("residual change", False, dict(zip(names, change_CS.mean(axis=1).tolist(), strict=True)), {})
    )
    for key, name in (("relative_change", "||dW|| / ||W||"), ("spectral_share", "spectral share of dW")):
        values = {one: notes[one].get("weights", {}).get(key) for one in names}
        known = {one: float(value) for one, value in values.items() if value is not None}
        rivals.append(Rival(name, False, known, {}))
    return rivals


def centred(
    names: tuple[str, ...], suites: tuple[str, ...], values_CS: Matrix, reference: Sequence[int]
) -> Matrix:
    """Suite values as scores, [C, S]; members of the reference are scored by a fit without their fold."""
    return held_out_scores(
        Prompts(names, suites, np.arange(len(suites)), {}, values_CS), values_CS, reference
    )


def held_out_scores(prompts: Prompts, values_CP: Matrix, reference: Sequence[int]) -> Matrix:
    """Scores on suites, [C, S], of any per-prompt values; members of the reference as in `centred`."""
    result_CS = score_suites(prompts, fit_norms(prompts, values_CP[list(reference)]), values_CP)
    for held_out, seen in folds(reference):
        if len(seen) > 1:
            norms = fit_norms(prompts, values_CP[seen])
            result_CS[held_out] = score_suites(prompts, norms, values_CP)[held_out]
    return result_CS
