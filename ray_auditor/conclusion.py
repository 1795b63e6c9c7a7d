"""What a sweep found, from committed units alone: rates, flags, summary, findings and report.

Nothing here needs the engine: it can be repeated on a laptop against the store.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from ray_auditor import __version__
from ray_auditor.calibration import Calibration, read_calibration
from ray_auditor.features import describe_features, moved_features
from ray_auditor.flag import Cell, FlagRule, Population, flag_population
from ray_auditor.gate import MISFIT, find_misfit, fvu_of
from ray_auditor.hub import CandidateError
from ray_auditor.plan import Plan, Row, engine_version, gate_base
from ray_auditor.rates import Bootstrap, noise_floor, suite_sums
from ray_auditor.reduce import NonfiniteActivations, reduce_prompts
from ray_auditor.report.html import write_html
from ray_auditor.report.terminal import print_summary
from ray_auditor.store import TokenRows

EXIT_OK, EXIT_FINDINGS, EXIT_FAILED, EXIT_NOTHING = 0, 1, 2, 3
MAX_DETAILED = 200  # flags whose moved features are kept in the summary

Failures = Mapping[str, CandidateError | str]

FINDINGS = pa.schema(
    [
        pa.field("candidate", pa.string(), nullable=False),
        pa.field("suite", pa.string(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("overlap", pa.float64(), nullable=False),
        pa.field("shift", pa.float64(), nullable=False),
        pa.field("difference_rate", pa.float64()),
        pa.field("ci_low", pa.float64()),
        pa.field("ci_high", pa.float64()),
        pa.field("z", pa.float64()),
        pa.field("unit_key", pa.string(), nullable=False),
        pa.field("content_sha256", pa.string(), nullable=False),
    ]
)


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
    statuses = {row.id: _status(row, failures) for row in plan.candidates}
    tables: dict[str, Any] = {}
    misfits: dict[str, Any] = {}
    calibration = read_calibration(plan.store.root, plan.base_unit.stratum)
    base: TokenRows | None = None
    floors: Mapping[str, float] = {}
    if any(status == "ok" for status, _ in statuses.values()):
        base = plan.store.read_rows(plan.base_unit.key)
        floors = noise_floor(_reduce(plan, base, plan.store.read_rows(plan.replay_unit.key)), plan.k)
        if calibration is not None:
            known = calibration.floors(plan.k)
            floors = {suite: max(floor, known[suite]) for suite, floor in floors.items()}
        by_unit: dict[str, Any] = {}
        for row in plan.candidates:
            if row.unit is None or statuses[row.id][0] != "ok":
                continue
            try:
                if row.unit.key not in by_unit:
                    by_unit[row.unit.key] = _reduce(plan, base, plan.store.read_rows(row.unit.key))
                reason = find_misfit(*fvu_of(by_unit[row.unit.key], general))
                if reason is not None:
                    statuses[row.id] = (MISFIT, reason)
                (tables if reason is None else misfits)[row.id] = by_unit[row.unit.key]
            except NonfiniteActivations as error:
                statuses[row.id] = ("failed", f"failed:{error.code}: {error}")
    population = flag_population(
        tables,
        general=general,
        k=plan.k,
        bootstrap=bootstrap,
        noise_floor=floors.get(general, 0.0),
        rule=FlagRule(min_z=config.flag.min_z, min_rate=config.flag.min_rate),
    )
    for flag in population.flags:
        statuses[flag.candidate] = ("flagged", statuses[flag.candidate][1])
    exit_code = _exit_code(Counter(status for status, _ in statuses.values()))
    summary = {
        "counts": dict(Counter(status for status, _ in statuses.values())),
        "exit_code": exit_code,
        "noise_floor": floors,
        "calibration": _calibration(calibration, plan.k),
        "sae_gate": _gate(plan, base),
        "candidates": [
            _candidate(row, statuses[row.id], population, misfits.get(row.id), plan.k)
            for row in plan.candidates
        ],
        "flags": [asdict(flag) for flag in population.flags],
        "limits": list(population.limits),
        "settings": _settings(plan),
        "versions": _versions(),
        "generated_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if base is not None:
        summary["details"] = _details(plan, base, population)
    _write(out_dir / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    _write_findings(out_dir / "findings.parquet", plan, population)
    write_html(summary, out_dir / "report.html")
    console = Console()
    print_summary(summary, console)
    console.print(f"report: {out_dir / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return exit_code


def _reduce(plan: Plan, base: TokenRows, rows: TokenRows) -> Any:
    return reduce_prompts(base, rows, suites=plan.suites.names)


def _status(row: Row, failures: Failures) -> tuple[str, str | None]:
    """Status and reason before rates are known; `ok` only for what was admitted and did not fail."""
    if row.unit is None:
        return row.status, row.reason
    failure = failures.get(row.unit.key)
    if failure is None:
        return "ok", "; ".join(row.notes) or None
    if isinstance(failure, CandidateError):
        return failure.status, failure.reason
    return "failed", f"failed: {failure}"


def _exit_code(counts: Counter[str]) -> int:
    if counts["failed"] or counts["deferred"]:
        return EXIT_FAILED
    if counts["flagged"] or counts[MISFIT]:
        return EXIT_FINDINGS
    return EXIT_OK if counts["ok"] else EXIT_NOTHING


def _candidate(
    row: Row, status: tuple[str, str | None], population: Population, misfit: Any, k: int
) -> dict[str, Any]:
    cells = {suite: _numbers(cell) for suite, cell in population.cells.get(row.id, {}).items()}
    if misfit is not None:  # what the SAE misses is reported; features it does not hold are not compared
        sums = suite_sums(misfit, k).items()
        cells = {
            suite: {"tokens": one.tokens, "fvu": one.fvu, "base_fvu": one.base_fvu} for suite, one in sums
        }
    return {
        "id": row.id,
        "kind": row.kind,
        "status": status[0],
        "reason": status[1],
        "score": population.scores.get(row.id),
        "unit_key": row.unit.key if row.unit else None,
        "declared_base": row.declared_base,
        "suites": cells,
    }


def _numbers(cell: Cell) -> dict[str, Any]:
    return asdict(cell.rate) | {
        "excess": cell.excess,
        "z": cell.z,
        "z_low": cell.z_low,
        "over_rate": cell.over_rate,
    }


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


def _details(plan: Plan, base: TokenRows, population: Population) -> dict[str, Any]:
    """The features that moved, for the strongest flags, by candidate and suite."""
    unit_of = {row.id: row.unit for row in plan.candidates}
    prompts = plan.store.read_suites(plan.suites.key)
    details: dict[str, dict[str, Any]] = {}
    for flag in population.flags[:MAX_DETAILED]:
        unit = unit_of[flag.candidate]
        assert unit is not None, f"{flag.candidate} is flagged and has no unit"
        rows = plan.store.read_rows(unit.key)
        number = plan.suites.names.index(flag.suite)
        of_suite = [prompt for prompt in prompts if prompt.suite_id == number]
        moved = describe_features(moved_features(base, rows, number, 0), base, rows, of_suite)
        details.setdefault(flag.candidate, {})[flag.suite] = {"features": moved}
    return details


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        **asdict(plan.config),
        "k": plan.k,
        "hook_name": plan.sae.hook_name,
        "general": plan.suites.names[0],
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


def _write_findings(path: Path, plan: Plan, population: Population) -> None:
    """One row a flag; docs/schema.md has the columns."""
    units = {row.id: row.unit for row in plan.candidates if row.unit}
    rows = [
        asdict(flag)
        | _numbers(population.cells[flag.candidate][flag.suite])
        | {"unit_key": units[flag.candidate].key, "content_sha256": units[flag.candidate].candidate_key}
        for flag in population.flags
    ]
    table = pa.Table.from_pylist(
        [{name: row[name] for name in FINDINGS.names} for row in rows], schema=FINDINGS
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    _write(path, sink.getvalue().to_pybytes())


def _write(path: Path, data: bytes) -> None:
    """Replace `path` whole."""
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    temp.write_bytes(data)
    os.replace(temp, path)
