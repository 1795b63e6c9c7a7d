"""The verb `sweep`: which units to run, and what is drawn from them."""

import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path

from rich.console import Console

from ray_auditor.acknowledgement import read_acknowledgements
from ray_auditor.budget import limits_of
from ray_auditor.cluster import ClusterLost, cluster
from ray_auditor.conclusion import conclude
from ray_auditor.config import AuditConfig
from ray_auditor.driver import BaseFailed, run_stages
from ray_auditor.engine_class import device_name
from ray_auditor.forecast import keep_rate_limits
from ray_auditor.history import Conclusion, History
from ray_auditor.hub import CandidateError
from ray_auditor.hub.remote import SourceError
from ray_auditor.lease import Lease, LeaseHeld
from ray_auditor.plan import Plan, check_gate
from ray_auditor.preview import plan_sweep
from ray_auditor.report.finding import EXIT_FAILED
from ray_auditor.report.metrics import Metrics
from ray_auditor.report.progress import SweepProgress
from ray_auditor.roster import keep_apart
from ray_auditor.screen import clear, screen_of
from ray_auditor.store import ShardError
from ray_auditor.usage import NOTHING, kept_usage
from ray_auditor.worker import Assignment


def run_sweep(config: AuditConfig) -> int:
    """The verb `sweep`: audit what is not done yet, then reduce, flag and report.

    Returns:
        The exit code: 0 nothing stands out, 1 findings, 2 some failed, the source does not answer, Ray is
        gone, or another sweep has `out_dir`, 3 nothing to audit.

    Raises:
        ValueError: An input is missing or does not fit; nothing but the base has run.
    """
    config.require_inputs()
    try:
        with Lease(Path(config.out_dir)) as lease:
            return _sweep(config, lease)
    except (LeaseHeld, SourceError, ClusterLost) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILED


def _sweep(config: AuditConfig, lease: Lease) -> int:
    read_acknowledgements(Path(config.out_dir))  # a damaged line is named before anything runs
    plan = plan_sweep(config)
    if plan.meter.usage != NOTHING:
        _say(f"a sweep that did not end used {plan.meter.usage.describe()}: this one goes on with the rest")
    is_limited = limits_of(plan.config.budget, device_name(plan.config)).given
    with kept_usage(Path(config.out_dir), lambda: plan.meter.usage) if is_limited else nullcontext():
        return _carry_out(plan, lease)


def _carry_out(plan: Plan, lease: Lease) -> int:
    config = plan.config
    check_gate(plan)
    refused = {key: CandidateError("rejected", *why) for key, why in plan.ledger.refusals().items()}
    if config.screen.share is not None:
        small = screen_of(plan)
        failures = execute(small, "screen: ")
        plan, cleared = clear(plan, settle(small), failures)
        refused |= cleared
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
    _say(
        f"{stage}{len(plan.candidates)} candidates listed"
        + (f", {len(plan.nulls)} null members" if plan.nulls else "")
        + f", {len(plan.units)} distinct to audit: {len(plan.units) - len(todo)} "
        f"committed already and not repeated, {len(todo)} to run on {plan.suites.num_tokens} tokens each"
        + (f"; {num_groups} to fetch first, {arrivals.num_bytes} bytes at most" if arrivals else "")
    )
    failures: dict[str, CandidateError | str] = {}
    here = any(row.unit and row.status == "admitted" for row in plan.candidates)
    if (arrivals or here) and (arrivals or todo or stages):
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
                failures = {key: error.refusal or str(error) for key in plan.units | {plan.base_unit.key}}
    if arrivals:
        plan.work.fetch_s += arrivals.fetch_s
        plan.work.fetched_bytes += arrivals.fetched_bytes
    return failures


def finish(plan: Plan, failures: dict[str, CandidateError | str], refused: dict[str, CandidateError]) -> int:
    """Draw the conclusion, unless it is the last one's."""
    conclusion = Conclusion(plan.ledger, plan.config, plan.rows, plan.store.root)
    if not failures and conclusion.stands():
        _say("nothing is new since the last sweep: its report stands")
        return conclusion.repeat(History(plan.ledger, plan.base_unit, plan.candidates).whys())
    try:
        exit_code = conclude(plan, refused | failures)
    except ShardError:
        plan.ledger.forget_stamps()  # a unit that looked untouched is not: the next sweep looks inside again
        raise
    if not failures:
        conclusion.keep()
    return exit_code


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def settle(plan: Plan) -> Plan:
    """The plan with the rows of what arrived since it was made."""
    if plan.arrivals is None:
        return plan
    rows = [plan.arrivals.rows.get(row.id, row) for row in plan.rows]
    return replace(plan, rows=tuple(keep_apart(row, rows) for row in rows))
