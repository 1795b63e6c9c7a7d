"""Findings that somebody has looked at: who, why, until when; and what opens such a finding again."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from ray_auditor.durable_file import append_lines
from ray_auditor.report.finding import INPUTS, Finding, list_findings
from ray_auditor.report.rule import rule_order

FILE = "acknowledgements.jsonl"
MAX_CHARS = 2000


@dataclass(frozen=True)
class Acknowledgement:
    """One finding looked at: of these weights, under this name, on this suite, by a rule no surer than this.

    Attributes:
        candidate: Its id.
        content: sha256 of its weights.
        suite: None for a misfit.
        rule: The flag's.
        who: In their own words.
        why: The same.
        until: The last day, UTC, as `YYYY-MM-DD`.
        at: When it was made, UTC.
        inputs: Base, SAE, hook, suites and k of the sweep, under their names in its settings; empty in a line
            that does not have them, which holds for no sweep.
    """

    candidate: str
    content: str
    suite: str | None
    rule: str
    who: str
    why: str
    until: str
    at: str
    inputs: Mapping[str, Any] = field(default_factory=dict)


def acknowledge(
    finding: Finding, inputs: Mapping[str, Any], *, who: str | None, why: str | None, until: str | None
) -> Acknowledgement:
    """Say that a finding was looked at.

    Args:
        finding: Of a sweep that recorded its weights.
        inputs: Of the sweep; see `inputs_of`.
        who: Name or address.
        why: What was found out.
        until: The last day it counts, `YYYY-MM-DD`; a day that has passed opens the finding at once.

    Raises:
        ValueError: One of them is missing, too long, no UTF-8 or no date, or the weights are not recorded.
    """
    for name, text in (("who", who), ("why", why), ("until", until)):
        if not text or not text.strip() or len(text) > MAX_CHARS:
            bound = f"given, in at most {MAX_CHARS} characters"
            raise ValueError(f"ack.{name} must be {bound}, got {text and text[:40]!r}; add ack.{name}=...")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"ack.{name} must be UTF-8, got {text[:40]!r}; type it in a UTF-8 terminal"
            ) from error
    assert who is not None
    assert why is not None
    assert until is not None
    try:
        last = date.fromisoformat(until).isoformat()
    except ValueError as error:
        raise ValueError(f"ack.until must be a day such as 2027-01-31, got {until!r}; correct it") from error
    if finding.content is None:
        raise ValueError(
            f"out_dir must hold a sweep that recorded weights, got none of {finding.candidate!r}; sweep again"
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Acknowledgement(
        finding.candidate, finding.content, finding.suite, finding.rule, who, why, last, now, dict(inputs)
    )


def inputs_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a sweep's numbers follow from besides the candidates."""
    settings = summary.get("settings") or {}
    return {name: settings.get(name) for name in INPUTS}


def append_acknowledgements(out_dir: Path, given: Iterable[Acknowledgement]) -> None:
    """Add to the file of `out_dir`, which is never rewritten."""
    lines = "".join(json.dumps(asdict(one), sort_keys=True) + "\n" for one in given)
    append_lines(out_dir / FILE, lines.encode())


def read_acknowledgements(out_dir: Path) -> list[Acknowledgement]:
    """What was acknowledged, oldest first; a line that a killed writer left unfinished is no line.

    Raises:
        ValueError: A line is not one of ours.
    """
    path = out_dir / FILE
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    names = {one.name for one in fields(Acknowledgement)}
    found = []
    for number, line in enumerate(lines, 1):
        try:
            values = {"inputs": {}} | json.loads(line)
            if values.keys() != names or not all(
                isinstance(value, dict if name == "inputs" else str) or (name == "suite" and value is None)
                for name, value in values.items()
            ):
                raise ValueError("it has other fields")
            date.fromisoformat(values["until"])
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} must be an acknowledgement of ours ({error}); remove the line"
            ) from error
        found.append(Acknowledgement(**values))
    return found


def mark_acknowledged(
    summary: dict[str, Any], given: Sequence[Acknowledgement], today: date | None = None
) -> None:
    """Say of every finding of a summary whether it is acknowledged, or why it no longer is.

    A flag, and the row of a misfit, gets `acknowledged` (`who`, `why`, `until`, `at`, or None) and
    `reopened`: None, or why the latest acknowledgement does not hold: `changed weights`, `other inputs`,
    `surer rule`, `expired`.

    Args:
        summary: Changed in place.
        given: Oldest first.
        today: UTC; now by default.
    """
    today = today or datetime.now(UTC).date()
    by_name: dict[tuple[str, str | None], list[Acknowledgement]] = {}
    for one in given:
        by_name.setdefault((one.candidate, one.suite), []).append(one)
    rows = {row["id"]: row for row in summary["candidates"]}
    flags, inputs = iter(summary["flags"]), inputs_of(summary)
    for finding in list_findings(summary):
        where = rows[finding.candidate] if finding.suite is None else next(flags)
        where |= _state(finding, by_name.get((finding.candidate, finding.suite), []), inputs, today)


def _state(
    finding: Finding, given: Sequence[Acknowledgement], inputs: Mapping[str, Any], today: date
) -> Mapping[str, Any]:
    if not given:
        return {"acknowledged": None, "reopened": None}
    of_content = [one for one in given if one.content == finding.content]
    if not of_content:
        return {"acknowledged": None, "reopened": "changed weights"}
    of_inputs = [one for one in of_content if one.inputs == inputs]
    if not of_inputs:
        return {"acknowledged": None, "reopened": "other inputs"}
    latest = of_inputs[-1]
    if rule_order(finding.rule) < rule_order(latest.rule):
        return {"acknowledged": None, "reopened": "surer rule"}
    if date.fromisoformat(latest.until) < today:
        return {"acknowledged": None, "reopened": "expired"}
    said = {name: getattr(latest, name) for name in ("who", "why", "until", "at")}
    return {"acknowledged": said, "reopened": None}
