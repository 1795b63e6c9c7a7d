"""A sweep in two stages: everyone on some of the prompts, then who does not score low there on all of them.

The first stage is a sweep of its own over smaller suites, base and null members included. Its suites have
another key, so its units are others, of another stratum: no row of it is ever compared with a whole one.
"""

from collections.abc import Mapping
from dataclasses import replace

from ray_auditor.flag import FlagRule, flag_population
from ray_auditor.hub import CandidateError
from ray_auditor.hub.remote import Pinned
from ray_auditor.plan import Plan, make_plan
from ray_auditor.rates import Bootstrap
from ray_auditor.reduction import Failures, reduce_committed
from ray_auditor.report.candidate import SCREENED
from ray_auditor.roster import keep_apart
from ray_auditor.worker import Assignment


def screen_of(plan: Plan) -> Plan:
    """The first stage of a sweep: what of `plan` is still to run, and every null member, on some prompts.

    Candidates that are here keep what was admitted. Null members are admitted again when their first stage is
    not committed yet; those that lie elsewhere are fetched for it.

    Raises:
        ValueError: There is no null population: without one a low score is no more than a rank.
    """
    share = plan.config.screen.share
    assert share is not None, "the screen is off"
    check_screen(plan)
    listed = [
        (replace(entry, id=row.id), row.role)
        for entry, row in zip(plan.found, plan.rows, strict=True)
        if row.role == "null" or (isinstance(entry, Pinned) and row.id in plan.waiting)
    ]
    small = make_plan(plan.config, find=lambda _: listed, share=share)
    tasks = {task.unit.key: task for task in plan.assignments}
    rows = list(small.rows)
    assignments = {task.unit.key: task for task in small.assignments}
    for row in plan.rows:
        if row.role == "null" or row.unit is None or row.unit.key not in tasks:
            continue
        task = tasks[row.unit.key]
        unit = small.unit_of(task.unit.candidate_key)
        rows.append(replace(row, unit=unit))
        if not small.store.has(unit.key):
            assignments.setdefault(unit.key, Assignment(unit, task.candidate))
    arrivals = small.arrivals and replace(small.arrivals, meter=plan.meter)
    return replace(
        small,
        rows=tuple(keep_apart(row, rows) for row in rows),
        assignments=tuple(assignments.values()),
        arrivals=arrivals,
        meter=plan.meter,
        work=plan.work,
    )


def check_screen(plan: Plan) -> None:
    """Check that what is cleared would be held to something.

    Raises:
        ValueError: There is no null population: without one a low score is no more than a rank.
    """
    if plan.config.screen.share is not None and not plan.nulls:
        raise ValueError(
            "null.path must be given with screen.share, for scores of candidates alone are ranks; "
            "add null.path=DIR or leave screen.share out"
        )


def clear(plan: Plan, small: Plan, failures: Failures) -> tuple[Plan, dict[str, CandidateError]]:
    """The second stage: `plan` without the candidates that the first one cleared.

    Who has no score there, because it failed, does not fit the SAE, or there are too few to compare with, is
    not cleared. Nor is what was run on every prompt before, under another name.

    Args:
        plan: The whole sweep.
        small: Its first stage, once it has run.
        failures: Of the first stage, by unit key.

    Returns:
        The plan, whose cleared rows say what their weights are, and why each was cleared, by unit key.
    """
    config, general = plan.config, small.suites.names[0]
    reduced = reduce_committed(small, failures)
    population = flag_population(
        reduced.tables,
        general=general,
        k=small.k,
        bootstrap=Bootstrap(config.flag.bootstrap_samples, config.flag.confidence, config.flag.seed),
        noise_floor=reduced.floors.get(general, 0.0),
        rule=FlagRule(config.flag.level, config.flag.min_z, config.flag.min_rate),
        null_rows=reduced.null_tables,
    )
    bound = config.screen.clear_below
    scores = {
        name: one.score
        for name, one in population.standings.items()
        if one.p is not None and one.score is not None and one.score < bound
    }
    whole = {row.id: plan.unit_of(row.unit.candidate_key) for row in small.candidates if row.unit}
    units = {
        plan.waiting[name]: (whole[name], _screened(small, score, bound))
        for name, score in scores.items()
        if name in plan.waiting and whole[name] != plan.base_unit and not plan.store.has(whole[name].key)
    }
    rest = plan.without({key: why for key, (_, why) in units.items()})
    rows = [
        replace(row, unit=units[plan.waiting[row.id]][0]) if plan.waiting.get(row.id) in units else row
        for row in rest.rows
    ]
    return replace(rest, rows=tuple(rows)), {unit.key: why for unit, why in units.values()}


def _screened(small: Plan, score: float, bound: float) -> CandidateError:
    num_prompts = sum(len(suite.prompts) for suite in small.suites.suites)
    text = f"score {score:.2f} on {num_prompts} prompts, below {bound:g}; the others did not run"
    return CandidateError(SCREENED, "cleared", text)


def describe_screen(statuses: Mapping[str, tuple[str, str | None]], share: float | None) -> list[str]:
    """What must be said beside the scores of a sweep that screened."""
    num = sum(status == SCREENED for status, _ in statuses.values())
    if share is None or not num:
        return []
    return [
        f"{num} candidates were screened only: they scored low on {share:.0%} of the prompts and the others "
        "did not run; they count in the false discovery rate as having no finding, and are not called clean"
    ]
