"""Two finished sweeps side by side: which findings are new, gone or changed, and why."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from ray_auditor.report.candidate import AUDITED, MISFIT
from ray_auditor.report.finding import INPUTS, Finding, list_findings
from ray_auditor.report.number import signed
from ray_auditor.report.verbatim import NAME_CHARS, table_of, verbatim

COMPARED = (*AUDITED, MISFIT)  # statuses of candidates that ran
ROWS_SHOWN = 200
ACKNOWLEDGED = "acknowledged"


@dataclass(frozen=True)
class Change:
    """One finding in two sweeps.

    Attributes:
        candidate: Its id.
        suite: Where; None for a misfit.
        what: `new`, `gone` or `changed`.
        why: What is behind it, as far as the two summaries tell.
        before: `rule`, `score`, `acknowledged` in the first sweep, None where it was no finding.
        after: The same in the second.
    """

    candidate: str
    suite: str | None
    what: str
    why: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None


@dataclass(frozen=True)
class Comparison:
    """How the second of two sweeps differs from the first.

    Attributes:
        changes: New findings first, then changed ones, then gone ones.
        num_same: Findings that are in both and did not change.
        listed: Candidates that only the second lists.
        unlisted: Candidates that only the first lists.
        lost: Candidates that the first compared and the second lists without a result, with the reason.
        notes: What else differs and moves scores.
    """

    changes: tuple[Change, ...]
    num_same: int
    listed: tuple[str, ...]
    unlisted: tuple[str, ...]
    lost: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def alerts(self) -> bool:
        """Whether there is something to look at: a new or changed finding, or a result that was lost.

        That somebody looked at a finding is a change, and none to look at.
        """
        return bool(self.lost) or any(
            change.what == "new" or (change.what == "changed" and change.why != ACKNOWLEDGED)
            for change in self.changes
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self) | {"event": "diff"}


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compare two summaries, finding by finding.

    Args:
        before: The content of the first `summary.json`.
        after: That of the second.

    Raises:
        ValueError: Base, SAE, hook, suites or k differ, so that no number of one says anything of the other.
    """
    ours, theirs = before["settings"], after["settings"]
    differing = [
        f"{name} ({ours.get(name)} and {theirs.get(name)})"
        for name in INPUTS
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError(
            f"diff needs sweeps with the same base, SAE, hook, suites and k, got others in "
            f"{', '.join(differing)}; compare sweeps that share them"
        )
    rows = tuple({row["id"]: row for row in one["candidates"]} for one in (before, after))
    found = tuple({(one.candidate, one.suite): one for one in list_findings(raw)} for raw in (before, after))
    changes = [
        change
        for key in dict.fromkeys([*found[1], *found[0]])
        if (change := _change(found[0].get(key), found[1].get(key), *rows)) is not None
    ]
    order = ("new", "changed", "gone")
    return Comparison(
        changes=tuple(sorted(changes, key=lambda change: order.index(change.what))),
        num_same=len(found[0].keys() | found[1].keys()) - len(changes),
        listed=tuple(name for name in rows[1] if name not in rows[0]),
        unlisted=tuple(name for name in rows[0] if name not in rows[1]),
        lost={
            name: row.get("reason") or row["status"]
            for name, row in rows[1].items()
            if row["status"] not in COMPARED and rows[0].get(name, row)["status"] in COMPARED
        },
        notes=tuple(_notes(before, after)),
    )


def _change(
    before: Finding | None,
    after: Finding | None,
    rows_before: Mapping[str, Any],
    rows_after: Mapping[str, Any],
) -> Change | None:
    one = after or before
    assert one is not None
    ours, theirs = rows_before.get(one.candidate), rows_after.get(one.candidate)
    if before is None:
        what, why = "new", _why_not(ours, theirs, missing="the candidate was not listed", verb="was")
    elif after is None:
        what, why = "gone", _why_not(theirs, ours, missing="the candidate is no longer listed", verb="is")
    else:
        assert ours is not None
        assert theirs is not None
        what, why = "changed", "; ".join(_differences(before, after, ours, theirs))
        if not why:
            return None
    return Change(one.candidate, one.suite, what, why, _brief(before), _brief(after))


def _why_not(
    there: Mapping[str, Any] | None, here: Mapping[str, Any] | None, *, missing: str, verb: str
) -> str:
    """Why a finding that stands `here` does not stand `there`."""
    if there is None or here is None:
        return missing
    if there["status"] not in COMPARED:
        return f"it {verb} not audited: {there.get('reason') or there['status']}"
    if there.get("content_sha256") != here.get("content_sha256"):
        return "changed weights"
    return "the same weights, held to other finetunes or other bounds"


def _differences(
    before: Finding, after: Finding, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Iterator[str]:
    if before.content != after.content:
        yield "changed weights"
    if before.rule != after.rule:
        yield f"rule {before.rule} -> {after.rule}"
    if (before.acknowledged is None) != (after.acknowledged is None):
        yield ACKNOWLEDGED if after.acknowledged is not None else "no longer acknowledged"
    if before.rule == after.rule and before.score is not None and after.score is not None:
        floor_before, floor_after = ours.get("score_low"), theirs.get("score_low")
        if floor_before is not None and after.score < floor_before:
            yield "its score fell below the interval it had"
        if floor_after is not None and before.score < floor_after:
            yield "its score rose beyond the one it had, by more than its interval"


def _brief(finding: Finding | None) -> dict[str, Any] | None:
    if finding is None:
        return None
    return {"rule": finding.rule, "score": finding.score, "acknowledged": finding.acknowledged}


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    ours, theirs = before["settings"], after["settings"]
    if ours.get("engine_class") != theirs.get("engine_class"):
        yield "the engines differ, and with them the last bits of every activation"
    flag_before, flag_after = ours.get("flag") or {}, theirs.get("flag") or {}
    for name in ("level", "min_z", "min_rate"):
        if flag_before.get(name) != flag_after.get(name):
            yield f"flag.{name} is {flag_before.get(name)} in the first, {flag_after.get(name)} in the second"
    units = [(raw.get("null") or {}).get("units") or {} for raw in (before, after)]
    if set(units[0].values()) != set(units[1].values()):
        yield "candidates were held to other benign finetunes"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print what is new, changed and gone, then what moved besides findings."""
    counts = {
        what: sum(one.what == what for one in comparison.changes) for what in ("new", "changed", "gone")
    }
    words = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    console.print(Text(f"Findings: {words}, {comparison.num_same:,} as they were", style="bold"))
    if comparison.changes:
        table = table_of("", ("", "candidate", "suite", "why"), ("before", "after"))
        for change in comparison.changes[:ROWS_SHOWN]:
            scores = [signed(one["score"]) if one else "" for one in (change.before, change.after)]
            table.add_row(
                change.what,
                verbatim(change.candidate, max_chars=NAME_CHARS),
                verbatim(change.suite or MISFIT, max_chars=NAME_CHARS),
                verbatim(change.why, max_chars=300),
                *scores,
            )
        console.print(table)
        if len(comparison.changes) > ROWS_SHOWN:
            console.print(Text(f"{len(comparison.changes) - ROWS_SHOWN:,} more with diff.format=json", "dim"))
    console.print(
        Text(
            f"Candidates: {len(comparison.listed):,} newly listed, {len(comparison.unlisted):,} no longer, "
            f"{len(comparison.lost):,} lost their result"
        )
    )
    for name, reason in list(comparison.lost.items())[:ROWS_SHOWN]:
        console.print(verbatim(f"  not audited any more: {name}: {reason}", max_chars=400))
    for note in comparison.notes:
        console.print(verbatim(f"- {note}", "dim"))
