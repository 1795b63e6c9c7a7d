"""Findings as SARIF 2.1.0, the form that code-scanning dashboards read."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray_auditor.report.candidate import NOT_AUDITED
from ray_auditor.report.finding import FAILED, KINDS, Finding, list_findings
from ray_auditor.report.printable import printable

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
FINGERPRINT = "finding/v2"
NAME_CHARS = 200
# What SARIF gives a meaning in a plain text message: links in brackets, placeholders in braces.
LITERAL = str.maketrans({"\\": r"\\", "[": r"\[", "]": r"\]", "{": "{{", "}": "}}"})


def render_sarif(raw: Mapping[str, Any]) -> str:
    """A summary's findings as a SARIF log.

    One result a finding: its rule is the flag's, its location `summary.json` with candidate and suite as the
    logical one, its partial fingerprint made of name, weights, rule and suite. What is acknowledged is
    suppressed. What was not audited is one notification a status.

    Args:
        raw: The content of `summary.json`.
    """
    findings = list(list_findings(raw))
    kinds = [*KINDS, *sorted({finding.kind for finding in findings} - KINDS.keys())]
    settings = raw.get("settings") or {}
    run: dict[str, Any] = {
        "tool": {
            "driver": {
                "name": "ray-auditor",
                "version": str((raw.get("versions") or {}).get("ray-auditor", "unknown")),
                "rules": [_rule(kind) for kind in kinds],
            }
        },
        "invocations": [_invocation(raw)],
        "results": [_result(finding, kinds.index(finding.kind)) for finding in findings],
        "columnKind": "unicodeCodePoints",
        "properties": {
            name: settings[name]
            for name in ("base_key", "sae_key", "suites_key", "hook_name", "k")
            if name in settings
        },
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1, allow_nan=False)


def _literal(text: str, max_chars: int = NAME_CHARS) -> str:
    return printable(text, max_chars).translate(LITERAL)


def _rule(kind: str) -> dict[str, Any]:
    level, words = KINDS.get(kind, ("warning", "A rule of another release"))
    return {
        "id": printable(kind),
        "shortDescription": {"text": words},
        "defaultConfiguration": {"level": level},
    }


def _invocation(raw: Mapping[str, Any]) -> dict[str, Any]:
    counts = Counter(row["status"] for row in raw["candidates"])
    return {
        "executionSuccessful": not any(counts[status] for status in FAILED),
        **({"exitCode": raw["exit_code"]} if "exit_code" in raw else {}),
        "toolExecutionNotifications": [
            {
                "descriptor": {"id": f"not-audited/{status}"},
                "level": "error" if status in FAILED else "note",
                "message": {"text": f"{counts[status]} candidates were not audited: {status}"},
            }
            for status in NOT_AUDITED
            if counts[status]
        ],
    }


def _result(finding: Finding, rule_index: int) -> dict[str, Any]:
    where = "" if finding.suite is None else f" on {_literal(finding.suite)}"
    what = where if finding.measure is None else f"{where} ({finding.measure})"
    name, suite = printable(finding.candidate), printable(finding.suite or "")
    result: dict[str, Any] = {
        "ruleId": printable(finding.kind),
        "ruleIndex": rule_index,
        "kind": "fail",
        "level": KINDS.get(finding.kind, ("warning",))[0],
        "message": {"text": f"{_literal(finding.candidate)}{what}: {_literal(finding.words, 1000)}"},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": "summary.json"}},
                "logicalLocations": [
                    {"name": name, "fullyQualifiedName": f"{name}/{suite}" if suite else name}
                ],
            }
        ],
        "partialFingerprints": {FINGERPRINT: finding.fingerprint},
        "suppressions": [],
    }
    if finding.new is not None:
        result["baselineState"] = "new" if finding.new else "unchanged"
    if finding.acknowledged is not None:
        said = finding.acknowledged
        words = f"{said['why']} (acknowledged by {said['who']} until {said['until']})"
        result["suppressions"] = [
            {"kind": "external", "status": "accepted", "justification": printable(words, 1000)}
        ]
    if finding.content is not None:
        result["properties"] = {"content_sha256": finding.content}
    return result
