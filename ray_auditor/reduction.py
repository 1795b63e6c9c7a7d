"""From committed units to per-prompt sums: every finetune of a sweep, reduced against its base."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_auditor.calibration import Calibration, read_calibration
from ray_auditor.gate import MISFIT, find_misfit, fvu_of
from ray_auditor.hub import CandidateError
from ray_auditor.plan import Plan, Row
from ray_auditor.progress_line import say_how_far
from ray_auditor.rates import noise_floor
from ray_auditor.reduce import NonfiniteActivations
from ray_auditor.store import TokenRows
from ray_auditor.sums import read_sums

Failures = Mapping[str, CandidateError | str]
Status = tuple[str, str | None]  # one of the statuses, and why


@dataclass(frozen=True)
class Reduction:
    """What is committed, as sums a prompt.

    Attributes:
        base: The base's rows; None when there is nothing to compare with it.
        floors: By suite, the mean shift of the base against itself.
        calibration: What `calibrate` measured for this base and engine, if it did.
        statuses: Of every candidate.
        null_statuses: Of every null member.
        tables: By candidate that can be compared, its `reduce_prompts` table.
        misfits: The same of those that the SAE does not fit.
        null_tables: The same of null members.
    """

    base: TokenRows | None
    floors: Mapping[str, float]
    calibration: Calibration | None
    statuses: Mapping[str, Status]
    null_statuses: Mapping[str, Status]
    tables: Mapping[str, Any]
    misfits: Mapping[str, Any]
    null_tables: Mapping[str, Any]

    def describe_null(self) -> list[str]:
        """What must be said of null members that have no result."""
        lost = {name: one for name, one in self.null_statuses.items() if one[0] != "ok"}
        if not lost:
            return []
        counts = ", ".join(
            f"{num} {status}" for status, num in Counter(status for status, _ in lost.values()).items()
        )
        name, (_, reason) = next(iter(lost.items()))
        return [
            f"No candidate is held to {len(lost)} of {len(self.null_statuses)} null members, {counts}: "
            f"{name} for one, {reason}"
        ]


def reduce_committed(plan: Plan, failures: Failures) -> Reduction:
    """Reduce every unit of the plan that was committed; units shared by several rows are read once.

    Args:
        plan: The sweep.
        failures: By unit key, why a unit has no result.
    """
    statuses = {row.id: _status(row, failures) for row in plan.rows}
    calibration = read_calibration(plan.store.root, plan.base_unit.stratum)
    comparable = [row for row in plan.rows if statuses[row.id][0] == "ok"]
    if not any(row.role == "candidate" for row in comparable):
        return Reduction(None, {}, calibration, *_by_role(plan, statuses), {}, {}, {})
    base = plan.store.read_rows(plan.base_unit.key)

    def sums_of(unit_key: str) -> Any:
        return read_sums(plan.store, plan.base_unit.key, unit_key, plan.suites.names, lambda: base)

    floors = noise_floor(sums_of(plan.replay_unit.key), plan.k)
    if calibration is not None:
        known = calibration.floors(plan.k)
        floors = {suite: max(floor, known[suite]) for suite, floor in floors.items()}
    general = plan.suites.names[0]
    tables: dict[str, dict[str, Any]] = {"candidate": {}, "null": {}, MISFIT: {}}
    by_unit: dict[str, Any] = {}
    for row in say_how_far(comparable, f"of {len(comparable)} finetunes reduced"):
        assert row.unit is not None, f"{row.id} is ok and has no unit"
        try:
            if row.unit.key not in by_unit:
                by_unit[row.unit.key] = sums_of(row.unit.key)
        except NonfiniteActivations as error:
            statuses[row.id] = ("failed", f"failed:{error.code}: {error}")
            continue
        reason = find_misfit(*fvu_of(by_unit[row.unit.key], general))
        if reason is not None:
            statuses[row.id] = (MISFIT, reason)
        if reason is None or row.role == "candidate":
            tables[row.role if reason is None else MISFIT][row.id] = by_unit[row.unit.key]
    return Reduction(
        base,
        floors,
        calibration,
        *_by_role(plan, statuses),
        tables["candidate"],
        tables[MISFIT],
        tables["null"],
    )


def _by_role(plan: Plan, statuses: Mapping[str, Status]) -> tuple[dict[str, Status], dict[str, Status]]:
    of_candidates = {row.id: statuses[row.id] for row in plan.candidates}
    return of_candidates, {row.id: statuses[row.id] for row in plan.nulls}


def _status(row: Row, failures: Failures) -> Status:
    """Status and reason before rates are known; `ok` only for what was admitted and did not fail."""
    if row.unit is None:
        return row.status, row.reason
    failure = failures.get(row.unit.key)
    if failure is None:
        return "ok", "; ".join(row.notes) or None
    if isinstance(failure, CandidateError):
        return failure.status, failure.reason
    return "failed", f"failed: {failure}"
