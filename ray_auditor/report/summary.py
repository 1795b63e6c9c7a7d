"""The summary of a sweep as typed values: the one place here that knows the keys of `summary.json`."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ray_auditor.report.number import percent, signed

AUDITED = ("flagged", "ok")
NOT_AUDITED = ("sae_misfit", "rejected", "skipped", "failed", "deferred")
STATUSES = AUDITED + NOT_AUDITED


@dataclass(frozen=True)
class SuiteRate:
    """One candidate on one suite; `overlap` and `shift` are means per token, None is undetermined."""

    tokens: int
    overlap: float | None
    shift: float | None
    difference_rate: float | None
    ci_low: float | None
    ci_high: float | None
    z: float | None


@dataclass(frozen=True)
class Example:
    """A stretch of a prompt; `overlaps` counts kept features shared with the base, None where not scored."""

    prompt: str
    tokens: tuple[str, ...]
    overlaps: tuple[int | None, ...]
    focus: int | None


@dataclass(frozen=True)
class Feature:
    """One feature that moved; `rate` is the share of tokens that keep it, `mean_act` its mean there."""

    feature: int
    rate_base: float | None
    rate_candidate: float | None
    delta: float | None
    mean_act_base: float | None
    mean_act_candidate: float | None
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Candidate:
    """One listed candidate, audited or not."""

    id: str
    kind: str | None
    status: str
    reason: str | None
    score: float | None
    suites: Mapping[str, SuiteRate]

    @property
    def audited(self) -> bool:
        """Whether a result stands behind this row."""
        return self.status in AUDITED


@dataclass(frozen=True)
class Flag:
    """A candidate that stands out on a suite (None: over all suites), and the rule that said so.

    `score` is a difference rate under a `seed_rate` rule, where there are too few peers, and a robust z else.
    """

    candidate: str
    suite: str | None
    score: float | None
    rule: str

    @property
    def by_rate(self) -> bool:
        """Whether `score` is a difference rate."""
        return self.rule.startswith("seed_rate")

    @property
    def score_text(self) -> str:
        """The score in its own unit."""
        return percent(self.score) if self.by_rate else signed(self.score)

    @property
    def measure(self) -> str:
        """The score with its name, such as `z +9.2`."""
        return f"{'rate' if self.by_rate else 'z'} {self.score_text}"


@dataclass(frozen=True)
class Summary:
    """A whole sweep; `candidates` are audited ones by falling score, then the others by status and reason."""

    candidates: tuple[Candidate, ...]
    flags: tuple[Flag, ...]
    noise_floor: Mapping[str, float | None]
    sae_gate: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    limits: tuple[str, ...]
    details: Mapping[str, Mapping[str, tuple[Feature, ...]]]
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
    def by_id(self) -> Mapping[str, Candidate]:
        """Candidates by their id."""
        return {candidate.id: candidate for candidate in self.candidates}

    @cached_property
    def flagged_cells(self) -> frozenset[tuple[str, str | None]]:
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
        """Whether any candidate had peers enough for a robust z."""
        return any(rate.z is not None for row in self.candidates for rate in row.suites.values())

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


def _number(row: Mapping[str, Any], key: str, where: str) -> float | None:
    """A finite number or None; a NaN that reaches the report is a fault upstream and is named."""
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}.{key} must be a finite number or null, got {value!r}; write null")
    return float(value)


def _rate(row: Mapping[str, Any], where: str) -> SuiteRate:
    keys = ("overlap", "shift", "difference_rate", "ci_low", "ci_high", "z")
    return SuiteRate(int(row.get("tokens") or 0), *(_number(row, key, where) for key in keys))


def _example(row: Mapping[str, Any], where: str) -> Example:
    overlaps = tuple(None if one is None or one < 0 else int(one) for one in row["overlaps"])
    tokens = tuple(str(token) for token in row["tokens"])
    if len(tokens) != len(overlaps):
        raise ValueError(
            f"{where}: an example has {len(tokens)} tokens, {len(overlaps)} overlaps; match them"
        )
    return Example(str(row["prompt"]), tokens, overlaps, row.get("focus"))


def _feature(row: Mapping[str, Any], where: str) -> Feature:
    return Feature(
        feature=int(row["feature"]),
        rate_base=_number(row, "rate_base", where),
        rate_candidate=_number(row, "rate_candidate", where),
        delta=_number(row, "delta", where),
        mean_act_base=_number(row, "mean_act_base", where),
        mean_act_candidate=_number(row, "mean_act_candidate", where),
        examples=tuple(_example(one, where) for one in row.get("examples", ())),
    )


def _moved(suites: Mapping[str, Any], where: str) -> Mapping[str, tuple[Feature, ...]]:
    return {
        suite: tuple(_feature(row, f"{where}[{suite!r}]") for row in cell.get("features", ()))
        for suite, cell in suites.items()
    }


def _candidate(row: Mapping[str, Any]) -> Candidate:
    where = f"candidates[{row['id']!r}]"
    if row["status"] not in STATUSES:
        raise ValueError(f"{where}.status must be one of {', '.join(STATUSES)}, got {row['status']!r}")
    rates = row.get("suites") or {}
    return Candidate(
        id=str(row["id"]),
        kind=row.get("kind"),
        status=row["status"],
        reason=row.get("reason"),
        score=_number(row, "score", where),
        suites={name: _rate(rate, f"{where}.suites[{name!r}]") for name, rate in rates.items()},
    )


def _order(candidate: Candidate) -> tuple[bool, float, int, str, str]:
    score = -math.inf if candidate.score is None else candidate.score
    return (
        not candidate.audited,
        -score,
        STATUSES.index(candidate.status),
        candidate.reason or "",
        candidate.id,
    )


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
    flags = (
        Flag(row["candidate"], row.get("suite"), _number(row, "score", "flags"), row.get("rule") or "")
        for row in raw.get("flags", ())
    )
    details = raw.get("details") or {}
    summary = Summary(
        candidates=tuple(sorted((_candidate(row) for row in raw["candidates"]), key=_order)),
        flags=tuple(
            sorted(
                flags, key=lambda flag: (flag.rule, -(flag.score or 0.0), flag.candidate, flag.suite or "")
            )
        ),
        noise_floor={name: _number(noise_floor, name, "noise_floor") for name in noise_floor},
        sae_gate=raw.get("sae_gate") or {},
        settings=raw.get("settings") or {},
        versions=raw.get("versions") or {},
        limits=tuple(str(limit) for limit in raw.get("limits", ())),
        details={name: _moved(suites, f"details[{name!r}]") for name, suites in details.items()},
        generated_at=str(raw.get("generated_at") or ""),
    )
    _check(summary, raw.get("counts") or {})
    return summary
