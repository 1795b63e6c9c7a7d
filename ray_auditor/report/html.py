"""The report as one self-contained HTML file: no request, no script, nothing from a stranger unescaped."""

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ray_auditor.report import figure, number
from ray_auditor.report.candidate import MISFIT, NOT_AUDITED, Candidate, Example, Flag, SuiteRate
from ray_auditor.report.headline import write_headline
from ray_auditor.report.printable import printable
from ray_auditor.report.ranks import Ranking
from ray_auditor.report.rule import rule_words
from ray_auditor.report.strip import draw_strip
from ray_auditor.report.summary import Summary, read_summary

ROWS_SHOWN = 500
CELLS_SHOWN = 4000  # of candidates by suites, in the map, the panels and the rates
SECTIONS_SHOWN = 50
TOKENS_SHOWN = 80
TOKEN_CHARS = 40
PROSE_CHARS = 4000


def _show(value: Any) -> Any:
    """Jinja's last step before escaping: every string that is not our own markup is made printable."""
    return printable(value) if type(value) is str else value


class Prose(str):
    """Our own sentences, which may be long and hold names: printable already, still to be escaped."""


def anchor(candidate_id: str) -> str:
    """Fragment of a candidate's section; depends on its id alone, so that links survive the next sweep."""
    return "c-" + hashlib.sha256(candidate_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value is None else str(value)


def _window(example: Example) -> list[tuple[str, int | None, bool]]:
    """Tokens around the focus, as (text, overlap, is focus), with line ends and tabs drawn."""
    focus = -1 if example.focus is None else example.focus
    first = max(0, min(focus - TOKENS_SHOWN // 2, len(example.tokens) - TOKENS_SHOWN))
    stop = min(first + TOKENS_SHOWN, len(example.tokens))
    drawn = str.maketrans({"\n": "⏎", "\t": "⇥"})
    return [
        (
            printable(example.tokens[index].translate(drawn), TOKEN_CHARS),
            example.overlaps[index],
            index == focus,
        )
        for index in range(first, stop)
    ]


def _environment() -> Environment:
    room = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(room),
        autoescape=True,
        finalize=_show,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (room / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment.globals.update(style=style, style_hash=digest, figure=figure, window=_window)
    environment.filters.update(
        anchor=anchor,
        prose=lambda text: Prose(printable(text, PROSE_CHARS)),
        signed=number.signed,
        percent=number.percent,
        percent_tick=lambda tick: f"{100 * tick:+g}%".replace("-", number.MINUS) if tick else "0",
        short=lambda text: printable(text, 20),
        percent_interval=number.percent_interval,
        decimal=number.decimal,
        probability=number.probability,
        significant=number.significant,
        z_shade=figure.z_shade,
        change_shade=figure.change_shade,
    )
    return environment


def _stages(summary: Summary) -> list[tuple[str, int, str]]:
    """The funnel: stage, candidates that reached it, and what was lost on the way to it."""
    counts = summary.counts

    def lost(*statuses: str) -> str:
        return ", ".join(f"{counts[status]:,} {status}" for status in statuses if counts[status])

    listed, audited = len(summary.candidates), len(summary.audited)
    admitted = listed - counts["rejected"] - counts["skipped"]
    return [
        ("listed", listed, ""),
        ("admitted", admitted, lost("rejected", "skipped")),
        ("audited", audited, lost(MISFIT, "failed", "deferred")),
        ("flagged", counts["flagged"], ""),
    ]


def _floors(summary: Summary) -> list[tuple[str, float | None, float | None, float | None]]:
    """Per suite: the base against itself, and the smallest and largest mean shift of a candidate."""
    rows = []
    for suite, floor in sorted(summary.noise_floor.items()):
        rates = (row.suites.get(suite) for row in summary.audited)
        shifts = [rate.shift for rate in rates if rate is not None and rate.shift is not None]
        rows.append((suite, floor, min(shifts, default=None), max(shifts, default=None)))
    return rows


def _flags_of(summary: Summary) -> dict[str, list[Flag]]:
    found: dict[str, list[Flag]] = {}
    for flag in summary.flags:
        found.setdefault(flag.candidate, []).append(flag)
    return found


def _misfits(summary: Summary) -> list[tuple[Candidate, SuiteRate | None, str, SuiteRate | None]]:
    """Per candidate that the SAE does not fit: the general suite, and where it fits worst beside the base."""
    rows = []
    for row in summary.misfits[:ROWS_SHOWN]:
        ratios = {
            name: rate.fvu / rate.base_fvu for name, rate in row.suites.items() if rate.fvu and rate.base_fvu
        }
        worst = max(ratios, key=lambda name: (ratios[name], name), default="")
        rows.append((row, row.suites.get(summary.general), worst, row.suites.get(worst)))
    return rows


def render_html(raw: Mapping[str, Any]) -> str:
    """Render a sweep's summary as one HTML document.

    Args:
        raw: The content of `summary.json`, `details` included when features that moved are to be shown.

    Returns:
        A document that needs nothing but itself and opens under a content security policy without scripts.

    Raises:
        ValueError: The summary contradicts itself; see `read_summary`.
    """
    summary = read_summary(raw)
    rows_shown = min(ROWS_SHOWN, CELLS_SHOWN // max(len(summary.suites), 1))
    shown = summary.audited[:rows_shown]
    x, y, panels = figure.draw_panels(summary, shown)
    flagged = [(flag, summary.by_id[flag.candidate].suites.get(flag.suite)) for flag in summary.flags]
    level, min_z = summary.setting("flag.level"), summary.setting("flag.min_z")
    in_sections = dict.fromkeys([*(flag.candidate for flag in summary.flags), *summary.details])
    every_section = [row for name in in_sections if (row := summary.by_id.get(name)) and row.audited]
    sections = every_section[:SECTIONS_SHOWN]
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            summary=summary,
            headline=write_headline(summary),
            stages=_stages(summary),
            not_audited=summary.not_audited[:ROWS_SHOWN],
            statuses=NOT_AUDITED,
            num_flags_shown=min(len(flagged), ROWS_SHOWN),
            flag_groups=[
                (rule, list(group))
                for rule, group in groupby(flagged[:ROWS_SHOWN], key=lambda pair: pair[0].rule)
            ],
            rules={
                rule: rule_words(rule, num_null=len(summary.null_scores), level=level, min_z=min_z)
                for rule in dict.fromkeys(flag.rule for flag in summary.flags)
            },
            strip=draw_strip(summary),
            null_scores=sorted(summary.null_scores.items(), key=lambda one: (-one[1], one[0]))[:ROWS_SHOWN],
            ranking=Ranking(summary.audited),
            flags_of=_flags_of(summary),
            flag_scale=figure.rate_scale((rate for _, rate in flagged if rate), 6, figure.INTERVAL_WIDTH - 6),
            shown=shown,
            shift_scale=x,
            rate_scale=y,
            panels=panels,
            sections=sections,
            num_sections=len(every_section),
            section_scale=figure.rate_scale(
                (rate for row in sections for rate in row.suites.values()), 6, figure.INTERVAL_WIDTH - 6
            ),
            section_ids={row.id for row in sections},
            min_rate=summary.setting("flag.min_rate"),
            min_z=min_z,
            level=level,
            confidence=summary.setting("flag.confidence"),
            floors=_floors(summary),
            misfits=_misfits(summary),
            settings=list(_flat(summary.settings)),
            versions=list(_flat(summary.versions)),
        )
    )


def write_html(raw: Mapping[str, Any], path: Path) -> None:
    """Render a summary and put it at `path`, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(render_html(raw), encoding="utf-8")
    os.replace(part, path)
