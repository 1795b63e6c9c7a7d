"""The same report on a terminal: the sweep in one screen."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from ray_auditor.report.finding import list_findings
from ray_auditor.report.headline import write_headline
from ray_auditor.report.number import decimal, percent, percent_interval, probability, signed
from ray_auditor.report.rule import rule_words
from ray_auditor.report.summary import Gate, Summary, read_summary
from ray_auditor.report.verbatim import NAME_CHARS, table_of, verbatim

ROWS_SHOWN = 40
MAP_NAME_CHARS = 28
MAP_CHARS = 1000
PROSE_CHARS = 4000
WIDE = 110  # columns from which tables show everything


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
    for one in summary.variants or ():
        ends = "" if one.ends is None else f"{decimal(one.ends[0], 3)} to {decimal(one.ends[1], 3)}"
        counts_as = "floor" if one.is_floor else "no floor, other settings than this sweep's"
        words = f"{counts_as}, {ends}" if ends else f"not measured: {one.reason or 'no reason recorded'}"
        console.print(verbatim(f"  {one.name} ({one.what}): {words}", "dim"))
    console.print(verbatim(_gate(summary.gate)))
    if not summary.not_audited:
        return
    console.print()
    table = table_of("Not audited", ("candidate", "status", "reason"), ())
    for row in summary.not_audited[:ROWS_SHOWN]:
        table.add_row(
            verbatim(row.id, max_chars=NAME_CHARS),
            row.status,
            verbatim(row.reason or "no reason recorded", max_chars=400),
        )
    console.print(table)
    _rows_left(console, ROWS_SHOWN, len(summary.not_audited))


def _gate(gate: Gate | None) -> str:
    if gate is None:
        return "SAE on the base: fit not recorded"
    parts = [f"FVU {decimal(gate.fvu, 3)}", f"L0 {decimal(gate.l0, 1)}"]
    if gate.max_fvu is not None:
        parts[0] += f" (at most {decimal(gate.max_fvu, 3)})"
    if gate.min_l0 is not None and gate.max_l0 is not None:
        parts[1] += f" ({decimal(gate.min_l0, 1)} to {decimal(gate.max_l0, 1)})"
    source = f"; bounds: {gate.source}" if gate.source else ""
    return f"SAE on the base: {', '.join(parts)}{source}"


def _flags(summary: Summary, console: Console) -> None:
    numbers = ["score", "lower end", *(("p", "q") if summary.has_p else ()), "rate"]
    wide = console.width >= WIDE
    table = table_of("Flags", ("", "candidate", "suite"), [*numbers, "interval"] if wide else numbers)
    for flag in summary.flags[:ROWS_SHOWN]:
        row = summary.by_id[flag.candidate]
        rate = row.suites.get(flag.suite)
        cells = [flag.score_text, "" if flag.by_rate else signed(row.score_low)]
        cells += [probability(row.p), probability(row.q)] if summary.has_p else []
        cells += [percent(rate.difference_rate) if rate else ""]
        cells += [percent_interval(rate.ci_low, rate.ci_high) if rate else ""] if wide else []
        name = verbatim(flag.candidate, max_chars=NAME_CHARS)
        if flag.new:
            name.append(" new", "bold red")
        if flag.acknowledged:
            name.append(" acknowledged", "dim")
        elif flag.reopened:
            name.append(" open again: ").append_text(verbatim(flag.reopened, "red", NAME_CHARS))
        table.add_row(_mark(True), name, verbatim(flag.suite, max_chars=NAME_CHARS), *cells)
    console.print()
    console.print(table)
    _rows_left(console, ROWS_SHOWN, len(summary.flags))
    for rule in dict.fromkeys(flag.rule for flag in summary.flags):
        console.print(verbatim(f"{rule}: {words_of(summary, rule)}", "dim"))


def print_acknowledged(raw: Mapping[str, Any], console: Console) -> None:
    """Print every finding with its acknowledgement, if one holds, or why the last one does not."""
    reopened = {row["id"]: row.get("reopened") for row in raw["candidates"]}
    reopened |= {(flag["candidate"], flag["suite"]): flag.get("reopened") for flag in raw["flags"]}
    table = table_of("Findings", ("candidate", "suite", "rule", "acknowledged"), ())
    for one in list_findings(raw):
        said = one.acknowledged
        why_not = reopened[one.candidate if one.suite is None else (one.candidate, one.suite)]
        words = f"no: {why_not}" if why_not else "no"
        if said is not None:
            words = f"until {said['until']} by {said['who']}: {said['why']}"
        table.add_row(
            verbatim(one.candidate, max_chars=NAME_CHARS),
            verbatim(one.suite or "", max_chars=NAME_CHARS),
            verbatim(one.rule, max_chars=NAME_CHARS),
            verbatim(words, max_chars=400),
        )
    console.print(table)


def words_of(summary: Summary, rule: str) -> str:
    """What a rule says, in this sweep."""
    level, min_z = summary.setting("flag.level"), summary.setting("flag.min_z")
    return rule_words(rule, num_null=len(summary.null_scores), level=level, min_z=min_z)


def z_text(z: float | None, flagged: bool) -> Text:
    """A z, loud where it is far from 0."""
    style = "bold reverse" if flagged else "dim" if z is None or abs(z) < 2 else "red" if z > 0 else "blue"
    return Text(("▲" if flagged else "") + signed(z), style=style)


def _map(summary: Summary, console: Console) -> None:
    what = "z by suite" if summary.has_z else "Difference rate by suite, too few peers for a z"
    numbers = ("score", "general", *summary.suites)
    table = table_of(f"{what}, highest score first", ("", "candidate"), numbers)
    for row in summary.audited[:ROWS_SHOWN]:
        general = row.suites.get(summary.general)
        cells: list[RenderableType] = [
            _mark(row.status == "flagged"),
            verbatim(row.id, max_chars=MAP_NAME_CHARS),
        ]
        cells += [signed(row.score), decimal(general.shift if general else None)]
        for suite in summary.suites:
            rate = row.suites.get(suite)
            flagged = (row.id, suite) in summary.flagged_cells
            if rate is None:
                cells.append(Text("-", style="dim"))
            elif summary.has_z:
                cells.append(z_text(rate.z, flagged))
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
    console.print(verbatim(headline.stands_out, "bold"))
    console.print(verbatim(f"How sure: {headline.how_sure}", max_chars=PROSE_CHARS))
    if headline.new:
        console.print(verbatim(f"New: {headline.new}"))
    if headline.acknowledged:
        console.print(verbatim(f"Acknowledged: {headline.acknowledged}"))
    console.print(verbatim(f"Not audited: {headline.not_audited}", max_chars=PROSE_CHARS))
    console.print()
    _coverage(summary, console)
    if summary.flags:
        _flags(summary, console)
    if summary.audited:
        _map(summary, console)
    console.print()
    for limit in summary.limits:
        console.print(verbatim(f"- {limit}", "dim", PROSE_CHARS))
    console.print(Text("- It ranks candidates for a closer look; it clears none.", style="dim"))
