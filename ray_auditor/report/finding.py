"""A finding: what a sweep asks people to look at, as every output for machines names it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_auditor.report.candidate import MISFIT, SCREENED
from ray_auditor.report.number import percent, signed
from ray_auditor.report.rule import RULES, rule_words

EXIT_OK, EXIT_FINDINGS, EXIT_FAILED, EXIT_NOTHING = 0, 1, 2, 3
FAILED = ("failed", "deferred")  # statuses that a later sweep may mend
# The settings of a summary without which no number of one sweep says anything of another's.
INPUTS = ("base_key", "sae_key", "hook_name", "suites_key", "k")

KINDS = {
    "null_q": ("error", "Stands out from benign finetunes, at a false discovery rate"),
    "above_null": ("warning", "Scores above every benign finetune"),
    "robust_z": ("warning", "Stands out among its peers"),
    "seed_rate": ("note", "Differs from general text by more than a set rate"),
    MISFIT: ("warning", "Moved so far that the SAE no longer describes it"),
}


@dataclass(frozen=True)
class Finding:
    """One flag, or one candidate that the SAE does not fit.

    Attributes:
        candidate: Its id as listed.
        content: sha256 of its weights; None in summaries of a release that did not record it.
        suite: Where it stands out; None for a misfit.
        rule: As it stands in the flag, such as `seed_rate_15`; `sae_misfit` for a misfit.
        score: In the rule's own unit; None for a misfit.
        new: Whether no earlier sweep reported it for these weights; None where that was not recorded.
        acknowledged: `who`, `why`, `until`, `at` of the acknowledgement in force, or None.
        reopened: Why the latest acknowledgement does not hold, or None.
        words: The rule as a sentence without subject and full stop, or the misfit's reason.
    """

    candidate: str
    content: str | None
    suite: str | None
    rule: str
    score: float | None
    new: bool | None
    acknowledged: Mapping[str, str] | None
    reopened: str | None
    words: str

    @property
    def kind(self) -> str:
        """The rule without its settings: `seed_rate` of `seed_rate_15`."""
        return next((name for name in (*RULES, MISFIT) if self.rule.startswith(name)), self.rule)

    @property
    def measure(self) -> str | None:
        """What it is ranked by, in words; None for a misfit."""
        if self.score is None:
            return None
        return f"rate {percent(self.score)}" if self.kind == "seed_rate" else f"score {signed(self.score)}"

    @property
    def fingerprint(self) -> str:
        """sha256 over what was found in which weights under which name, whoever swept, wherever."""
        parts = json.dumps([self.candidate, self.content, self.kind, self.suite])
        return hashlib.sha256(parts.encode()).hexdigest()


def list_findings(raw: Mapping[str, Any]) -> Iterator[Finding]:
    """Every finding of a summary: its flags in their order, then its misfits in that of the candidates."""
    contents = {row["id"]: row.get("content_sha256") for row in raw["candidates"]}
    flag_settings = (raw.get("settings") or {}).get("flag") or {}
    num_null = len((raw.get("null") or {}).get("scores") or {})
    for flag in raw.get("flags", ()):
        rule = flag.get("rule") or ""
        words = rule_words(
            rule, num_null=num_null, level=flag_settings.get("level"), min_z=flag_settings.get("min_z")
        )
        yield Finding(
            candidate=flag["candidate"],
            content=contents[flag["candidate"]],
            suite=flag["suite"],
            rule=rule,
            score=flag.get("score"),
            new=flag.get("new"),
            acknowledged=flag.get("acknowledged"),
            reopened=flag.get("reopened"),
            words=words,
        )
    for row in raw["candidates"]:
        if row["status"] == MISFIT:
            yield Finding(
                candidate=row["id"],
                content=contents[row["id"]],
                suite=None,
                rule=MISFIT,
                score=None,
                new=row.get("new"),
                acknowledged=row.get("acknowledged"),
                reopened=row.get("reopened"),
                words=row.get("reason") or "the SAE does not fit it",
            )


def alerts(finding: Finding, raw: Mapping[str, Any]) -> bool:
    """Whether a finding makes the exit code 1.

    It is not acknowledged and, where `flag.only_new` says so, new, or open again: what somebody closed until
    something happened must be heard of when it happens.
    """
    only_new = ((raw.get("settings") or {}).get("flag") or {}).get("only_new", False)
    if finding.acknowledged is not None:
        return False
    return finding.reopened is not None or finding.new is not False or not only_new


def exit_code_of(raw: Mapping[str, Any]) -> int:
    """2 when some failed or were deferred, 1 when a finding alerts, 3 when nothing ran, else 0.

    Whom a first stage cleared did run, and nothing stood out there.
    """
    statuses = {row["status"] for row in raw["candidates"]}
    if not statuses.isdisjoint(FAILED):
        return EXIT_FAILED
    if any(alerts(finding, raw) for finding in list_findings(raw)):
        return EXIT_FINDINGS
    return EXIT_NOTHING if statuses.isdisjoint(("ok", "flagged", MISFIT, SCREENED)) else EXIT_OK
