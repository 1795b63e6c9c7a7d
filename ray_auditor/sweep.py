"""The Ray driver: which units to run, the window in flight, retries, quarantine, resume."""

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from ray_auditor.budget import Meter
from ray_auditor.cluster import cluster
from ray_auditor.conclusion import conclude
from ray_auditor.config import AuditConfig
from ray_auditor.engine.parameters import SwapError
from ray_auditor.forecast import keep_rate_limits
from ray_auditor.history import Conclusion, History
from ray_auditor.hub import CandidateError
from ray_auditor.hub.remote import SourceError
from ray_auditor.lease import Lease, LeaseHeld
from ray_auditor.plan import Plan, check_gate
from ray_auditor.preview import plan_sweep
from ray_auditor.ray_metrics import RayMetrics
from ray_auditor.report.finding import EXIT_FAILED
from ray_auditor.report.metrics import Metrics
from ray_auditor.report.progress import SweepProgress
from ray_auditor.roster import keep_apart
from ray_auditor.screen import clear, screen_of
from ray_auditor.store import ShardError
from ray_auditor.work import Ran, Work
from ray_auditor.worker import Assignment, Worker

POLL_S = 0.5
MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class Flight:
    """An assignment on its way through a worker."""

    worker: Any
    assignment: Assignment
    attempt: int
    deadline: float  # monotonic seconds
    begun: float


class BaseFailed(RuntimeError):
    """The base itself could not be encoded, so nothing can be compared.

    `refusal` is set when there was no time left for it.
    """

    refusal: CandidateError | None = None


def run_sweep(config: AuditConfig) -> int:
    """The verb `sweep`: audit what is not done yet, then reduce, flag and report.

    Returns:
        The exit code: 0 nothing stands out, 1 findings, 2 some failed, the source does not answer, or another
        sweep has `out_dir`, 3 nothing to audit.

    Raises:
        ValueError: An input is missing or does not fit; nothing but the base has run.
    """
    config.require_inputs()
    try:
        with Lease(Path(config.out_dir)) as lease:
            return _sweep(config, lease)
    except (LeaseHeld, SourceError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILED


def _sweep(config: AuditConfig, lease: Lease) -> int:
    plan = plan_sweep(config)
    check_gate(plan)
    refused = {key: CandidateError("rejected", *why) for key, why in plan.ledger.refusals().items()}
    if config.screen.share is not None:
        small = screen_of(plan)
        failures = execute(small, "screen: ")
        plan = clear(plan, settle(small), failures)
        lease.check()
    failures = execute(plan)
    lease.check()
    keep_rate_limits(plan)
    plan.ledger.keep_refusals(
        {
            key: (one.code, one.text)
            for key, one in failures.items()
            if isinstance(one, CandidateError) and one.status == "rejected" and one.code != "changed"
        }
    )
    return finish(settle(plan), failures, refused)


def execute(plan: Plan, stage: str = "") -> dict[str, CandidateError | str]:
    """Compute every unit of a plan that is not committed yet; by unit key, why one has no result."""
    config, todo = plan.config, plan.assignments
    bases = [Assignment(plan.base_unit, None), Assignment(plan.replay_unit, None, reverse=True)]
    stages = [[task] for task in bases if not plan.store.has(task.unit.key)]
    arrivals = plan.arrivals
    num_groups = len(arrivals.groups()) if arrivals else 0
    Console().print(
        f"{stage}{len(plan.candidates)} candidates listed"
        + (f", {len(plan.nulls)} null members" if plan.nulls else "")
        + f", {len(plan.units)} distinct to audit: {len(plan.units) - len(todo)} "
        f"committed already and not repeated, {len(todo)} to run on {plan.suites.num_tokens} tokens each"
        + (f"; {num_groups} to fetch first, {arrivals.num_bytes} bytes at most" if arrivals else ""),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    failures: dict[str, CandidateError | str] = {}
    if (arrivals or any(row.unit for row in plan.candidates)) and (arrivals or todo or stages):
        num_units = len(plan.units) + len(bases) + num_groups
        metrics = Metrics(Path(config.out_dir), plan.work.describe)
        with (
            cluster(config.cluster) as num_threads,
            SweepProgress(num_units, tell=metrics.progress) as progress,
            closing(arrivals.stages()) if arrivals else nullcontext(()) as arriving,
        ):
            try:
                failures = run_stages(
                    chain([*stages, todo], arriving),
                    plan,
                    num_threads,
                    progress,
                    after_stage=lambda: check_gate(plan),
                    num_left=len(stages) + len(todo) + num_groups,
                )
            except BaseFailed as error:
                # Nothing can be compared, so nothing is audited, whatever an earlier run left committed.
                failures = {row.unit.key: error.refusal or str(error) for row in plan.rows if row.unit}
    return failures


def finish(plan: Plan, failures: dict[str, CandidateError | str], refused: dict[str, CandidateError]) -> int:
    """Draw the conclusion, unless it is the last one's."""
    conclusion = Conclusion(plan.ledger, plan.config, plan.rows, plan.store.root)
    if not failures and conclusion.stands():
        Console().print("nothing is new since the last sweep: its report stands", highlight=False)
        return conclusion.repeat(History(plan.ledger, plan.base_unit, plan.candidates).whys())
    try:
        exit_code = conclude(plan, refused | failures)
    except ShardError:
        plan.ledger.forget_stamps()  # a unit that looked untouched is not: the next sweep looks inside again
        raise
    if not failures:
        conclusion.keep()
    return exit_code


def settle(plan: Plan) -> Plan:
    """The plan with the rows of what arrived since it was made."""
    if plan.arrivals is None:
        return plan
    rows = [plan.arrivals.rows.get(row.id, row) for row in plan.rows]
    return replace(plan, rows=tuple(keep_apart(row, rows) for row in rows))


def run_stages(
    stages: Iterable[Sequence[Assignment]],
    plan: Plan,
    num_threads: int,
    progress: SweepProgress,
    after_stage: Callable[[], None] = lambda: None,
    num_left: int | None = None,
) -> dict[str, CandidateError | str]:
    """Run every stage's assignments, each stage after the one before; keep every worker busy.

    One assignment is in flight per worker, the largest first. A worker that raised, died, or overran its
    deadline holds an engine in an unknown state: it is replaced. Its assignment is tried again on a fresh one
    up to `cluster.max_attempts` times, unless the fault is the candidate's own.

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
    )
    meter, told = plan.meter, RayMetrics(plan.work)
    meter.start()
    idle = deque(actor.remote(spec, time.time()) for _ in range(config.num_workers))
    failures: dict[str, CandidateError | str] = {}
    num_tokens, num_done = 0, 0 if num_left is None else progress.total - num_left
    for number, stage in enumerate(timed(stages, plan.work)):
        if number:
            after_stage()
        queue = deque((task, 1) for task in sorted(stage, key=lambda task: -task.num_bytes))
        flying: dict[Any, Flight] = {}
        while queue or flying:
            while queue and idle:
                if refusal := meter.refuse_unit():
                    refused = refuse_all(queue, refusal)
                    failures |= refused
                    num_done += len(refused)
                    break
                worker, (task, attempt) = idle.popleft(), queue.popleft()
                deadline = time.monotonic() + config.unit_timeout_s
                flying[worker.audit.remote(task, queue[0][0] if queue else None)] = Flight(
                    worker, task, attempt, deadline, time.monotonic()
                )
            counts = {"ok": num_done - len(failures), "failed": len(failures), "running": len(flying)}
            progress.update(counts, num_tokens, [flight.assignment.name for flight in flying.values()])
            for reference in landed_or_overdue(flying, meter):
                flight = flying.pop(reference)
                outcome = outcome_of(reference)
                failure = None if isinstance(outcome, Ran) else outcome
                if isinstance(outcome, Ran):
                    told.add(outcome)
                    meter.landed(time.monotonic() - flight.begun)
                    idle.append(flight.worker)
                else:
                    ray.kill(flight.worker)
                    idle.append(actor.remote(spec, time.time()))
                    is_own_fault = isinstance(failure, CandidateError) and failure.status != "failed"
                    refusal = None if is_own_fault else meter.refuse_unit()  # no time for another attempt
                    failure = refusal or failure
                    if not (is_own_fault or refusal) and flight.attempt < config.max_attempts:
                        queue.append((flight.assignment, flight.attempt + 1))
                        continue
                num_done += 1
                num_tokens += plan.suites.num_tokens
                if failure is not None:
                    failures[flight.assignment.unit.key] = failure
                    if flight.assignment.candidate is None:
                        raise base_failed(flight.assignment, failure)
    return failures


def refuse_all(
    queue: deque[tuple[Assignment, int]], refusal: CandidateError
) -> dict[str, CandidateError | str]:
    """Empty the queue; by unit key, why.

    Raises:
        BaseFailed: The base was in it.
    """
    tasks = [task for task, _ in queue]
    queue.clear()
    for task in tasks:
        if task.candidate is None:
            raise base_failed(task, refusal)
    return {task.unit.key: refusal for task in tasks}


def base_failed(task: Assignment, failure: CandidateError | str) -> BaseFailed:
    """The error that ends a sweep."""
    error = BaseFailed(f"{task.name} could not be encoded: {failure}")
    error.refusal = failure if isinstance(failure, CandidateError) and failure.status == "deferred" else None
    return error


def landed_or_overdue(flying: dict[Any, Flight], meter: Meter) -> list[Any]:
    """References that are ready, after a short wait, and those past their deadline or the sweep's."""
    ready, waiting = ray.wait(list(flying), num_returns=1, timeout=POLL_S)
    now, is_over = time.monotonic(), meter.time_left_s <= 0
    return [*ready, *(reference for reference in waiting if is_over or now > flying[reference].deadline)]


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


def outcome_of(reference: Any) -> Ran | CandidateError | str:
    """What the assignment took, once it is committed; the quarantine line: whatever went wrong ends here.

    A `CandidateError` that is `failed` is not the candidate's fault but the engine's, worth another try.
    """
    try:
        ran: Ran = ray.get(reference, timeout=0)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, CandidateError):
            return cause
        if isinstance(cause, SwapError):
            return CandidateError("failed", "swap_unproven", str(cause).splitlines()[0])
        if isinstance(error, ray.exceptions.GetTimeoutError):
            return "unit_timeout: cluster.unit_timeout_s passed"
        return say(cause or error)
    return ran


def say(error: BaseException) -> str:
    """One line of an error: the last that names an exception, for a traceback comes with some."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    last = (named or lines or ["no message"])[-1]
    return f"{type(error).__name__}: {last}"[:MAX_REASON_CHARS]
