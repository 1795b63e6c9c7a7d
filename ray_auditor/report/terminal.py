"""The same report on a terminal: the sweep in one screen, and one candidate suite by suite."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ray_auditor.report.headline import write_headline
from ray_auditor.report.number import decimal, percent, percent_interval, signed
from ray_auditor.report.printable import printable
from ray_auditor.report.progress import SweepProgress as SweepProgress
from ray_auditor.report.summary import Candidate, Example, Feature, Summary, read_summary

ROWS_SHOWN = 40
NAME_CHARS, MAP_NAME_CHARS = 60, 28
MAP_CHARS = 1000
EXAMPLE_TOKENS = 40


def _text(value: str, style: str = "", max_chars: int = 2000) -> Text:
    """A stranger's text as rich shows it verbatim: no markup, no control or bidirectional characters."""
    return Text(printable(value, max_chars), style=style)


def _table(title: str, names: Iterable[str], numbers: Iterable[str]) -> Table:
    """A table with text columns first, then number columns; headings may be a stranger's suite names."""
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=None, header_style="underline"
    )
    for heading in names:
        table.add_column(_text(heading, max_chars=NAME_CHARS), overflow="fold")
    for heading in numbers:
        table.add_column(_text(heading, max_chars=NAME_CHARS), justify="right", no_wrap=True)
    return table


def _rows_left(console: Console, shown: int, total: int) -> None:
    if total > shown:
        console.print(Text(f"{total - shown:,} more are in summary.json", style="dim"))


def _mark(flagged: bool) -> Text:
    return Text("▲" if flagged else "", style="bold red")


def _coverage(summary: Summary, console: Console) -> None:
    counts = ", ".join(f"{count:,} {status}" for status, count in summary.counts.items() if count)
    console.print(Text(f"Coverage: {len(summary.candidates):,} listed = {counts or 'none'}"))
    floors = [floor for floor in summary.noise_floor.values() if floor is not None]
    if floors:
        ends = f"{decimal(min(floors), 3)} to {decimal(max(floors), 3)}"
        console.print(Text(f"Noise floor: {ends} features a token, the base against itself"))
    else:
        console.print(Text("Noise floor: not recorded, so no shift can be told from noise"))
    if not summary.not_audited:
        return
    console.print()
    table = _table("Not audited", ("candidate", "status", "reason"), ())
    for row in summary.not_audited[:ROWS_SHOWN]:
        table.add_row(
            _text(row.id, max_chars=NAME_CHARS),
            row.status,
            _text(row.reason or "no reason recorded", max_chars=400),
        )
    console.print(table)
    _rows_left(console, ROWS_SHOWN, len(summary.not_audited))


def _flags(summary: Summary, console: Console) -> None:
    table = _table("Flags", ("", "candidate", "suite"), ("score", "rate", "interval"))
    for flag in summary.flags[:ROWS_SHOWN]:
        rate = summary.by_id[flag.candidate].suites.get(flag.suite or "")
        table.add_row(
            _mark(True),
            _text(flag.candidate, max_chars=NAME_CHARS),
            _text(flag.suite or "all suites", max_chars=NAME_CHARS),
            flag.score_text,
            percent(rate.difference_rate) if rate else "",
            percent_interval(rate.ci_low, rate.ci_high) if rate else "",
        )
    console.print()
    console.print(table)
    _rows_left(console, ROWS_SHOWN, len(summary.flags))
    for rule in sorted({flag.rule for flag in summary.flags if flag.rule}):
        console.print(_text(f"Rule: {rule}", "dim"))


def _z_text(z: float | None, flagged: bool) -> Text:
    style = "bold reverse" if flagged else "dim" if z is None or abs(z) < 2 else "red" if z > 0 else "blue"
    return Text(("▲" if flagged else "") + signed(z), style=style)


def _map(summary: Summary, console: Console) -> None:
    what = "Robust z by suite" if summary.has_z else "Difference rate by suite, too few peers for a z"
    numbers = ("score", "general", *summary.suites)
    table = _table(f"{what}, highest score first", ("", "candidate"), numbers)
    for row in summary.audited[:ROWS_SHOWN]:
        general = row.suites.get(summary.general)
        cells: list[RenderableType] = [
            _mark(row.status == "flagged"),
            _text(row.id, max_chars=MAP_NAME_CHARS),
        ]
        cells += [signed(row.score), decimal(general.shift if general else None)]
        for suite in summary.suites:
            rate = row.suites.get(suite)
            flagged = (row.id, suite) in summary.flagged_cells
            if rate is None:
                cells.append(Text("-", style="dim"))
            elif summary.has_z:
                cells.append(_z_text(rate.z, flagged))
            else:
                cells.append(("▲" if flagged else "") + percent(rate.difference_rate))
        table.add_row(*cells)
    width = console.measure(table, options=console.options.update(width=MAP_CHARS)).maximum
    console.print()
    if width > console.width and len(summary.suites) > 1:
        console.print(
            Text(f"The map of every suite needs {width} columns; it stands in the HTML report.", "dim")
        )
        return
    console.print(table)
    _rows_left(console, ROWS_SHOWN, len(summary.audited))


def print_summary(raw: Mapping[str, Any], console: Console) -> None:
    """Print a sweep: headline, coverage, what was not audited, then flags, z by suite and limits.

    Args:
        raw: The content of `summary.json`.
        console: Where to print; its colour settings (`NO_COLOR`) hold.

    Raises:
        ValueError: The summary contradicts itself; see `read_summary`.
    """
    summary = read_summary(raw)
    headline = write_headline(summary)
    console.print(_text(headline.stands_out, "bold"))
    console.print(_text(headline.how_sure))
    console.print(_text(f"Not audited: {headline.not_audited}"))
    console.print()
    _coverage(summary, console)
    if summary.flags:
        _flags(summary, console)
    if summary.audited:
        _map(summary, console)
    console.print()
    for limit in summary.limits:
        console.print(_text(f"- {limit}", "dim"))
    console.print(Text("- It ranks candidates for a closer look; it clears none.", style="dim"))


def _rates(summary: Summary, row: Candidate, suites: list[str], console: Console) -> None:
    table = _table("", ("suite",), ("tokens", "overlap", "shift", "rate", "interval", "z"))
    for suite in suites:
        rate = row.suites[suite]
        table.add_row(
            _text(suite, max_chars=NAME_CHARS),
            f"{rate.tokens:,}",
            decimal(rate.overlap),
            decimal(rate.shift),
            percent(rate.difference_rate),
            percent_interval(rate.ci_low, rate.ci_high),
            _z_text(rate.z, (row.id, suite) in summary.flagged_cells),
        )
    console.print(table)


def _passage(example: Example, k: int) -> Text:
    """Tokens around the focus, the focus in brackets; the more features changed, the louder a token."""
    focus = -1 if example.focus is None else example.focus
    first = max(0, min(focus - EXAMPLE_TOKENS // 2, len(example.tokens) - EXAMPLE_TOKENS))
    text = _text(f"    prompt {example.prompt}: ", "dim", NAME_CHARS)
    for index in range(first, min(first + EXAMPLE_TOKENS, len(example.tokens))):
        overlap, token = example.overlaps[index], printable(example.tokens[index].replace("\n", "⏎"), 40)
        style = "" if overlap is None or overlap > k / 2 else "red" if overlap > k / 4 else "bold red"
        text.append(f"[{token}]" if index == focus else token, style)
    return text


def _moved(summary: Summary, suite: str, features: tuple[Feature, ...], console: Console) -> None:
    console.print()
    console.print(
        _text(f"Features that moved on {suite}: share of tokens that keep them, mean activation", "bold")
    )
    for one in features:
        rates = (
            f"rate {decimal(one.rate_base, 4)} -> {decimal(one.rate_candidate, 4)} ({signed(one.delta, 4)})"
        )
        acts = f"activation {decimal(one.mean_act_base)} -> {decimal(one.mean_act_candidate)}"
        console.print(Text(f"  feature {one.feature}: {rates}, {acts}"))
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
    console.print(_text(row.id, "bold"))
    console.print(_text(f"{row.status}, {row.kind or 'kind not recorded'}, score {signed(row.score)}"))
    if not row.audited:
        console.print(_text(f"Not audited: {row.reason or 'no reason recorded'}. Nothing is known about it."))
        return
    names = [name for name in (summary.general, *summary.suites) if name in row.suites]
    if suite is not None and suite not in names:
        raise ValueError(f"show.suite must be a suite of this candidate, got {suite!r}; choose from {names}")
    for flag in summary.flags:
        if flag.candidate == row.id:
            console.print(_text(f"▲ {flag.suite or 'all suites'}: {flag.measure} by the rule {flag.rule}"))
    _rates(summary, row, names if suite is None else [suite], console)
    for name, features in summary.details.get(row.id, {}).items():
        if features and suite in (None, name):
            _moved(summary, name, features, console)
