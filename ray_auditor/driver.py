"""The Ray driver's loop: what is in flight on which worker, retries, quarantine."""

import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray

from ray_auditor.budget import Meter
from ray_auditor.cluster import check_raylet, servers_in_reach
from ray_auditor.config import ClusterConfig
from ray_auditor.engine.parameters import SwapError
from ray_auditor.hub import CandidateError
from ray_auditor.plan import Plan
from ray_auditor.ray_metrics import RayMetrics
from ray_auditor.report.progress import SweepProgress
from ray_auditor.work import Ran, Work
from ray_auditor.worker import IN_FLIGHT, Assignment, EngineInDoubt, Worker

POLL_S = 0.5
MAX_REASON_CHARS = 300


class BaseFailed(RuntimeError):
    """The base itself could not be encoded, so nothing can be compared.

    `refusal` is set when there was no time left for it.
    """

    def __init__(self, task: Assignment, failure: CandidateError | str) -> None:
        super().__init__(f"{task.name} could not be encoded: {failure}")
        is_deferred = isinstance(failure, CandidateError) and failure.status == "deferred"
        self.refusal = failure if is_deferred else None


@dataclass(frozen=True)
class Flight:
    """An assignment on its way through a worker."""

    worker: Any
    assignment: Assignment
    attempt: int
    begun: float  # monotonic seconds
    deadline: float


class Landing(NamedTuple):
    """How a flight ended."""

    flight: Flight
    outcome: Ran | CandidateError | str
    is_spared: bool = False  # it only shared a worker with one that failed
    is_suspect: bool = False  # its worker died with another under way, and which of them did it is not known

    @property
    def is_own_fault(self) -> bool:
        """Whether another attempt would end no better."""
        return isinstance(self.outcome, CandidateError) and self.outcome.status != "failed"


class Fleet:
    """The workers of a run, and what is in flight on them."""

    def __init__(self, start_worker: Callable[[], Any], config: ClusterConfig, meter: Meter) -> None:
        """Start `num_workers`, if there is time; from here on `meter` counts, until the run ends."""
        meter.start()
        self._start_worker = start_worker
        self._config, self._meter = config, meter
        num_workers = config.num_workers if meter.time_left_s > 0 else 0
        self._workers = [start_worker() for _ in range(num_workers)]
        self._flying: dict[Any, Flight] = {}
        self._stopped: set[Any] = set()  # by us, for the error of one assignment
        self._died: set[Any] = set()  # with more than one under way
        self._servers = servers_in_reach()

    @property
    def names(self) -> list[str]:
        """What is in flight."""
        return [flight.assignment.name for flight in self._flying.values()]

    def launch(self, task: Assignment, attempt: int) -> bool:
        """Give an assignment to the worker with the most room; False when none has any.

        A second attempt shares its worker with nothing: should it kill that one too, no other is suspected.
        Where a worker is gone and no other is idle, a fresh one is started.
        """
        load = Counter(flight.worker for flight in self._flying.values())
        alone = {flight.worker for flight in self._flying.values() if flight.attempt > 1}
        if len(self._workers) < self._config.num_workers and all(load[worker] for worker in self._workers):
            self._workers.append(self._start_worker())
        most = IN_FLIGHT if attempt == 1 else 1
        able = [worker for worker in self._workers if load[worker] < most and worker not in alone]
        if not able:
            return False
        worker = min(able, key=lambda one: load[one])
        begun = time.monotonic()
        deadline = begun + self._config.unit_timeout_s * (1 + load[worker])
        self._flying[worker.audit.remote(task)] = Flight(worker, task, attempt, begun, deadline)
        return True

    def land(self) -> Iterator[Landing]:
        """The flights that ended, after a short wait; a worker whose engine is in doubt is ended.

        Raises:
            ClusterLost: Workers died with their raylet.
        """
        if not self._flying:
            return
        ready, waiting = ray.wait(list(self._flying), num_returns=1, timeout=POLL_S)
        now, is_over = time.monotonic(), self._meter.time_left_s <= 0
        overdue = [one for one in waiting if is_over or now > self._flying[one].deadline]
        for reference in [*ready, *overdue]:
            flight = self._flying.pop(reference)
            outcome, has_died = outcome_of(reference)
            if has_died:
                check_raylet(self._servers)
            if isinstance(outcome, Ran):
                self._meter.landed(now - flight.begun)
                yield Landing(flight, outcome)
                continue
            if isinstance(outcome, EngineInDoubt):  # whatever was at fault lands too, and ends the worker
                yield Landing(flight, str(outcome), is_spared=True)
                continue
            is_spared = flight.worker in self._stopped
            if flight.worker in self._workers:
                self._workers.remove(flight.worker)
                ray.kill(flight.worker)
                if not has_died:
                    self._stopped.add(flight.worker)
                elif any(other.worker == flight.worker for other in self._flying.values()):
                    self._died.add(flight.worker)
            yield Landing(flight, outcome, is_spared, flight.worker in self._died)


def run_stages(
    stages: Iterable[Sequence[Assignment]],
    plan: Plan,
    num_threads: int,
    progress: SweepProgress,
    after_stage: Callable[[], None] = lambda: None,
    num_left: int | None = None,
) -> dict[str, CandidateError | str]:
    """Run every stage's assignments, each stage after the one before; keep every worker busy.

    The largest go first, two to a worker. A worker that raised, died, or overran a deadline holds an engine
    in an unknown state: it is ended, and replaced when there is more to run and time for it. The assignment
    at fault is tried up to `cluster.max_attempts` times, unless the fault is the candidate's own. When a
    worker dies, either of two may be at fault: none is given up before it ran with a worker of its own.

    Args:
        stages: What to run.
        plan: What it belongs to.
        num_threads: A worker's.
        progress: Told the state.
        after_stage: Called after every stage but the last; what it raises ends the run.
        num_left: Assignments in all stages, at most; None: all of `progress`.

    Returns:
        By unit key, why an assignment has no result: the candidate's own error, or ours in words.

    Raises:
        BaseFailed: The base could not be encoded.
    """
    config = plan.config.cluster
    spec = ray.put(plan.worker_spec(num_threads))
    actor = ray.remote(Worker).options(
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        accelerator_type=config.accelerator_type,
        max_concurrency=IN_FLIGHT,
    )
    meter, told = plan.meter, RayMetrics(plan.work)
    fleet = Fleet(lambda: actor.remote(spec, time.time()), config, meter)
    num_before = 0 if num_left is None else progress.total - num_left
    ended: dict[str, CandidateError | str | None] = {}

    def end(task: Assignment, failure: CandidateError | str | None) -> None:
        ended[task.unit.key] = failure
        if failure is not None and task.candidate is None:
            raise BaseFailed(task, failure)

    def tell() -> None:
        lost: Counter[str] = Counter(
            failure.status if isinstance(failure, CandidateError) else "failed"
            for failure in ended.values()
            if failure is not None
        )
        num_ok = num_before + len(ended) - lost.total()
        counts = {"ok": num_ok, "failed": 0, **lost, "running": len(fleet.names)}
        progress.update(counts, (num_ok - num_before) * plan.suites.num_tokens, fleet.names)

    try:
        for number, stage in enumerate(timed(stages, plan.work)):
            if number:
                after_stage()
            queue = deque((task, 1) for task in sorted(stage, key=lambda task: -task.num_bytes))
            while queue or fleet.names:
                while queue and not (refusal := meter.refuse_unit()) and fleet.launch(*queue[0]):
                    queue.popleft()
                while queue and refusal:  # no time for another
                    end(queue.popleft()[0], refusal)
                tell()
                for landing in fleet.land():
                    task, attempt = landing.flight.assignment, landing.flight.attempt
                    if isinstance(landing.outcome, Ran):
                        told.add(landing.outcome)
                        end(task, None)
                    elif landing.is_spared:
                        queue.appendleft((task, attempt))
                    elif landing.is_own_fault:
                        end(task, landing.outcome)
                    elif refusal := meter.refuse_unit():
                        end(task, refusal)
                    elif attempt < config.max_attempts or landing.is_suspect:
                        queue.append((task, attempt + 1))
                    else:
                        end(task, landing.outcome)
        tell()
    finally:
        meter.end()
    return {key: failure for key, failure in ended.items() if failure is not None}


def timed(stages: Iterable[Sequence[Assignment]], work: Work) -> Iterator[Sequence[Assignment]]:
    """The stages; `work` is told how long they were waited for."""
    following = iter(stages)
    while True:
        begun = time.monotonic()
        stage = next(following, None)
        work.waited_s += time.monotonic() - begun
        if stage is None:
            return
        yield stage


def outcome_of(reference: Any) -> tuple[Ran | CandidateError | EngineInDoubt | str, bool]:
    """What the assignment took, once it is committed; the quarantine line: whatever went wrong ends here.

    Returns:
        That, or the candidate's own error, or ours in words (a `CandidateError` that is `failed` is the
        engine's, and worth another try); and whether the worker was gone.
    """
    try:
        ran: Ran = ray.get(reference, timeout=0)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, (CandidateError, EngineInDoubt)):
            return cause, False
        if isinstance(cause, SwapError):
            return CandidateError("failed", "swap_unproven", str(cause).splitlines()[0]), False
        if isinstance(error, ray.exceptions.GetTimeoutError):
            return "unit_timeout: cluster.unit_timeout_s passed", False
        return say(cause or error), isinstance(error, ray.exceptions.RayActorError)
    return ran, False


def say(error: BaseException) -> str:
    """One line of an error: the last that names an exception, for a traceback comes with some."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    last = (named or lines or ["no message"])[-1]
    return f"{type(error).__name__}: {last}"[:MAX_REASON_CHARS]
