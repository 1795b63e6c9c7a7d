"""A sweep as JUnit XML: one test case a candidate, red exactly where the exit code is not 0."""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as XML

from ray_auditor.report.candidate import AUDITED, MISFIT
from ray_auditor.report.finding import FAILED, Finding, alerts, list_findings
from ray_auditor.report.printable import printable
from ray_auditor.report.summary import read_summary

REASON_CHARS = 1000


def render_junit(raw: Mapping[str, Any]) -> bytes:
    """A summary as JUnit XML.

    A candidate with a finding that makes the exit code 1 is a failure; `failed` and `deferred`, which make
    it 2, are errors. Skipped are those that nothing is known of (`rejected`, `skipped`), and those whose
    findings are all acknowledged, or reported before where only new ones count.

    Args:
        raw: The content of `summary.json`.

    Raises:
        ValueError: The summary contradicts itself; see `read_summary`.
    """
    findings: dict[str, list[Finding]] = {}
    for finding in list_findings(raw):
        findings.setdefault(finding.candidate, []).append(finding)
    base = read_summary(raw).base
    suite = XML.Element("testsuite", name="ray-auditor")
    outcomes = {"failure": 0, "error": 0, "skipped": 0}
    for row in raw["candidates"]:
        case = XML.SubElement(suite, "testcase", classname=printable(base), name=printable(row["id"]))
        outcome, kind, words = _outcome(row, findings.get(row["id"], []), raw)
        if outcome is not None:
            outcomes[outcome] += 1
            XML.SubElement(case, outcome, type=printable(kind), message=printable(words, REASON_CHARS))
    suite.set("tests", str(len(raw["candidates"])))
    suite.set("failures", str(outcomes["failure"]))
    suite.set("errors", str(outcomes["error"]))
    suite.set("skipped", str(outcomes["skipped"]))
    suite.set("timestamp", printable(str(raw.get("generated_at") or "")))
    root = XML.Element("testsuites", name="ray-auditor")
    root.append(suite)
    XML.indent(root)
    data: bytes = XML.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _outcome(
    row: Mapping[str, Any], findings: list[Finding], raw: Mapping[str, Any]
) -> tuple[str | None, str, str]:
    """Element, type and message of a candidate; no element where it passed."""
    status, reason = row["status"], row.get("reason") or "no reason recorded"
    open_findings = [finding for finding in findings if alerts(finding, raw)]
    if open_findings:
        return "failure", open_findings[0].kind, "; ".join(map(_said, open_findings))
    if findings:
        return "skipped", findings[0].kind, "; ".join(map(_closed, findings))
    if status in FAILED:
        return "error", status, reason
    if status in (*AUDITED, MISFIT):
        return None, "", ""
    return "skipped", status, f"not audited: {reason}"


def _said(finding: Finding) -> str:
    where = "" if finding.suite is None else f"{finding.suite}, "
    measure = "" if finding.measure is None else f"{finding.measure}, "
    return f"{where}{measure}{finding.words}"


def _closed(finding: Finding) -> str:
    said = finding.acknowledged
    if said is None:
        return f"reported by an earlier sweep: {_said(finding)}"
    return f"acknowledged by {said['who']} until {said['until']}: {said['why']}; {_said(finding)}"
