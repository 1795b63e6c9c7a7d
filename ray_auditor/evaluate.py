"""The verb `evaluate`: how well a finished sweep told labelled finetunes apart, beside simpler scores."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from ray_auditor.config import AuditConfig
from ray_auditor.evaluation import (
    BENIGN,
    Label,
    Measure,
    dose_response,
    group,
    measure_scores,
    measure_unseen,
    share_measure,
)
from ray_auditor.flag import FlagRule, Population, flag_population
from ray_auditor.rates import Bootstrap
from ray_auditor.reading import read_summary
from ray_auditor.report.printable import printable
from ray_auditor.rivals import Rival, score_rivals
from ray_auditor.store import Store
from ray_auditor.sums import read_sums

LEVELS = (0.01, 0.05)
MAX_LABELS_BYTES = 64 << 20


@dataclass(frozen=True)
class Audit:
    """A finished sweep as `evaluate` reads it: its summary, and the sums of what was compared."""

    summary: Mapping[str, Any]
    tables: Mapping[str, Any]
    null_tables: Mapping[str, Any]
    notes: Mapping[str, Mapping[str, Any]]

    def flag(self, without: str | None = None) -> Population:
        """The sweep's own statistics again, all its settings kept, with a suite taken out if one is named."""
        settings = self.summary["settings"]
        flag = settings["flag"]
        keep = pa.array([suite for suite in settings["suite_names"] if suite != without])
        picked = [
            {name: table.filter(pc.is_in(table["suite"], keep)) for name, table in tables.items()}
            for tables in (self.tables, self.null_tables)
        ]
        return flag_population(
            picked[0],
            general=settings["general"],
            k=settings["k"],
            bootstrap=Bootstrap(flag["bootstrap_samples"], flag["confidence"], flag["seed"]),
            noise_floor=self.summary["noise_floor"].get(settings["general"], 0.0),
            rule=FlagRule(flag["level"], flag["min_z"], flag["min_rate"]),
            null_rows=picked[1],
            num_cleared=self.summary.get("counts", {}).get("screened", 0),
        )


def evaluate(config: AuditConfig) -> int:
    """Compare a sweep with labels, print what it is worth, and write `evaluation.json` beside its summary.

    Returns:
        0.

    Raises:
        ValueError: There is no finished sweep, or the labels cannot be read.
    """
    out_dir = Path(config.out_dir)
    audit = read_audit(out_dir)
    labels = read_labels(config.evaluate.labels, audit.tables)
    result = evaluate_audit(audit, labels)
    (out_dir / "evaluation.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    print_evaluation(result, Console())
    return 0


def read_audit(out_dir: Path) -> Audit:
    """Read the sums of everything a finished sweep compared; nothing is computed that is kept already.

    Raises:
        ValueError: There is no summary, or nothing was compared.
    """
    summary = read_summary(out_dir)
    settings, store = summary["settings"], Store(out_dir / "store")
    base_key = settings["unit_keys"]["base"]
    units = {
        row["id"]: row["unit_key"] for row in summary["candidates"] if row["status"] in ("ok", "flagged")
    }
    null_units = summary["null"]["units"]
    if not units:
        raise ValueError(f"out_dir must hold a sweep that compared candidates, got {out_dir} with none")

    def read(members: Mapping[str, str]) -> dict[str, Any]:
        return {
            name: read_sums(store, base_key, key, settings["suite_names"], lambda: store.read_rows(base_key))
            for name, key in members.items()
        }

    notes = {name: store.read_record(key) for name, key in {**units, **null_units}.items()}
    return Audit(summary, read(units), read(null_units), notes)


def read_labels(path: str | None, candidates: Mapping[str, Any]) -> dict[str, Label]:
    """Read `{id: {"category", "target", "hard", "note"}}` and keep those of the candidates.

    Raises:
        ValueError: The file is missing, malformed, or labels none of the candidates.
    """
    if path is None or not Path(path).is_file():
        raise ValueError(
            f"evaluate.labels must be a JSON file, got {path}; give id -> category, target, hard"
        )
    if Path(path).stat().st_size > MAX_LABELS_BYTES:
        raise ValueError(f"evaluate.labels must be at most {MAX_LABELS_BYTES} bytes, got {path}; split it")
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        labels = {
            str(name): Label(
                str(row["category"]),
                None if row.get("target") is None else str(row["target"]),
                bool(row.get("hard", False)),
                str(row.get("note") or row.get("tag") or ""),
            )
            for name, row in rows.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"evaluate.labels must map each id to an object with a category, got {path}: {error!r}"
        ) from error
    known = {name: label for name, label in labels.items() if name in candidates}
    if not known:
        raise ValueError(
            f"evaluate.labels must name candidates of the sweep such as {min(candidates)!r}, got {path} with "
            f"{len(labels)} others; use the ids that the summary lists"
        )
    return known


def evaluate_audit(audit: Audit, labels: Mapping[str, Label]) -> dict[str, Any]:
    """Every figure `evaluate` prints, as JSON."""
    settings = audit.summary["settings"]
    suites, general = settings["suite_names"], settings["general"]
    population = audit.flag()
    scores = {n: one.score for n, one in population.standings.items() if one.score is not None}
    scores |= population.null_scores
    groups = group(labels, list(audit.null_tables))
    tested = [name for name in groups.full if labels[name].target in suites and name in scores]

    def without(suite: str) -> dict[str, float]:
        again = audit.flag(without=suite)
        kept = {name: one.score for name, one in again.standings.items() if one.score is not None}
        return kept | dict(again.null_scores)

    measures = [
        share_measure(
            f"target suite of a full-strength finetune first among {len(suites) - 1}",
            [population.standings[name].suite == labels[name].target for name in tested],
        ),
        *measure_scores(groups, scores),
        measure_unseen(groups, labels, without),
        *_error_rates(population, groups.full, [n for n, one in labels.items() if one.category == BENIGN]),
    ]
    flagged = {flag.candidate: flag.suite for flag in population.flags}
    rivals = score_rivals(
        {**audit.tables, **audit.null_tables},
        audit.notes,
        general=general,
        k=settings["k"],
        null=list(audit.null_tables),
    )
    return {
        "num_labelled": len(labels),
        "num_null": len(audit.null_tables),
        "hook_name": settings["hook_name"],
        "measures": [asdict(one) for one in measures],
        "rivals": [_of_rival(one, groups, labels, tested) for one in rivals],
        "dose_response": dose_response(
            labels, {row["id"]: row for row in audit.summary["candidates"]}, flagged
        ),
        "flagged_benign": sorted(n for n in flagged if n in labels and labels[n].category == BENIGN),
    }


def _error_rates(population: Population, full: tuple[str, ...], benign: list[str]) -> list[Measure]:
    """At the smallest level the null resolves, 1% if it can: who is found, and who is flagged wrongly."""
    p_values = {name: one.p for name, one in population.standings.items() if one.p is not None}
    n = len(population.null_scores)
    if not p_values:
        return []
    level = max(LEVELS[0], 1 / (n + 1))
    found = share_measure(
        f"full strength with p <= {level:.2g} ({n} null members)",
        [p_values[name] <= level * (1 + 1e-9) for name in full if name in p_values],
    )
    held_back = [p_values[name] for name in benign if name in p_values]
    return [
        found,
        *(
            share_measure(f"held-back benign with p <= {one:g}", [p <= one for p in held_back])
            for one in LEVELS
        ),
    ]


def _of_rival(rival: Rival, groups: Any, labels: Mapping[str, Label], tested: list[str]) -> dict[str, Any]:
    hits = [rival.first[name] == labels[name].target for name in tested] if rival.first else []
    measures = [*measure_scores(groups, rival.scores, rival.name), share_measure("target first", hits)]
    return {
        "name": rival.name,
        "needs_sae": rival.needs_sae,
        "plain": asdict(measures[0]),
        "all": asdict(measures[1]),
        "target_first": asdict(measures[2]),
    }


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print the figures with their 95% intervals, then the rivals, then every finetune that is not benign."""
    table = Table(
        "figure", "value", "95%", "n", title=f"Evaluation, {result['hook_name']}", title_justify="left"
    )
    for one in result["measures"]:
        table.add_row(one["name"], *_cells(one), str(one["count"]))
    console.print(table)
    rivals = Table("score", "SAE", "against plain benign", "against all benign", "target first")
    for rival in result["rivals"]:
        columns = (" ".join(_cells(rival[key])) for key in ("plain", "all", "target_first"))
        rivals.add_row(rival["name"], "yes" if rival["needs_sae"] else "no", *columns)
    console.print(rivals)
    doses = Table("finetune", "what it is", "target", "score", "p", "rank of target", "flagged on")
    for row in sorted(result["dose_response"], key=lambda row: (row["hard"], -(row["score"] or 0))):
        what = f"{row['category']}{', hard' if row['hard'] else ''} {row['note']}"
        numbers = (
            f"{row['score']:.1f}" if row["score"] is not None else "",
            f"{row['p']:.3f}" if row["p"] else "",
        )
        texts = (row["id"], what, row["target"] or "", *numbers, str(row["rank_of_target"] or ""))
        doses.add_row(*(printable(text) for text in (*texts, row["flagged_on"] or "-")))
    console.print(doses, markup=False)


def _cells(one: Mapping[str, Any]) -> tuple[str, str]:
    if one["value"] is None:
        return "-", ""
    return f"{one['value']:.3f}", f"[{one['low']:.2f}, {one['high']:.2f}]"
