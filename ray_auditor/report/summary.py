"""The summary of a sweep as typed values; with `candidate.py` the place that knows the keys of its file."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ray_auditor.report.candidate import (
    MISFIT,
    STATUSES,
    Candidate,
    Feature,
    Flag,
    read_candidate,
    read_features,
    read_flag,
    read_number,
)
from ray_auditor.report.label import Label, read_labels
from ray_auditor.report.rule import rule_order


@dataclass(frozen=True)
class Gate:
    """How well the SAE fits the base, and the bounds it was held to; None where not recorded."""

    fvu: float | None
    l0: float | None
    max_fvu: float | None
    min_l0: float | None
    max_l0: float | None
    source: str | None


@dataclass(frozen=True)
class Variant:
    """The base against itself in one other way; `reason` says why it was not measured.

    `is_floor`: it ran with the sweep's own engine settings, so that its shifts count as noise floor.
    """

    name: str
    what: str
    is_floor: bool
    reason: str | None
    shift: Mapping[str, float | None]

    @property
    def ends(self) -> tuple[float, float] | None:
        """Smallest and largest mean shift of a suite."""
        known = [value for value in self.shift.values() if value is not None]
        return (min(known), max(known)) if known else None


@dataclass(frozen=True)
class Summary:
    """A whole sweep; `candidates` are audited ones by falling score, then the others by status and reason.

    `null_scores` are what finetunes known to be benign score under fits that did not see them, `num_null` is
    how many were listed; `variants` is None where the base was not calibrated.
    """

    candidates: tuple[Candidate, ...]
    flags: tuple[Flag, ...]
    null_scores: Mapping[str, float]
    num_null: int
    noise_floor: Mapping[str, float | None]
    variants: tuple[Variant, ...] | None
    calibrated_at: str
    gate: Gate | None
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    limits: tuple[str, ...]
    details: Mapping[str, Mapping[str, tuple[Feature, ...]]]
    labels: Mapping[int, Label]
    generated_at: str

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Candidates by status, every status present."""
        seen = Counter(candidate.status for candidate in self.candidates)
        return {status: seen[status] for status in STATUSES}

    @cached_property
    def audited(self) -> tuple[Candidate, ...]:
        """Candidates with a result, highest score first."""
        return tuple(candidate for candidate in self.candidates if candidate.audited)

    @cached_property
    def not_audited(self) -> tuple[Candidate, ...]:
        """Candidates without a result; they never count as clean."""
        return tuple(candidate for candidate in self.candidates if not candidate.audited)

    @cached_property
    def misfits(self) -> tuple[Candidate, ...]:
        """Candidates that the SAE does not fit."""
        return tuple(candidate for candidate in self.candidates if candidate.status == MISFIT)

    @cached_property
    def by_id(self) -> Mapping[str, Candidate]:
        """Candidates by their id."""
        return {candidate.id: candidate for candidate in self.candidates}

    @cached_property
    def detailed(self) -> tuple[Candidate, ...]:
        """Candidates that have a section of their own, in the order of their flags."""
        names = dict.fromkeys([*(flag.candidate for flag in self.flags), *self.details])
        return tuple(row for name in names if (row := self.by_id.get(name)) and row.audited)

    @cached_property
    def flagged_cells(self) -> frozenset[tuple[str, str]]:
        """The (candidate, suite) pairs that carry a flag."""
        return frozenset((flag.candidate, flag.suite) for flag in self.flags)

    @property
    def general(self) -> str:
        """Name of the general suite."""
        return str(self.setting("general", "general_suite", "suites.general") or "general")

    @cached_property
    def suites(self) -> tuple[str, ...]:
        """Every suite measured on anything, the general one left out, by name."""
        names = {name for candidate in self.candidates for name in candidate.suites} | set(self.noise_floor)
        return tuple(sorted(names - {self.general}))

    @cached_property
    def has_z(self) -> bool:
        """Whether any candidate had finetunes enough to be held to."""
        return any(rate.z is not None for row in self.candidates for rate in row.suites.values())

    @cached_property
    def has_p(self) -> bool:
        """Whether any candidate was held to a null population."""
        return any(row.p is not None for row in self.candidates)

    @property
    def k(self) -> int | None:
        """Features kept per token, where the settings say so."""
        found = self.setting("k", "sae.k")
        return found if isinstance(found, int) else None

    @property
    def base(self) -> str:
        """Short name of the base model."""
        found = self.setting("base.model", "base")
        return (str(found).rstrip("/").rsplit("/", 1)[-1] if found else "") or "the base model"

    def setting(self, *paths: str) -> Any:
        """The first setting that is present under one of the dotted paths, or None."""
        for path in paths:
            found: Any = self.settings
            for part in path.split("."):
                found = found.get(part) if isinstance(found, Mapping) else None
            if found is not None:
                return found
        return None


def _order(candidate: Candidate) -> tuple[bool, float, int, str, str]:
    score = -math.inf if candidate.score is None else candidate.score
    return (
        not candidate.audited,
        -score,
        STATUSES.index(candidate.status),
        candidate.reason or "",
        candidate.id,
    )


def _flag_order(flag: Flag) -> tuple[int, str, float, str, str]:
    return (rule_order(flag.rule), flag.rule, -(flag.score or 0.0), flag.candidate, flag.suite)


def _gate(row: Mapping[str, Any] | None) -> Gate | None:
    if row is None:
        return None
    bounds = row.get("bounds") or {}
    where = "sae_gate.bounds"
    return Gate(
        fvu=read_number(row, "fvu", "sae_gate"),
        l0=read_number(row, "l0", "sae_gate"),
        max_fvu=read_number(bounds, "max_fvu", where),
        min_l0=read_number(bounds, "min_l0", where),
        max_l0=read_number(bounds, "max_l0", where),
        source=bounds.get("source"),
    )


def _variant(row: Mapping[str, Any]) -> Variant:
    where = f"calibration.variants[{row['name']!r}]"
    shift = row.get("shift") or {}
    return Variant(
        name=str(row["name"]),
        what=str(row.get("what") or ""),
        is_floor=bool(row.get("same_engine_class")),
        reason=row.get("reason"),
        shift={suite: read_number(shift, suite, f"{where}.shift") for suite in shift},
    )


def _null_scores(row: Mapping[str, Any]) -> dict[str, float]:
    scores = row.get("scores") or {}
    found = {name: read_number(scores, name, "null.scores") for name in scores}
    return {name: score for name, score in found.items() if score is not None}


def _check(summary: Summary, counts: Mapping[str, int]) -> None:
    rows = summary.candidates
    if len(summary.by_id) != len(rows):
        raise ValueError(f"candidates must have distinct ids, got {len(summary.by_id)} in {len(rows)} rows")
    with_status = {row.id for row in rows if row.status == "flagged"}
    for name in with_status ^ {flag.candidate for flag in summary.flags}:
        raise ValueError(f"flags and candidates disagree on {name!r}; flag exactly those with status flagged")
    for status, count in counts.items():
        found = summary.counts.get(status, 0)
        if count != found:
            raise ValueError(
                f"counts.{status} is {count} but {found} candidates have it; count every candidate"
            )
    if summary.has_p and not summary.null_scores:
        raise ValueError("candidates have a p but null.scores is empty; write what they were held to")


def read_summary(raw: Mapping[str, Any]) -> Summary:
    """Check a summary and give it types.

    Args:
        raw: The content of `summary.json`. `candidates` is required; `details` (features that moved, per
            candidate and suite) and every other key may be missing.

    Returns:
        The typed summary, candidates in the order of the report.

    Raises:
        ValueError: A status is unknown, a number is not finite, an id is listed twice, flags and statuses
            disagree, or `counts` and the rows do: a report must not hide a lost candidate.
    """
    noise_floor = raw.get("noise_floor") or {}
    details = raw.get("details") or {}
    null = raw.get("null") or {}
    calibration = raw.get("calibration")
    summary = Summary(
        candidates=tuple(sorted((read_candidate(row) for row in raw["candidates"]), key=_order)),
        flags=tuple(sorted(map(read_flag, raw.get("flags", ())), key=_flag_order)),
        null_scores=_null_scores(null),
        num_null=int(null.get("num_listed") or 0),
        noise_floor={name: read_number(noise_floor, name, "noise_floor") for name in noise_floor},
        variants=None if calibration is None else tuple(map(_variant, calibration["variants"])),
        calibrated_at=str((calibration or {}).get("generated_at") or ""),
        gate=_gate(raw.get("sae_gate")),
        settings=raw.get("settings") or {},
        versions=raw.get("versions") or {},
        limits=tuple(str(limit) for limit in raw.get("limits", ())),
        details={name: read_features(suites, f"details[{name!r}]") for name, suites in details.items()},
        labels=read_labels(raw.get("labels") or {}),
        generated_at=str(raw.get("generated_at") or ""),
    )
    _check(summary, raw.get("counts") or {})
    return summary
