"""The cost model is what was measured: fitted to units, of the same kind alone, and with their spread."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_auditor.cost import Sample, benchmark_cost, fit, measured_cost
from ray_auditor.store import Store
from tests.test_store import UNIT, make_rows

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def test_a_linear_cost_is_found_again() -> None:
    samples = [
        Sample(tokens, size, by_tokens_s=2e-3 * tokens, other_s=0.5 + 1e-9 * size)
        for tokens in (1000, 3000)
        for size in (0, 10**6, 10**9, 4 * 10**9)
    ]
    model = fit(samples, [9.0, 7.0, 8.0], "made up")
    assert model.start_s == 8.0
    assert model.unit_s == pytest.approx(0.5)
    assert model.token_s == pytest.approx(2e-3)
    assert model.byte_s == pytest.approx(1e-9)
    assert model.unit_seconds(2000, 2 * 10**9) == pytest.approx(4 + 0.5 + 2)
    assert (model.low, model.high) == (pytest.approx(1), pytest.approx(1))


def test_the_spread_is_that_of_single_units() -> None:
    samples = [
        Sample(1000, 0, seconds, 0.0) for seconds in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0)
    ]
    model = fit(samples, [], "made up")
    assert model.unit_seconds(1000, 0) == pytest.approx(1.2)  # the mean: a sum is to be foretold
    assert model.low == pytest.approx(1 / 1.2)
    assert model.high == pytest.approx(1.2 / 1.2)
    assert fit(samples[:4], [], "few").low is None


def record(seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "num_tokens_run": 100,
        "num_bytes": 10,
        "seconds": {"encode": seconds, "rows": 0.1, "swap": 0.2},
        "wait_s": 0.05,
        "start_s": None,
    } | changes


def test_only_units_of_the_same_kind_are_fitted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert measured_cost(store, UNIT) is None
    assert measured_cost(Store(tmp_path / "nowhere", read_only=True), UNIT) is None
    for i, changes in enumerate(
        (
            {},
            {"suites_key": "5" * 64},
            {"engine_class": "another"},
            {"sae_key": "6" * 64},
            {"base_key": "7" * 64},
        )
    ):
        unit = replace(UNIT, candidate_key=f"{i:064x}", **changes)
        store.commit(unit, make_rows(), record(1.0 if i < 2 else 99.0, start_s=7.0 if i == 0 else None))
    store.commit(replace(UNIT, candidate_key="9" * 64), make_rows(), {"name": "of an earlier release"})
    model = measured_cost(store, UNIT)
    assert model is not None
    assert model.num_units == 2
    assert model.start_s == 7.0
    assert model.unit_seconds(100, 10) == pytest.approx(
        1.25, abs=0.01
    )  # rows were sorted out beside the next
    assert "2 units of these settings" in model.source


@pytest.mark.parametrize("path", sorted(RESULTS.glob("sweep_*.json")), ids=lambda path: path.stem[:24])
def test_every_benchmark_that_is_kept_can_stand_in(path: Path) -> None:
    model = benchmark_cost(str(path))
    assert path.name in model.source
    assert 5 < model.start_s < 120
    assert model.token_s > 0


def test_a_file_that_is_no_benchmark_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"runs": 3}')
    for path in (tmp_path / "x.json", tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"budget\.benchmark must be a result of benchmarks/bench_sweep"):
            benchmark_cost(str(path))
