"""One candidate of a sweep's summary as typed values, and how they are read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any, Literal

from ray_auditor.report.number import percent, signed

MISFIT = "sae_misfit"
SCREENED: Literal["screened"] = "screened"  # ran on some of the prompts only, and scored low there
AUDITED = ("flagged", "ok")
NOT_AUDITED = (MISFIT, SCREENED, "rejected", "skipped", "failed", "deferred")
STATUSES = AUDITED + NOT_AUDITED


@dataclass(frozen=True, slots=True)
class SuiteRate:
    """One candidate on one suite; means are per token, None is undetermined.

    Where the SAE does not fit the candidate only `tokens`, `fvu` and `base_fvu` are known.
    """

    tokens: int
    overlap: float | None = None
    shift: float | None = None
    difference_rate: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    z: float | None = None
    miss_z: float | None = None
    cosine: float | None = None
    change: float | None = None
    fvu: float | None = None
    base_fvu: float | None = None


Side = tuple[tuple[int, float], ...]  # (feature, activation) of one token, largest activation first


@dataclass(frozen=True)
class Example:
    """A stretch of a prompt; `overlaps` counts kept features shared with the base, None where not scored.

    `base_side` and `candidate_side` are what each keeps at the focus; empty where that was not recorded.
    """

    prompt: str
    tokens: tuple[str, ...]
    overlaps: tuple[int | None, ...]
    focus: int | None
    base_side: Side = ()
    candidate_side: Side = ()


@dataclass(frozen=True)
class Feature:
    """One feature that moved; `rate` is the share of tokens that keep it, `mean_act` its mean there."""

    feature: int
    rate_base: float | None
    rate_candidate: float | None
    delta: float | None
    general_delta: float | None
    mean_act_base: float | None
    mean_act_candidate: float | None
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One listed candidate, audited or not.

    `suite` is where it strays most, `joint_p` is of all suites together; `why` says what is new about it
    since the last sweep, `proof` how its weights were shown to be the ones that ran. `relative_change`,
    `spectral_share` and `mean_difference` (by suite) are what looks without an SAE say.
    """

    id: str
    kind: str | None
    status: str
    reason: str | None
    score: float | None
    score_low: float | None
    suite: str | None
    p: float | None
    q: float | None
    joint_p: float | None
    why: str | None
    proof: str | None
    relative_change: float | None
    spectral_share: float | None
    mean_difference: Mapping[str, float | None]
    suites: Mapping[str, SuiteRate]
    acknowledged: Mapping[str, str] | None = None  # of a misfit, as in a flag
    reopened: str | None = None

    @property
    def audited(self) -> bool:
        """Whether a result stands behind this row."""
        return self.status in AUDITED

    @property
    def change(self) -> float | None:
        """Mean over suites of the residual's relative change."""
        return _mean([one.change for one in self.suites.values()])

    @property
    def cosine(self) -> float | None:
        """Mean over suites of the residual's cosine with the base's."""
        return _mean([one.cosine for one in self.suites.values()])


@dataclass(frozen=True)
class Flag:
    """A candidate that stands out, the suite where it does, and the rule that said so.

    `score` is a difference rate under a `seed_rate` rule, where there are too few finetunes to be held to.
    `new`: no earlier sweep reported it for these weights; None where that was not recorded.
    """

    candidate: str
    suite: str
    score: float | None
    rule: str
    new: bool | None
    acknowledged: Mapping[str, str] | None = None  # who, why, until, at
    reopened: str | None = None  # why the latest acknowledgement does not hold

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
        """The score with its name, such as `score +9.2`."""
        return f"{'rate' if self.by_rate else 'score'} {self.score_text}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def read_number(row: Mapping[str, Any], key: str, where: str) -> float | None:
    """A finite number or None.

    Raises:
        ValueError: It is neither; a NaN that reaches the report is a fault upstream and is named.
    """
    value = row.get(key)
    if value is None or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}.{key} must be a finite number or null, got {value!r}; write null")
    return float(value)


RATE_KEYS = tuple(field.name for field in fields(SuiteRate) if field.name != "tokens")


def _rate(row: Mapping[str, Any], where: str) -> SuiteRate:
    return SuiteRate(int(row.get("tokens") or 0), *[read_number(row, key, where) for key in RATE_KEYS])


def read_candidate(row: Mapping[str, Any]) -> Candidate:
    """One of `candidates`.

    Raises:
        ValueError: Its status is unknown, or a number is not finite.
    """
    where = f"candidates[{row['id']!r}]"
    if row["status"] not in STATUSES:
        raise ValueError(f"{where}.status must be one of {', '.join(STATUSES)}, got {row['status']!r}")
    rivals = row.get("rivals") or {}
    differences = rivals.get("mean_difference") or {}
    return Candidate(
        id=str(row["id"]),
        kind=row.get("kind"),
        status=row["status"],
        reason=row.get("reason"),
        score=read_number(row, "score", where),
        score_low=read_number(row, "score_low", where),
        suite=row.get("suite"),
        p=read_number(row, "p", where),
        q=read_number(row, "q", where),
        joint_p=read_number(row, "joint_p", where),
        why=row.get("why"),
        proof=row.get("proof"),
        relative_change=read_number(rivals, "relative_change", f"{where}.rivals"),
        spectral_share=read_number(rivals, "spectral_share", f"{where}.rivals"),
        mean_difference={
            name: read_number(differences, name, f"{where}.rivals.mean_difference") for name in differences
        },
        suites={
            name: _rate(rate, f"{where}.suites[{name!r}]") for name, rate in (row.get("suites") or {}).items()
        },
        acknowledged=row.get("acknowledged"),
        reopened=row.get("reopened"),
    )


def read_flag(row: Mapping[str, Any]) -> Flag:
    """One of `flags`.

    Raises:
        ValueError: Its score is not finite.
    """
    score = read_number(row, "score", "flags")
    said, reopened = row.get("acknowledged"), row.get("reopened")
    return Flag(row["candidate"], row["suite"], score, row.get("rule") or "", row.get("new"), said, reopened)


def read_features(suites: Mapping[str, Any], where: str) -> Mapping[str, tuple[Feature, ...]]:
    """The features of one candidate that moved, by suite.

    Raises:
        ValueError: A number is not finite, or an example has other overlaps than tokens.
    """
    return {
        suite: tuple(_feature(row, f"{where}[{suite!r}]") for row in cell.get("features", ()))
        for suite, cell in suites.items()
    }


def _feature(row: Mapping[str, Any], where: str) -> Feature:
    return Feature(
        feature=int(row["feature"]),
        rate_base=read_number(row, "rate_base", where),
        rate_candidate=read_number(row, "rate_candidate", where),
        delta=read_number(row, "delta", where),
        general_delta=read_number(row, "general_delta", where),
        mean_act_base=read_number(row, "mean_act_base", where),
        mean_act_candidate=read_number(row, "mean_act_candidate", where),
        examples=tuple(_example(one, where) for one in row.get("examples", ())),
    )


def _example(row: Mapping[str, Any], where: str) -> Example:
    overlaps = tuple(None if one is None or one < 0 else int(one) for one in row["overlaps"])
    tokens = tuple(str(token) for token in row["tokens"])
    if len(tokens) != len(overlaps):
        raise ValueError(
            f"{where}: an example has {len(tokens)} tokens, {len(overlaps)} overlaps; match them"
        )
    sides = row.get("sides") or {}
    base, candidate = (_side(sides.get(name, ()), where) for name in ("base", "candidate"))
    return Example(str(row["prompt"]), tokens, overlaps, row.get("focus"), base, candidate)


def _side(rows: Iterable[Sequence[Any]], where: str) -> Side:
    return tuple(
        (int(feature), read_number({"act": act}, "act", f"{where}: sides") or 0.0) for feature, act in rows
    )
