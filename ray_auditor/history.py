"""What is new since the last sweep: why each candidate is where it is, and which findings nobody has seen.

A night without any news ends here: the conclusion of the last one stands, and only says that nothing is new.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_auditor.acknowledgement import mark_acknowledged, read_acknowledgements
from ray_auditor.config import AuditConfig
from ray_auditor.durable_file import put_file
from ray_auditor.ledger import Audit, Ledger, Reported, explain
from ray_auditor.outputs import OUTPUTS, to_json, write_outputs
from ray_auditor.report.candidate import SCREENED
from ray_auditor.report.finding import EXIT_FAILED, INPUTS, exit_code_of
from ray_auditor.report.rule import rule_order
from ray_auditor.roster import Row
from ray_auditor.store import Unit

Flagged = tuple[str, str, str]  # candidate, suite, rule
CLEARING = "clearing"  # the part of an audit that says by what its candidate was cleared
STANDS = "conclusion"  # the fact that holds what the last conclusion was drawn from
# Parts of a store that a conclusion reads by key, which says what is in them, or not at all.
KEYED = {"shards", "residuals", "commits", "suites", "tmp"}


@dataclass(frozen=True)
class History:
    """The ledger's view of tonight's rows.

    Args:
        ledger: As the last sweep left it.
        base_unit: Tonight's inputs.
        rows: Tonight's candidates.
    """

    ledger: Ledger
    base_unit: Unit
    rows: Sequence[Row]

    @property
    def parts(self) -> dict[str, str]:
        """The inputs besides a candidate, under the names that `explain` uses."""
        unit = self.base_unit
        return {
            "base": unit.base_key,
            "sae": f"{unit.sae_key} {unit.hook_name}",
            "suites": unit.suites_key,
            "settings": f"{unit.k} {unit.engine_class}",
        }

    def whys(self, contents: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
        """By candidate, why it is where it is tonight; `explain` has the words.

        Args:
            contents: What may identify the weights of rows that have no unit yet, as far as it is known.
        """
        audits, parts = self.ledger.audits(), self.parts
        whys = {}
        for row in self.rows:
            before, known = audits.get(row.id), (contents or {}).get(row.id, ())
            same = before.content if before and before.content in known else None
            whys[row.id] = explain(before, content_of(row) or same, parts)
        return whys

    def new(self, flagged: Sequence[Flagged]) -> set[tuple[str, str]]:
        """Of flagged, (candidate, suite) never reported of these weights and inputs by a rule as sure."""
        ranks = self.ledger.reported()
        return {
            (one.candidate, one.suite)
            for one, rank in self._reported(flagged)
            if one not in ranks or rank < ranks[one]
        }

    def conclude(
        self, statuses: Mapping[str, str], flagged: Sequence[Flagged], clearing: str | None = None
    ) -> None:
        """Make tonight the last sweep.

        Args:
            statuses: By candidate.
            flagged: What was reported; nothing where the exit code could not say so.
            clearing: By what candidates were cleared, see `clearing_of`.
        """
        parts = dict.fromkeys(statuses.values(), self.parts)
        if clearing is not None and SCREENED in parts:
            parts[SCREENED] = parts[SCREENED] | {CLEARING: clearing}
        audits = {
            row.id: Audit(content_of(row), statuses[row.id], parts[statuses[row.id]]) for row in self.rows
        }
        self.ledger.conclude(audits, self._reported(flagged))

    def _reported(self, flagged: Sequence[Flagged]) -> list[tuple[Reported, int]]:
        """What a report says of weights under these inputs, with how sure its rule is, the surest 0."""
        contents = {row.id: content_of(row) or "" for row in self.rows}
        inputs = json.dumps([getattr(self.base_unit, name) for name in INPUTS])
        return [
            (Reported(candidate, suite, contents[candidate], inputs), rule_order(rule))
            for candidate, suite, rule in flagged
        ]


def clearing_of(suites_key: str, clear_below: float, nulls: Iterable[str]) -> str:
    """What decides, besides the inputs, whom a first stage clears.

    Args:
        suites_key: Of the first stage.
        clear_below: The score.
        nulls: Contents of the null members.
    """
    return hashlib.sha256(json.dumps([suites_key, clear_below, sorted(nulls)]).encode()).hexdigest()


def content_of(row: Row) -> str | None:
    """What identifies a row's weights; None when they were refused."""
    return row.unit.candidate_key if row.unit else None


@dataclass(frozen=True)
class Conclusion:
    """Whether the last conclusion is still the one that would be drawn.

    Args:
        ledger: Where what it was drawn from is kept.
        config: Tonight's settings.
        rows: All of tonight's rows.
        root: The store's.
    """

    ledger: Ledger
    config: AuditConfig
    rows: Sequence[Row]
    root: Path

    def stands(self) -> bool:
        """Whether rows, settings, program and outputs are what they were."""
        return self.ledger.fact(STANDS) == self._stamp()

    def keep(self) -> None:
        """Remember what the conclusion that was just written was drawn from."""
        self.ledger.keep_fact(STANDS, self._stamp())

    def repeat(self, whys: Mapping[str, str]) -> int:
        """Say that nothing is new: where that changes no word of it, in the summary alone.

        Returns:
            The exit code.
        """
        out_dir = Path(self.config.out_dir)
        summary: dict[str, Any] = json.loads((out_dir / "summary.json").read_bytes())
        before = _said(summary)
        for candidate in summary["candidates"]:
            candidate["why"] = whys[candidate["id"]]
        if summary["exit_code"] != EXIT_FAILED:  # which says nothing of findings: they are new until one does
            for finding in (*summary["flags"], *(row for row in summary["candidates"] if "new" in row)):
                finding["new"] = False
        mark_acknowledged(summary, read_acknowledgements(out_dir))
        summary["exit_code"] = exit_code_of(summary)
        summary["generated_at"] = datetime.now(UTC).isoformat(timespec="seconds")
        if _said(summary) == before:
            put_file(
                out_dir / "summary.json", to_json(summary).encode(), temp=self.root / "tmp", replace=True
            )
        else:
            write_outputs(summary, out_dir)
        self.keep()
        return int(summary["exit_code"])

    def _stamp(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            unit = row.unit.key if row.unit else None
            said = [row.id, row.role, row.kind, row.status, row.reason, unit, row.notes, row.declared_base]
            digest.update(json.dumps(said).encode())
        digest.update(json.dumps(sorted(self.ledger.refusals().items())).encode())
        digest.update(json.dumps(asdict(self.config), sort_keys=True).encode())
        others = (
            path
            for part in sorted(self.root.iterdir())
            if part.is_dir() and part.name not in KEYED
            for path in sorted(part.rglob("*"))
        )
        program = sorted(Path(__file__).parent.rglob("*.py"))
        outputs = [Path(self.config.out_dir) / name for name in OUTPUTS]
        digest.update(_looks([*others, *program, *outputs]))
        return digest.hexdigest()


def _said(summary: dict[str, Any]) -> list[Any]:
    """What a summary says anew each night, but for its date."""
    names = ("why", "new", "acknowledged", "reopened")
    rows = (*summary["candidates"], *summary["flags"])
    return [summary["exit_code"], *([row.get(name) for name in names] for row in rows)]


def _looks(paths: Iterable[Path]) -> bytes:
    """How files look from outside; one that is not there looks like none that is."""
    looks = []
    for path in paths:
        status = path.stat() if path.exists() else None
        looks.append([path.name, status and (status.st_size, status.st_mtime_ns, status.st_ino)])
    return json.dumps(looks).encode()
