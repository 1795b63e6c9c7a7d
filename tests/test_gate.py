"""The SAE gate: what is held against what, and what a misfit is told."""

import numpy as np
import pyarrow as pa
import pytest

from ray_auditor.gate import Fit, base_bounds, check_base, find_misfit, fvu_of, measure_fit
from ray_auditor.store import TokenRows

HOOK = "blocks.3.hook_resid_post"


def rows(fvu_err: list[float], active: list[int], suites: list[int]) -> TokenRows:
    idx = np.full((len(active), 4), -1, np.int32)
    for number, count in enumerate(active):
        idx[number, :count] = np.arange(count)
    zeros = np.zeros(len(active))
    return TokenRows.from_unsorted(
        suite_N=suites,
        prompt_N=zeros,
        position_N=np.arange(len(active)),
        top_idx_NK=idx,
        top_acts_NK=(idx >= 0).astype(np.float32),
        fvu_err_N=fvu_err,
        fvu_total_N=[10.0] * len(active),
    )


def test_the_fit_is_the_share_of_energy_missed_and_the_mean_of_active_features() -> None:
    found = rows([1.0, 3.0, 8.0], [4, 2, 0], [0, 0, 1])
    assert measure_fit(found) == Fit(fvu=0.4, l0=2.0)
    assert measure_fit(found, 0) == Fit(fvu=0.2, l0=3.0)
    assert measure_fit(found, 1) == Fit(fvu=0.8, l0=0.0)
    assert measure_fit(found, 2) == Fit(fvu=0.0, l0=0.0)


@pytest.mark.parametrize(
    ("settings", "max_fvu", "l0", "source"),
    [
        ({}, 0.5, (8, 128), "the default"),
        ({"k": 5}, 0.8, (1.25, 20), "the default"),  # what the other 27 features hold counts as missed
        ({"max_active": None}, 0.5, (0, 32), "the default"),
        ({"max_active": None, "found": Fit(0.3, 31.0)}, 0.8, (0, 32), "the default"),
        ({"max_active": None, "expected_l0": 10.0}, 0.5, (2.5, 40), "the default"),
        ({"max_active": None, "expected_l0": 100.0}, 0.5, (8, 128), "the default"),
        ({"explained_variance": 0.9}, 0.4, (8, 128), "the SAE's own metadata"),
        ({"explained_variance": 0.4}, 0.8, (8, 128), "the SAE's own metadata"),
        ({"explained_variance": 0.9, "k": 5}, 0.8, (1.25, 20), "the default"),
        ({"recorded": [Fit(0.1, 30), Fit(0.3, 32)]}, 0.5, (15, 64), "recorded by calibrate"),
        ({"recorded": [Fit(0.6, 30)], "explained_variance": 0.9}, 0.95, (15, 60), "recorded by calibrate"),
        ({"max_fvu": 0.7, "explained_variance": 0.9}, 0.7, (8, 128), "sae.max_fvu"),
        ({"max_fvu": 0.2, "recorded": [Fit(0.1, 30)]}, 0.2, (15, 60), "sae.max_fvu"),
    ],
)
def test_bounds_come_from_the_best_there_is(
    settings: dict[str, object], max_fvu: float, l0: tuple[float, float], source: str
) -> None:
    given = {"k": 32, "max_active": 32, "found": Fit(0.3, 20.0)} | settings
    bounds = base_bounds(**given)  # type: ignore[arg-type]
    assert bounds.max_fvu == pytest.approx(max_fvu)
    assert (bounds.min_l0, bounds.max_l0) == pytest.approx(l0)
    assert bounds.source == source


def test_a_base_at_its_bounds_passes_and_beyond_them_is_refused_by_name() -> None:
    bounds = base_bounds(k=32, max_active=32, found=Fit(0.1, 32))
    check_base(Fit(0.5, 8.0), bounds, HOOK)
    check_base(Fit(0.0, 128.0), bounds, HOOK)
    for fit, said in (
        (Fit(0.501, 32.0), r"sae_gate.fvu of the base must be at most 0.500 \(the default\), got 0.501"),
        (Fit(float("nan"), 32.0), "sae_gate.fvu of the base must be at most 0.500"),
        (Fit(0.1, 7.9), r"sae_gate.l0 of the base must be in \[8.00, 128.00\], got 7.90"),
        (Fit(0.1, 128.1), "sae_gate.l0"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            check_base(fit, bounds, HOOK)
        for remedy in (HOOK, "trained on this base", "engine.dtype", "sae.max_fvu"):
            assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("fvu", "base_fvu", "fits"),
    [
        (0.25, 0.18, True),  # the furthest of 64 real adapters: 1.27 times the base's
        (0.36, 0.18, True),
        (0.37, 0.18, False),
        (0.10, 0.01, True),  # ten times as much, and still little
        (0.12, 0.01, False),
        (0.90, 0.48, True),
        (0.97, 0.48, False),
        (float("nan"), 0.18, False),
    ],
)
def test_a_candidate_is_a_misfit_by_ratio_and_by_amount(fvu: float, base_fvu: float, fits: bool) -> None:
    reason = find_misfit(fvu, base_fvu)
    assert (reason is None) == fits
    if reason is not None:
        assert reason.startswith("sae_misfit:general_fvu: ")
        assert f"{base_fvu:.3f}" in reason


def test_fvu_of_a_suite_is_read_off_the_sums_of_its_prompts() -> None:
    table = pa.table(
        {
            "suite": ["general", "other", "general"],
            "fvu_err": [1.0, 100.0, 3.0],
            "fvu_total": [4.0, 100.0, 4.0],
            "base_fvu_err": [1.0, 100.0, 1.0],
            "base_fvu_total": [10.0, 100.0, 10.0],
        }
    )
    assert fvu_of(table, "general") == (0.5, 0.1)
