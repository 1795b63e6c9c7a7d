"""Hard stops: what fits is chosen in order, and what a sweep uses is held to it while it runs."""

import math
from pathlib import Path

import pytest

from ray_auditor.budget import Job, Limits, Meter, defer_beyond, limits_of, num_devices
from ray_auditor.budget_config import BudgetConfig
from ray_auditor.config import ClusterConfig
from ray_auditor.hub import CandidateError
from ray_auditor.usage import Usage

HOUR = 3600.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def limits(**settings: float) -> Limits:
    return limits_of(BudgetConfig(**settings, prices={"H100": 2.0}), "H100")  # type: ignore[arg-type]


def test_the_narrower_of_hours_and_price_bounds_the_devices() -> None:
    assert (limits().device_s, limits().num_bytes) == (math.inf, math.inf)
    by_price = limits(max_gpu_hours=3, max_price=4)  # two hours at 2 an hour
    assert (by_price.device_s, by_price.device_setting) == (2 * HOUR, "max_price")
    by_hours = limits(max_gpu_hours=1, max_price=4)
    assert (by_hours.device_s, by_hours.device_setting) == (1 * HOUR, "max_gpu_hours")
    assert num_devices(ClusterConfig(num_workers=4, gpus_per_worker=2)) == 8
    assert num_devices(ClusterConfig(num_workers=4)) == 4  # without GPUs a worker counts as one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_price": 1.0}, r"budget\.prices must have a price of 'cpu' when budget\.max_price is given"),
        ({"max_gpu_hours": -1.0}, r"budget\.max_gpu_hours must be >= 0 and finite, got -1\.0"),
        ({"max_download_bytes": -1}, r"budget\.max_download_bytes must be >= 0"),
        ({"prices": {"cpu": math.nan}}, r"budget\.prices must be >= 0 and finite, got nan for 'cpu'"),
    ],
)
def test_a_limit_that_cannot_be_held_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limits_of(BudgetConfig(**settings), "cpu")  # type: ignore[arg-type]


def test_what_fits_is_taken_in_order_and_what_is_too_large_keeps_nobody_waiting() -> None:
    jobs = [
        Job("a", 0, {"x": 40, "y": 10}),
        Job("b", 0, {"z": 60}),  # beyond 100 after a
        Job("c", 0, {"x": 40, "w": 50}),  # a brings x
        Job("d", 0, {"v": 101}),
    ]
    deferred = defer_beyond(jobs, limits(max_download_bytes=100))
    assert {key: str(error) for key, error in deferred.items()} == {
        "b": "deferred:max_download_bytes: other candidates use up budget.max_download_bytes=100",
        "d": "deferred:max_download_bytes: alone it moves more bytes than budget.max_download_bytes=100",
    }


def test_expected_seconds_are_summed_in_order_with_what_goes_before() -> None:
    jobs = [Job(name, size) for name, size in (("a", 1000), ("b", 2000), ("c", 500), ("d", 9000))]
    deferred = defer_beyond(
        jobs, limits(max_gpu_hours=1), used=Usage(1200), seconds_of=lambda job: float(job.num_bytes)
    )
    assert {key: error.text for key, error in deferred.items()} == {
        "b": "other candidates use up budget.max_gpu_hours=1",
        "d": "alone it is expected to exceed budget.max_gpu_hours=1",
    }
    assert not defer_beyond(jobs, limits(max_gpu_hours=1))  # nothing is known of their cost


def test_the_meter_stops_before_a_unit_that_would_not_end_in_time() -> None:
    clock = Clock()
    meter = Meter(limits(max_gpu_hours=1), 4, clock=clock)  # a quarter of an hour by the clock
    meter.start()
    assert meter.time_left_s == 900
    clock.now += 700
    assert meter.refuse_unit() is None
    meter.landed(250)
    refusal = meter.refuse_unit()
    assert refusal is not None
    assert refusal.reason.startswith("deferred:max_gpu_hours: ")
    meter = Meter(Limits(), 4, clock=clock)
    meter.start()
    clock.now += 1e9
    assert meter.refuse_unit() is None


def test_what_one_stage_used_is_not_given_to_the_next() -> None:
    clock = Clock()
    meter = Meter(limits(max_gpu_hours=1), 4, clock=clock)
    for _ in range(2):
        meter.start()
        clock.now += 400
        meter.end()
        clock.now += 10_000  # nobody holds a device
    assert meter.time_left_s == 100
    meter.start()
    assert meter.time_left_s == 100


def test_the_meter_counts_every_byte_that_is_asked_for() -> None:
    meter = Meter(limits(max_download_bytes=100), 1)
    meter.move(60)
    with pytest.raises(CandidateError, match="max_download_bytes"):
        meter.move(41)
    meter.move(40)


def test_no_price_is_made_up() -> None:
    conf = Path(__file__).resolve().parent.parent / "conf" / "budget"
    said = [line for path in conf.glob("*.yaml") for line in path.read_text().splitlines()]
    assert not any(line.startswith("prices") for line in said)
