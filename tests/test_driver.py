"""The driver under faults: real Ray actors that misbehave on order, in place of those that own an engine."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ray_auditor import driver
from ray_auditor.budget import Limits, Meter
from ray_auditor.cluster import cluster
from ray_auditor.config import ClusterConfig
from ray_auditor.driver import BaseFailed, Fleet, run_stages
from ray_auditor.engine.parameters import SwapError
from ray_auditor.hub import CandidateError
from ray_auditor.report.progress import SweepProgress
from ray_auditor.usage import Usage
from ray_auditor.work import Ran, Work
from ray_auditor.worker import EngineInDoubt


class Unruly:
    """Does what its assignment's name says; every attempt leaves a line in the log."""

    def __init__(self, log: str, asked_at: float) -> None:
        self.log = log
        self.used = False

    def audit(self, task: Any) -> Ran:
        with open(self.log, "a") as log:
            log.write(f"{task.name} {os.getpid()}\n")
        attempts = Path(self.log).read_text().split().count(task.name)
        kind = task.name.split("-")[0]
        if kind == "raise":
            raise RuntimeError("first line\nthe engine is poisoned")
        if kind == "silent":
            raise AssertionError
        if kind == "die" or (kind == "dieonce" and attempts == 1):
            os._exit(1)
        if kind == "hang":
            time.sleep(600)
        if kind == "unproven" or (kind == "unprovenonce" and attempts == 1):
            raise SwapError("model.norm on the device has checksum 1, the checkpoint 2")
        if kind == "doubtonce" and attempts == 1:
            raise EngineInDoubt
        if kind == "meet":
            deadline = time.monotonic() + 20
            while not {"meet-1", "meet-2"} <= set(Path(self.log).read_text().split()):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        if kind == "refuse":
            raise CandidateError("rejected", "changed", "the file changed")
        time.sleep(0.05)
        return Ran(f"host-{os.getpid()}", 10, 100, {"forward": 1.5, "write": 0.25})


def task(name: str, num_bytes: int = 0, *, base: bool = False) -> Any:
    unit = SimpleNamespace(key=name)
    return SimpleNamespace(name=name, unit=unit, num_bytes=num_bytes, candidate=None if base else object())


@pytest.fixture(scope="module", autouse=True)
def running() -> Any:
    this = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(this)  # workers cannot import a test module
    with cluster(ClusterConfig(num_workers=2)):
        yield
    ray.cloudpickle.unregister_pickle_by_value(this)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(driver, "Worker", Unruly)
    log = tmp_path / "log"
    log.touch()
    states: dict[str, int] = {}

    def run(
        *stages: list[Any], num_workers: int = 2, meter: Meter | None = None, **settings: Any
    ) -> tuple[dict[str, Any], list[str]]:
        config = ClusterConfig(num_workers=num_workers, cpus_per_worker=0.5, **settings)
        plan: Any = SimpleNamespace(
            config=SimpleNamespace(cluster=config),
            worker_spec=lambda _: str(log),
            suites=SimpleNamespace(num_tokens=1),
            work=run.work,  # type: ignore[attr-defined]
            meter=meter or Meter(Limits(), 1),
        )
        with SweepProgress(sum(map(len, stages))) as progress:
            failures = run_stages(stages, plan, 1, progress)
        states.update(progress.counts)
        return failures, [line.split()[0] for line in log.read_text().splitlines()]

    run.states = states  # type: ignore[attr-defined]
    run.work = Work()  # type: ignore[attr-defined]
    return run


def test_what_every_unit_took_is_summed_by_worker_and_in_all(run: Any) -> None:
    run([task(f"fine-{i}") for i in range(6)] + [task("raise-1")], max_attempts=1)
    found = run.work.describe()
    assert {key: found["total"][key] for key in ("num_units", "num_tokens", "num_bytes", "seconds")} == {
        "num_units": 6, "num_tokens": 60, "num_bytes": 600, "seconds": {"forward": 9.0, "write": 1.5}
    }  # fmt: skip
    assert sum(one["num_units"] for one in found["workers"].values()) == 6
    assert len(found["workers"]) >= 2
    assert found["wall_s"] > found["waited_s"]
    assert found["total"]["tokens_per_s"] == pytest.approx(60 / found["wall_s"], rel=0.01)


def test_whatever_one_candidate_does_the_others_finish(run: Any) -> None:
    names = ["fine-1", "raise-1", "silent-1", "fine-2", "die-1", "refuse-1", "dieonce-1", "fine-3"]
    failures, log = run([task(name) for name in names])
    assert failures.keys() == {"raise-1", "silent-1", "die-1", "refuse-1"}
    assert failures["silent-1"] == "AssertionError: no message"
    assert failures["raise-1"] == "RuntimeError: the engine is poisoned"
    assert isinstance(failures["refuse-1"], CandidateError)
    assert run.states == {"ok": 4, "failed": 3, "rejected": 1, "running": 0}  # as the summary will count them
    assert log.count("refuse-1") >= 1
    for name in ("raise-1", "silent-1", "die-1", "dieonce-1"):
        assert log.count(name) >= 2  # and more, where it shared a worker with another that failed


def test_those_who_share_a_worker_with_one_that_fails_do_not_fail_with_it(run: Any) -> None:
    bad = [task(f"{kind}-{number}", 5) for kind in ("die", "raise", "refuse") for number in range(2)]
    fine = [task(f"fine-{number}", 5) for number in range(6)]
    failures, _ = run([one for pair in zip(bad, fine, strict=True) for one in pair])
    assert failures.keys() == {one.name for one in bad}


@pytest.mark.parametrize("max_attempts", [1, 2])
def test_who_is_under_way_beside_one_that_kills_its_worker_every_time_is_not_blamed(
    run: Any, max_attempts: int
) -> None:
    fine = [task(f"fine-{number}") for number in range(3)]
    failures, log = run([task("die-1", 9), *fine], num_workers=1, max_attempts=max_attempts)
    assert failures.keys() == {"die-1"}
    assert log.count("die-1") == 2  # with another, and on its own


def test_a_unit_that_was_not_begun_on_a_spoilt_engine_is_run_again_and_not_blamed(run: Any) -> None:
    failures, log = run([task("doubtonce-1"), task("fine-1")], max_attempts=1)
    assert failures == {}
    assert log.count("doubtonce-1") == 2


def test_a_worker_has_two_in_flight_and_a_second_attempt_has_it_alone(run: Any, tmp_path: Path) -> None:
    run([task("meet-1"), task("meet-2")], num_workers=1)  # each waits for the other
    run([task("raise-1", 1), *(task(f"fine-{number}") for number in range(6))], num_workers=1)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    pids = dict(lines)
    assert pids["meet-1"] == pids["meet-2"]
    assert [name for name, pid in lines if pid == pids["raise-1"]][-1] == "raise-1"


def test_after_an_error_or_a_refusal_the_engine_is_a_fresh_one(run: Any, tmp_path: Path) -> None:
    run([task("raise-1", 3), task("refuse-1", 2), task("fine-1", 1)], num_workers=1, max_attempts=1)
    pids = dict(line.split() for line in (tmp_path / "log").read_text().splitlines())
    assert len({pids["raise-1"], pids["refuse-1"], pids["fine-1"]}) == 3


def test_a_swap_that_cannot_be_proven_is_tried_once_more_on_a_fresh_engine(run: Any, tmp_path: Path) -> None:
    failures, log = run([task("unproven-1", 2), task("unprovenonce-1", 1)], num_workers=1)
    assert {name: str(error) for name, error in failures.items()} == {
        "unproven-1": "failed:swap_unproven: model.norm on the device has checksum 1, the checkpoint 2"
    }
    assert min(log.count("unproven-1"), log.count("unprovenonce-1")) >= 2
    lines = (tmp_path / "log").read_text().splitlines()
    assert len({pid for name, pid in map(str.split, lines) if name == "unproven-1"}) >= 2


def test_the_largest_goes_first_and_stages_do_not_mix(run: Any) -> None:
    _, log = run([task("base")], [task("small", 1), task("large", 9), task("middle", 5)], num_workers=1)
    assert log[0] == "base"
    assert {*log[1:3]} == {"large", "middle"}  # under way together
    assert log[3] == "small"


def test_a_candidate_that_hangs_is_given_up(run: Any) -> None:
    failures, log = run([task("hang-1", 9), task("fine-1")], unit_timeout_s=25.0, max_attempts=1)
    assert failures == {"hang-1": "unit_timeout: cluster.unit_timeout_s passed"}
    assert log.count("fine-1") == 1


def test_a_base_that_fails_ends_the_sweep(run: Any) -> None:
    with pytest.raises(
        BaseFailed, match="raise-base could not be encoded: RuntimeError: the engine is poisoned"
    ):
        run([task("raise-base", base=True)], [task("fine-1")])


def test_no_actor_outlives_its_run(run: Any) -> None:
    run([task("fine-1")])
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


class Jumps:
    """A clock that stands still until a task has begun, and then is far ahead."""

    def __init__(self, log: Path, name: str) -> None:
        self.log, self.name = log, name

    def __call__(self) -> float:
        return 1000.0 if self.name in self.log.read_text() else 0.0


def budget(log: Path, name: str) -> Meter:
    return Meter(Limits(600.0, given={"max_gpu_hours": 600 / 3600}), 1.0, clock=Jumps(log, name))


def test_a_budget_that_is_used_up_defers_the_rest_and_gives_the_device_back(run: Any, tmp_path: Path) -> None:
    failures, log = run(
        [task("fine-1", 9)],
        [task("hang-1", 5), task("hang-2", 3), task("hang-3", 1)],
        num_workers=1,
        meter=budget(tmp_path / "log", "hang-1"),
    )
    assert log[:2] == ["fine-1", "hang-1"] or log[:3:2] == [
        "fine-1",
        "hang-1",
    ]  # given up long before its own deadline of an hour
    assert {name: failure.reason[:23] for name, failure in failures.items()} == {
        "hang-1": "deferred:max_gpu_hours:",
        "hang-2": "deferred:max_gpu_hours:",
        "hang-3": "deferred:max_gpu_hours:",
    }


def test_a_worker_is_replaced_when_there_is_more_to_run_and_time_for_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    begun: list[Any] = []

    def begin() -> Any:
        begun.append(ray.remote(Unruly).options(num_cpus=0.5, max_concurrency=2).remote(str(log), 0.0))
        return begun[-1]

    fleet = Fleet(begin, ClusterConfig(num_workers=1), budget(log, "hang-1"))

    def land() -> Iterator[str]:
        deadline = time.monotonic() + 30
        while fleet.names:
            assert time.monotonic() < deadline
            yield from (landing.flight.assignment.name for landing in fleet.land())

    assert fleet.launch(task("refuse-1"), 1)
    assert [*land()] == ["refuse-1"]
    assert len(begun) == 1  # nothing waits
    assert fleet.launch(task("hang-1"), 1)
    assert len(begun) == 2
    assert [*land()] == ["hang-1"]
    assert len(begun) == 2  # the time is over
    Fleet(begin, ClusterConfig(num_workers=1), budget(log, "hang-1"))
    assert len(begun) == 3
    no_time = Meter(Limits(60.0, given={"max_gpu_hours": 1 / 60}), 1.0, used=Usage(60.0))
    Fleet(begin, ClusterConfig(num_workers=1), no_time)
    assert len(begun) == 3


def test_a_second_run_goes_on_with_what_the_first_left_of_the_budget(run: Any, tmp_path: Path) -> None:
    meter = budget(tmp_path / "log", "fine-1")
    run([task("fine-1")], num_workers=1, meter=meter)
    failures, _ = run([task("fine-2")], num_workers=1, meter=meter)
    assert failures["fine-2"].reason.startswith("deferred:max_gpu_hours:")


def test_a_budget_too_small_for_the_base_is_no_fault_of_the_base(run: Any, tmp_path: Path) -> None:
    with pytest.raises(BaseFailed) as caught:
        run([task("hang-base", base=True)], meter=budget(tmp_path / "log", "hang-base"))
    assert caught.value.refusal is not None
    assert caught.value.refusal.status == "deferred"
