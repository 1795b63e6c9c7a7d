"""What a sweep found, from committed units alone: rates, flags, summary, findings and report.

Nothing here needs the engine: it can be repeated on a laptop against the store.
"""

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from ray_auditor import __version__
from ray_auditor.acknowledgement import mark_acknowledged, read_acknowledgements
from ray_auditor.calibration import Calibration
from ray_auditor.details import describe_flags
from ray_auditor.engine_class import engine_version
from ray_auditor.flag import Cell, FlagRule, Population, flag_population
from ray_auditor.gate import MISFIT
from ray_auditor.history import History, clearing_of, content_of
from ray_auditor.outputs import write_outputs
from ray_auditor.plan import Plan, Row, gate_base
from ray_auditor.rates import Bootstrap, suite_sums
from ray_auditor.reduction import Failures, Status, reduce_committed
from ray_auditor.report.candidate import SCREENED
from ray_auditor.report.finding import EXIT_FAILED, exit_code_of
from ray_auditor.report.terminal import print_summary
from ray_auditor.screen import describe_screen
from ray_auditor.standing import Standing
from ray_auditor.store import TokenRows


def conclude(plan: Plan, failures: Failures) -> int:
    """Reduce what is committed, flag it, write every output and print the summary.

    Args:
        plan: The sweep.
        failures: By unit key, why a unit has no result.

    Returns:
        The exit code.
    """
    config, out_dir = plan.config, Path(plan.config.out_dir)
    general = plan.suites.names[0]
    bootstrap = Bootstrap(config.flag.bootstrap_samples, config.flag.confidence, config.flag.seed)
    reduced = reduce_committed(plan, failures)
    statuses = dict(reduced.statuses)
    population = flag_population(
        reduced.tables,
        general=general,
        k=plan.k,
        bootstrap=bootstrap,
        noise_floor=reduced.floors.get(general, 0.0),
        rule=FlagRule(config.flag.level, config.flag.min_z, config.flag.min_rate),
        null_rows=reduced.null_tables,
        num_cleared=sum(status == SCREENED for status, _ in statuses.values()),
    )
    for flag in population.flags:
        statuses[flag.candidate] = ("flagged", statuses[flag.candidate][1])
    history = History(plan.ledger, plan.base_unit, plan.candidates)
    flagged = [(flag.candidate, flag.suite, flag.rule) for flag in population.flags]
    flagged += [(name, MISFIT, MISFIT) for name, (status, _) in statuses.items() if status == MISFIT]
    whys, new = history.whys(), history.new(flagged)
    summary: dict[str, Any] = {
        "counts": dict(Counter(status for status, _ in statuses.values())),
        "noise_floor": reduced.floors,
        "calibration": _calibration(reduced.calibration, plan.k),
        "sae_gate": _gate(plan, reduced.base),
        "null": {
            "units": {
                row.id: row.unit.key for row in plan.nulls if row.unit and row.id in reduced.null_tables
            },
            "scores": dict(population.null_scores),
            "num_listed": len(plan.nulls),
        },
        "candidates": [
            _candidate(plan, row, statuses[row.id], population, reduced.misfits.get(row.id))
            | {"why": whys[row.id]}
            | ({"new": (row.id, MISFIT) in new} if statuses[row.id][0] == MISFIT else {})
            for row in plan.candidates
        ],
        "flags": [asdict(flag) | {"new": (flag.candidate, flag.suite) in new} for flag in population.flags],
        "limits": [
            *population.limits,
            *reduced.describe_null(),
            *describe_screen(statuses, config.screen.share),
        ],
        "settings": _settings(plan),
        "versions": _versions(),
        "work": plan.describe_work(),
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if reduced.base is not None:
        summary |= describe_flags(plan, reduced.base, population.flags)
    mark_acknowledged(summary, read_acknowledgements(out_dir))
    summary["exit_code"] = exit_code_of(summary)
    summary = write_outputs(summary, out_dir)
    console = Console()
    print_summary(summary, console)
    console.print(f"report: {out_dir / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    # An exit code that cannot say that there are findings has not reported them.
    reported = () if summary["exit_code"] == EXIT_FAILED else flagged
    nulls, share = [row.unit.candidate_key for row in plan.nulls if row.unit], config.screen.share
    small_key = plan.suites.screened(share).key if share is not None else ""
    history.conclude(
        {name: status for name, (status, _) in statuses.items()},
        reported,
        clearing_of(small_key, config.screen.clear_below, nulls),
    )
    return int(summary["exit_code"])


def _candidate(plan: Plan, row: Row, status: Status, population: Population, misfit: Any) -> dict[str, Any]:
    cells = {suite: _numbers(cell) for suite, cell in population.cells.get(row.id, {}).items()}
    if misfit is not None:  # what the SAE misses is reported; features it does not hold are not compared
        sums = suite_sums(misfit, plan.k).items()
        cells = {
            suite: {"tokens": one.tokens, "fvu": one.fvu, "base_fvu": one.base_fvu} for suite, one in sums
        }
    standing = population.standings.get(row.id, Standing())
    measured = row.id in population.cells or misfit is not None
    return {
        "id": row.id,
        "kind": row.kind,
        "status": status[0],
        "reason": status[1],
        "score": standing.score,
        "score_low": standing.score_low,
        "p": standing.p,
        "q": standing.q,
        "joint_p": standing.joint_p,
        "suite": standing.suite,
        "rivals": _rivals(plan, row) if measured else None,
        "proof": _record(plan, row).get("proof") if measured else None,
        "unit_key": row.unit.key if row.unit else None,
        "content_sha256": content_of(row),
        "declared_base": row.declared_base,
        "suites": cells,
    }


def _rivals(plan: Plan, row: Row) -> dict[str, Any]:
    """What a cheap look at weights and residuals says of the same candidate."""
    record = _record(plan, row)
    return {**record.get("weights", {}), "mean_difference": record.get("mean_difference", {})}


def _record(plan: Plan, row: Row) -> dict[str, Any]:
    assert row.unit is not None, f"{row.id} was measured and has no unit"
    record: dict[str, Any] = plan.store.read_record(row.unit.key)
    return record


def _numbers(cell: Cell) -> dict[str, Any]:
    return asdict(cell.rate) | {"z": cell.z, "miss_z": cell.miss_z, "over_rate": cell.over_rate}


def _gate(plan: Plan, base: TokenRows | None) -> dict[str, Any] | None:
    """How well the SAE fits the base on the suites, and what it was held to."""
    if base is None:
        return None
    fit, bounds = gate_base(plan, base)
    return {"fvu": round(fit.fvu, 4), "l0": round(fit.l0, 2), "bounds": asdict(bounds)}


def _calibration(calibration: Calibration | None, k: int) -> dict[str, Any] | None:
    """Mean shifts of the base against itself, by variant and suite, and which of them count as the floor."""
    if calibration is None:
        return None
    return {
        "key": calibration.key,
        "generated_at": calibration.generated_at,
        "floors": calibration.floors(k),
        "variants": [
            {
                "name": one.name,
                "what": one.what,
                "same_engine_class": one.engine_class == calibration.unit["engine_class"],
                "reason": one.reason,
                "shift": {suite: by_k[str(k)] for suite, by_k in one.shift.items()},
            }
            for one in calibration.variants
        ],
    }


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        **asdict(plan.config),
        "k": plan.k,
        "hook_name": plan.sae.hook_name,
        "general": plan.suites.names[0],
        "suite_names": list(plan.suites.names),
        "base_key": plan.base.key,
        "sae_key": plan.sae.key,
        "suites_key": plan.suites.key,
        "engine_class": plan.base_unit.engine_class,
        "neuronpedia_id": plan.sae.neuronpedia_id,
        "num_truncated": {suite.name: suite.num_truncated for suite in plan.suites.suites},
        "unit_keys": {"base": plan.base_unit.key, "replay": plan.replay_unit.key},
    }


def _versions() -> dict[str, str]:
    found = {
        name: version(name) for name in ("torch", "ray", "sae-lens", "transformers", "pyarrow", "datasets")
    }
    return {"ray-auditor": __version__, "vllm": engine_version(), **found}
