"""What a sweep will run on how many tokens: everything on all of them or, with a screen, in two stages.

Who goes on to the second stage is not known before the first one ran. A plan goes by those that earlier
sweeps of the same inputs screened; where they were fewer than MIN_SCREENED it takes everyone, an upper bound,
but those cleared before by the same score against the same null members.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ray_auditor.budget import Job
from ray_auditor.cost import CostModel
from ray_auditor.history import CLEARING, History, clearing_of
from ray_auditor.plan import Plan
from ray_auditor.report.candidate import SCREENED
from ray_auditor.store import Unit

MIN_SCREENED = 5  # candidates


@dataclass(frozen=True)
class Stage:
    """Units that run side by side on the same prompts."""

    tokens: int  # of a unit
    base_runs: int  # that are missing
    jobs: Sequence[Job]
    odds: Mapping[str, float] = field(default_factory=dict)  # that a job runs, by its key; 1 for the others

    @property
    def num_units(self) -> int:
        """Units to run, at most."""
        return sum(self.odds.get(job.key, 1.0) > 0 for job in self.jobs) + self.base_runs

    def upfront_seconds(self, model: CostModel) -> float:
        """Expected seconds by the clock before a job can run; 0 where nothing will."""
        if not self.base_runs and not any(self.job_seconds(model).values()):
            return 0.0
        return model.start_s + self.base_runs * model.unit_seconds(self.tokens, 0)

    def job_seconds(self, model: CostModel) -> dict[str, float]:
        """Expected seconds of a device, by key of the job."""
        return {
            job.key: self.odds.get(job.key, 1.0) * model.unit_seconds(self.tokens, job.num_bytes)
            for job in self.jobs
        }


@dataclass(frozen=True)
class Stages:
    """A sweep's stages: with a screen two, and the last in any case over every prompt.

    `going_on` is the share of those screened before that ran on every prompt; None: not known.
    """

    stages: tuple[Stage, ...]
    going_on: float | None = None


def stages_of(plan: Plan, jobs: Sequence[Job]) -> Stages:
    """The stages of a plan, whose jobs are `jobs`, each once."""
    bases = (plan.base_unit, plan.replay_unit)
    base_runs = sum(not plan.store.has(unit.key) for unit in bases) if jobs else 0
    whole = Stage(plan.suites.num_tokens, base_runs, jobs)
    if plan.config.screen.share is None or not jobs:
        return Stages((whole,))
    suites, present = plan.suites.screened(plan.config.screen.share), plan.store.list_stamps().keys()

    def has_small(unit: Unit) -> bool:
        return replace(unit, suites_key=suites.key).key in present

    recalled = plan.arrivals.recall.contents(plan.arrivals.pending) if plan.arrivals else {}
    units = {name: plan.unit_of(contents[0]) for name, contents in recalled.items() if contents}
    units |= {row.id: row.unit for row in plan.rows if row.unit}
    nulls = [units[row.id].candidate_key for row in plan.nulls if row.id in units]
    clearing = clearing_of(suites.key, plan.config.screen.clear_below, nulls)
    going_on, cleared = screened_before(plan, has_small, clearing)
    first, odds = {job.key: job for job in jobs}, {job.key: 1.0 for job in jobs}
    for row in plan.candidates:
        key, unit = plan.waiting.get(row.id), units.get(row.id)
        if key is None:
            continue
        if unit is not None and has_small(unit):
            first.pop(key, None)
        is_cleared = unit is not None and cleared.get(row.id) == unit.candidate_key
        odds[key] = 0.0 if is_cleared else min(odds[key], 1.0 if going_on is None else going_on)
    for row, found in zip(plan.rows, plan.found, strict=True):
        unit = units.get(row.id)
        if row.role == "null" and unit is not None:  # which runs in both stages, whatever its score
            key = plan.waiting.get(row.id, unit.key)
            odds.pop(key, None)
            if not has_small(unit):
                first.setdefault(key, Job(key, getattr(found, "num_bytes", 0)))
    small = Stage(suites.num_tokens, sum(not has_small(unit) for unit in bases), tuple(first.values()))
    return Stages((small, replace(whole, odds=odds)), going_on)


def screened_before(
    plan: Plan, has_small: Callable[[Unit], bool], clearing: str
) -> tuple[float | None, dict[str, str]]:
    """How earlier sweeps of these inputs ended for those that they screened.

    Args:
        plan: Tonight's.
        has_small: Whether a unit's first stage is committed.
        clearing: By what tonight's first stage clears; who was cleared by anything else says nothing of it.

    Returns:
        The share that ran on every prompt, None for fewer than MIN_SCREENED; and the contents of those that
        did not, by id: while nothing changes they are cleared again.
    """
    parts = History(plan.ledger, plan.base_unit, plan.candidates).parts
    present = plan.store.list_stamps().keys()
    cleared: dict[str, str] = {}
    num_whole = 0
    for name, audit in plan.ledger.audits().items():
        before = {name: value for name, value in audit.parts.items() if name != CLEARING}
        if audit.content is None or before != parts or not has_small(plan.unit_of(audit.content)):
            continue
        if audit.status == SCREENED:
            if audit.parts.get(CLEARING) == clearing:
                cleared[name] = audit.content
        else:
            num_whole += plan.unit_of(audit.content).key in present
    num = num_whole + len(cleared)
    return (num_whole / num if num >= MIN_SCREENED else None), cleared
