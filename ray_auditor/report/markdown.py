"""A sweep in a few lines of Markdown, for a chat or a pull request."""

from collections.abc import Mapping
from typing import Any

from ray_auditor.report.finding import Finding, alerts, list_findings
from ray_auditor.report.headline import write_headline
from ray_auditor.report.printable import printable
from ray_auditor.report.summary import read_summary

SHOWN = 20
NAME_CHARS = 80
# Chats read some of these even within code: a mention, an entity, the end of the code, a table's cell.
LOOK_ALIKES = str.maketrans(
    {
        "`": "\N{MODIFIER LETTER GRAVE ACCENT}",
        "@": "\N{FULLWIDTH COMMERCIAL AT}",
        "<": "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}",
        ">": "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}",
        "|": "\N{BROKEN BAR}",
        "&": "\N{FULLWIDTH AMPERSAND}",
    }
)


def code(text: str, max_chars: int = NAME_CHARS) -> str:
    """A stranger's text as a code span in which nothing has a meaning to any renderer."""
    return f"`{printable(text, max_chars).translate(LOOK_ALIKES) or ' '}`"


def render_markdown(raw: Mapping[str, Any]) -> str:
    """A summary in a few lines: what stands out, what is new, what was not audited, the strongest findings.

    It holds no link, image, mention, HTML or table, whatever candidates and suites are called.

    Args:
        raw: The content of `summary.json`.

    Raises:
        ValueError: The summary contradicts itself; see `read_summary`.
    """
    summary = read_summary(raw)
    headline = write_headline(summary)
    findings = sorted(list_findings(raw), key=lambda one: (not alerts(one, raw), one.new is False))
    shown = findings[:SHOWN]
    num_acknowledged = sum(one.acknowledged is not None for one in findings)
    paragraphs = [f"**ray-auditor, {code(summary.base)}: {headline.opening}.**", headline.new]
    if num_acknowledged:
        paragraphs.append(f"Acknowledged: {num_acknowledged} of {len(findings)} findings.")
    paragraphs.append(f"Not audited: {headline.not_audited}")
    lines = [_line(one) for one in shown]
    if len(findings) > SHOWN:
        lines.append(f"- and {len(findings) - SHOWN} more, in `findings.parquet`")
    paragraphs.append("\n".join(lines))
    rules = {one.rule: one.words for one in shown if one.suite is not None}
    paragraphs += [f"{code(rule)}: {code(words, 300)}" for rule, words in rules.items()]
    paragraphs += [f"Limits: {code(limit, 1000)}" for limit in summary.limits[:1]]
    paragraphs.append("It ranks candidates for a closer look; it clears none. All of it is in `report.html`.")
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _line(finding: Finding) -> str:
    where = "" if finding.suite is None else f" on {code(finding.suite)}"
    measure = "" if finding.measure is None else f", {finding.measure}"
    why = f" ({code(finding.rule)}{', new' if finding.new else ''})"
    misfit = f": {code(finding.words, 300)}" if finding.suite is None else ""
    said = finding.acknowledged
    closed = "" if said is None else f"; acknowledged by {code(said['who'])} until {code(said['until'])}"
    return f"- {code(finding.candidate)}{where}{measure}{why}{misfit}{closed}"
