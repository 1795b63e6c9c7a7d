"""The report as one self-contained HTML file: no request, no script but its own, strangers' text escaped."""

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ray_auditor.report import coverage, figure, number
from ray_auditor.report.alike import cluster
from ray_auditor.report.candidate import NOT_AUDITED, Example
from ray_auditor.report.columns import make_columns, pack_columns
from ray_auditor.report.headline import write_headline
from ray_auditor.report.label import feature_address
from ray_auditor.report.printable import printable
from ray_auditor.report.ranks import Ranking
from ray_auditor.report.rule import rule_words
from ray_auditor.report.strip import draw_strip
from ray_auditor.report.summary import Summary, read_summary

PAGE_BYTES = 4_950_000
DATA_BYTES = 3_850_000  # of them, for every candidate's row
TOKENS_SHOWN = 80
TOKEN_CHARS = 40
PROSE_CHARS = 4000
DRAWN = str.maketrans({"\n": "⏎", "\t": "⇥"})


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


def _drawn(token: str) -> str:
    """A token with its line ends and tabs drawn."""
    return printable(token.translate(DRAWN), TOKEN_CHARS)


def _window(example: Example) -> list[tuple[str, int | None, bool]]:
    """Tokens around the focus, as (text, overlap, is focus), with line ends and tabs drawn."""
    focus = -1 if example.focus is None else example.focus
    first = max(0, min(focus - TOKENS_SHOWN // 2, len(example.tokens) - TOKENS_SHOWN))
    stop = min(first + TOKENS_SHOWN, len(example.tokens))
    return [
        (
            _drawn(example.tokens[index]),
            example.overlaps[index],
            index == focus,
        )
        for index in range(first, stop)
    ]


def _digest(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
    script = "".join((room / name).read_text(encoding="utf-8") for name in ("figures.js", "map.js"))
    environment.globals.update(
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
        figure=figure,
        window=_window,
        feature_address=feature_address,
    )
    environment.filters.update(
        anchor=anchor,
        drawn=_drawn,
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


@dataclass(frozen=True)
class Bounds:
    """How much of what grows with a sweep is written out; the packed candidates are beside it."""

    rows: int = 500
    cells: int = 4000  # of candidates by suites, in the map, the panels and the rates
    sections: int = 50

    def num_drawn(self, summary: Summary) -> int:
        """Candidates of the map, the panels and the rates."""
        return min(self.rows, self.cells // max(len(summary.suites), 1))

    def smaller(self) -> "Bounds":
        """The next ones to try."""
        return Bounds(self.rows // 2, self.cells // 2, self.sections // 2)


BOUNDS = Bounds()


def render_html(raw: Mapping[str, Any]) -> str:
    """Render a sweep's summary as one HTML document of at most `PAGE_BYTES`.

    Args:
        raw: The content of `summary.json`, `details` included when features that moved are to be shown.

    Returns:
        A document that needs nothing but itself and opens under a content security policy that names its one
        script by hash.

    Raises:
        ValueError: The summary contradicts itself; see `read_summary`.
    """
    summary, bounds = read_summary(raw), BOUNDS
    places, suites = cluster(summary.audited, summary.suites)
    packed = None
    if summary.has_z:
        anchors = {row.id: anchor(row.id) for row in summary.detailed[: bounds.sections]}
        columns = make_columns(summary, suites)
        packed = pack_columns(summary, columns, places=places, anchors=anchors, max_bytes=DATA_BYTES)
    template = _environment().get_template("template.html.j2")
    axes = figure.fit_axes(summary)
    whole = _whole(summary) | {"map_suites": suites, "packed": packed, "axes": axes, "crowd": {}}
    if len(summary.audited) > bounds.num_drawn(summary):
        whole["crowd"] = figure.draw_crowd(summary, axes)
    page = template.render(whole | _bounded(summary, bounds, axes))
    while len(page.encode()) > PAGE_BYTES and bounds.rows:
        bounds = bounds.smaller()
        page = template.render(whole | _bounded(summary, bounds, axes))
    return page


def _whole(summary: Summary) -> dict[str, Any]:
    """What the template needs whatever the bounds are."""
    level, min_z = summary.setting("flag.level"), summary.setting("flag.min_z")
    flag_rates = (
        rate for flag in summary.flags if (rate := summary.by_id[flag.candidate].suites.get(flag.suite))
    )
    return {
        "summary": summary,
        "headline": write_headline(summary),
        "stages": coverage.stages(summary),
        "since": coverage.since_last(summary),
        "statuses": NOT_AUDITED,
        "rules": {
            rule: rule_words(rule, num_null=len(summary.null_scores), level=level, min_z=min_z)
            for rule in dict.fromkeys(flag.rule for flag in summary.flags)
        },
        "strip": draw_strip(summary),
        "ranking": Ranking(summary.audited),
        "flags_of": coverage.flags_of(summary),
        "flag_scale": figure.rate_scale(flag_rates, 6, figure.INTERVAL_WIDTH - 6),
        "min_rate": summary.setting("flag.min_rate"),
        "min_z": min_z,
        "level": level,
        "confidence": summary.setting("flag.confidence"),
        "floors": coverage.floors(summary),
        "settings": list(_flat(summary.settings)),
        "versions": list(_flat(summary.versions)),
    }


def _bounded(summary: Summary, bounds: Bounds, axes: figure.Axes) -> dict[str, Any]:
    """What the template needs of candidates and flags, cut to the bounds."""
    shown = summary.audited[: bounds.num_drawn(summary)]
    flagged = [
        (flag, summary.by_id[flag.candidate].suites.get(flag.suite)) for flag in summary.flags[: bounds.rows]
    ]
    sections = summary.detailed[: bounds.sections]
    section_rates = (rate for row in sections for rate in row.suites.values())
    nulls = sorted(summary.null_scores.items(), key=lambda one: (-one[1], one[0]))
    return {
        "shown": shown,
        "not_audited": summary.not_audited[: bounds.rows],
        "num_flags_shown": len(flagged),
        "flag_groups": [
            (rule, list(group)) for rule, group in groupby(flagged, key=lambda pair: pair[0].rule)
        ],
        "null_scores": nulls[: bounds.rows],
        "panels": figure.draw_panels(summary, shown, axes),
        "sections": sections,
        "section_scale": figure.rate_scale(section_rates, 6, figure.INTERVAL_WIDTH - 6),
        "section_ids": {row.id for row in sections},
        "misfits": coverage.misfits(summary, bounds.rows),
    }


def write_html(raw: Mapping[str, Any], path: Path) -> None:
    """Render a summary and put it at `path`, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(render_html(raw), encoding="utf-8")
    os.replace(part, path)
