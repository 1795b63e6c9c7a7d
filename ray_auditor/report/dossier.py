"""One candidate on a terminal: suite by suite, beside cheaper looks, down to the tokens."""

import difflib
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from ray_auditor.report.candidate import MISFIT, Candidate, Example, Feature
from ray_auditor.report.number import (
    ABSENT,
    decimal,
    percent,
    percent_interval,
    probability,
    signed,
    significant,
)
from ray_auditor.report.printable import printable
from ray_auditor.report.ranks import Ranking
from ray_auditor.report.summary import Summary, read_summary
from ray_auditor.report.terminal import WIDE, words_of, z_text
from ray_auditor.report.verbatim import NAME_CHARS, table_of, verbatim

EXAMPLE_TOKENS = 40


def _rates(summary: Summary, row: Candidate, suites: list[str], console: Console) -> None:
    wide = console.width >= WIDE
    more = ("overlap", "change", "tokens") if wide else ()
    table = table_of("", ("suite",), ("z", "miss z", "shift", "rate", "interval", *more))
    for suite in suites:
        rate = row.suites[suite]
        further = (decimal(rate.overlap), significant(rate.change), f"{rate.tokens:,}") if wide else ()
        numbers: tuple[Text | str, ...] = (ABSENT,) * 4
        if suite != summary.general:  # which is what the others are held to
            interval = percent_interval(rate.ci_low, rate.ci_high)
            z = z_text(rate.z, (row.id, suite) in summary.flagged_cells)
            numbers = (z, z_text(rate.miss_z, False), percent(rate.difference_rate), interval)
        table.add_row(
            verbatim(suite, max_chars=NAME_CHARS),
            *numbers[:2],
            decimal(rate.shift),
            *numbers[2:],
            *further,
        )
    console.print(table)


def _ranks(summary: Summary, row: Candidate, console: Console) -> None:
    title = "Score, and looks without an SAE; rank 1 strays most"
    table = table_of(title, ("measure",), ("value", "rank"))
    for one in Ranking(summary.audited).of(row):
        table.add_row(verbatim(one.name, max_chars=NAME_CHARS + 20), one.text, one.place)
    console.print()
    console.print(table)


def _misfit(row: Candidate, console: Console) -> None:
    table = table_of("FVU beside the base's on the same tokens", ("suite",), ("candidate", "base", "tokens"))
    for suite, rate in sorted(row.suites.items()):
        cells = (decimal(rate.fvu, 3), decimal(rate.base_fvu, 3), f"{rate.tokens:,}")
        table.add_row(verbatim(suite, max_chars=NAME_CHARS), *cells)
    console.print(table)


def _facts(summary: Summary, row: Candidate) -> str:
    parts = [row.status, row.kind or "kind not recorded"]
    if row.why:
        parts.append(f"since the last sweep: {row.why}")
    if not row.audited:
        return ", ".join(parts)
    score = f"score {signed(row.score)}, lower end {signed(row.score_low)}"
    if summary.has_p:
        score += f", p {probability(row.p)}, q {probability(row.q)}"
    if row.suite:
        score += f"; strays most on {row.suite}"
    if row.joint_p is not None:
        score += f"; all suites together p {probability(row.joint_p)} if tails were normal"
    if row.proof:
        score += f"; swap proof: {row.proof}"
    return f"{', '.join(parts)}; {score}" + (f"; note: {row.reason}" if row.reason else "")


def _passage(example: Example, k: int) -> Text:
    """Tokens around the focus, the focus in brackets; the more features changed, the louder a token."""
    focus = -1 if example.focus is None else example.focus
    first = max(0, min(focus - EXAMPLE_TOKENS // 2, len(example.tokens) - EXAMPLE_TOKENS))
    text = verbatim(f"    prompt {example.prompt}: ", "dim", NAME_CHARS)
    for index in range(first, min(first + EXAMPLE_TOKENS, len(example.tokens))):
        overlap, token = example.overlaps[index], printable(example.tokens[index].replace("\n", "⏎"), 40)
        style = "" if overlap is None or overlap > k / 2 else "red" if overlap > k / 4 else "bold red"
        text.append(f"[{token}]" if index == focus else token, style)
    return text


def _moved(summary: Summary, suite: str, features: tuple[Feature, ...], console: Console) -> None:
    console.print()
    title = f"Features that moved on {suite}, first those that moved most beyond what they did in general"
    console.print(verbatim(f"{title}: share of tokens that keep them, mean activation", "bold"))
    for one in features:
        moved = f"{signed(one.delta, 4)}, in general {signed(one.general_delta, 4)}"
        rates = f"rate {decimal(one.rate_base, 4)} -> {decimal(one.rate_candidate, 4)} ({moved})"
        acts = f"activation {decimal(one.mean_act_base)} -> {decimal(one.mean_act_candidate)}"
        console.print(Text(f"  feature {one.feature}: {rates}, {acts}"))
        if known := summary.labels.get(one.feature):
            source = f" ({known.source})" if known.is_explained else ""
            console.print(verbatim(f"    {known.text}{source}", "dim", NAME_CHARS + 240))
        for example in one.examples:
            most = max((overlap for overlap in example.overlaps if overlap is not None), default=1)
            console.print(_passage(example, summary.k or most))


def print_candidate(raw: Mapping[str, Any], candidate_id: str, suite: str | None, console: Console) -> None:
    """Print one candidate: its status, its numbers on every suite, and the features that moved where known.

    Args:
        raw: The content of `summary.json`, with `details` where there are any.
        candidate_id: The candidate's id as listed.
        suite: The one suite to print, or None for all.
        console: Where to print.

    Raises:
        ValueError: No such candidate or suite; the message names the nearest ones.
    """
    summary = read_summary(raw)
    row = summary.by_id.get(candidate_id)
    if row is None:
        near = (
            difflib.get_close_matches(candidate_id, summary.by_id, n=3, cutoff=0.4) or list(summary.by_id)[:3]
        )
        raise ValueError(f"show.candidate must be a listed candidate, got {candidate_id!r}; nearest: {near}")
    names = [name for name in (summary.general, *summary.suites) if name in row.suites]
    if names and suite is not None and suite not in names:
        raise ValueError(f"show.suite must be a suite of this candidate, got {suite!r}; choose from {names}")
    console.print(verbatim(row.id, "bold"))
    console.print(verbatim(_facts(summary, row)))
    if row.status == MISFIT:
        console.print(verbatim(f"Not compared, which is a finding: {row.reason or 'no reason recorded'}"))
        _misfit(row, console)
        return
    if not row.audited:
        console.print(
            verbatim(f"Not audited: {row.reason or 'no reason recorded'}. Nothing is known about it.")
        )
        return
    for flag in summary.flags:
        if flag.candidate == row.id:
            new = ", new" if flag.new else ""
            measure = f", {flag.measure}" if flag.by_rate else ""
            console.print(verbatim(f"▲ {flag.suite}{measure}{new}: {words_of(summary, flag.rule)}"))
            if said := flag.acknowledged:
                console.print(
                    verbatim(f"  acknowledged by {said['who']} until {said['until']}: {said['why']}")
                )
            elif flag.reopened:
                console.print(verbatim(f"  open again: {flag.reopened}"))
    _rates(summary, row, names if suite is None else [suite], console)
    if suite is None:
        _ranks(summary, row, console)
    for name, features in summary.details.get(row.id, {}).items():
        if features and suite in (None, name):
            _moved(summary, name, features, console)
