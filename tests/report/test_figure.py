import re
from collections import Counter
from itertools import combinations
from typing import Any

import pytest

from ray_auditor.report import figure
from ray_auditor.report.html import render_html
from ray_auditor.report.summary import read_summary
from tests.report.large_sweep import LargeSweep


@pytest.mark.parametrize(
    ("z", "shade"),
    [
        (None, "z-none"),
        (0.0, "z-0"),
        (0.94, "z-0"),
        (0.96, "z-p1"),
        (-0.96, "z-n1"),
        (2.0, "z-p2"),
        (-3.0, "z-n3"),
        (4.94, "z-p3"),
        (4.96, "z-p4"),
        (-99.0, "z-n4"),
    ],
)
def test_a_shade_follows_the_number_as_it_is_shown(z: float | None, shade: str) -> None:
    assert figure.z_shade(z) == shade


def test_the_fewer_features_are_shared_the_deeper_the_shade() -> None:
    shades = [figure.change_shade(overlap, 32) for overlap in (32, 29, 28, 24, 16, 8, 0)]
    assert shades == ["t-0", "t-0", "t-1", "t-2", "t-3", "t-4", "t-4"]
    assert figure.change_shade(None, 32) == "t-none"


def test_a_scale_holds_zero_and_every_value_between_round_ticks() -> None:
    scale = figure.fit_scale([0.31, 1.192, -0.141, None], 6, 214)
    assert scale.ticks == (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    assert (scale.at(-0.25), scale.at(1.25), scale.at(0.5)) == (6, 214, 110)
    assert figure.fit_scale([], 0, 10).ticks[0] == 0.0
    assert figure.fit_scale([0.0], 0, 10).at(0.0) == 0.0
    tiny = figure.fit_scale([1e-9], 0, 10)
    assert tiny.at(1e-9) == 10


def test_a_panel_puts_each_candidate_at_its_shift_and_rate(summary: dict[str, Any]) -> None:
    read = read_summary(summary)
    axes = figure.fit_axes(read)
    x, y, panels = axes.x, axes.y, figure.draw_panels(read, read.audited, axes)
    assert [panel.suite for panel in panels] == list(read.suites)
    for panel in panels:
        assert len(panel.dots) == 10
        assert panel.undetermined == 1
        for dot in panel.dots:
            rate = dot.candidate.suites[panel.suite]
            assert dot.rate is rate
            assert dot.x == x.at(dot.candidate.suites["general"].shift or 0)
            assert (dot.y, dot.y_low, dot.y_high) == tuple(
                y.at(value or 0) for value in (rate.difference_rate, rate.ci_low, rate.ci_high)
            )
            assert dot.y_high is not None
            assert dot.y_low is not None
            assert dot.y_high < dot.y < dot.y_low, "up is more"
            assert dot.flagged == ((dot.candidate.id, panel.suite) in read.flagged_cells)
    assert sum(dot.flagged for panel in panels for dot in panel.dots) == len(read.flags)


def test_one_that_hardly_changed_neither_stretches_the_axes_nor_is_lost(summary: dict[str, Any]) -> None:
    small = next(row for row in summary["candidates"] if row["id"] == "tulu-mini")
    before = figure.fit_axes(read_summary(summary))
    for name, cell in small["suites"].items():
        cell["shift"] = 0.31  # 1% of 32 is 0.32
        if name != "general":
            cell |= {"difference_rate": 3.0, "ci_low": 2.0, "ci_high": 4.0}
    read = read_summary(summary)
    axes = figure.fit_axes(read)
    assert axes.y.high <= before.y.high
    for panel in figure.draw_panels(read, read.audited, axes):
        assert (panel.off_scale, panel.undetermined) == (1, 1)
        assert "tulu-mini" not in {dot.candidate.id for dot in panel.dots}
    page = render_html(summary)
    assert page.count("<small>1 off scale</small>") == len(read.suites)
    assert "a general shift below 0.32, 1% of k" in page
    for name in ("general", *read.suites):
        small["suites"][name]["shift"] = 0.33
    assert figure.fit_axes(read_summary(summary)).y.high >= 4.0


def test_a_name_stands_on_the_side_where_it_lies_over_fewer_dots(summary: dict[str, Any]) -> None:
    flagged, near = "smol-legal-lora-r8", "tulu-mini"
    rows = {row["id"]: row for row in summary["candidates"]}
    rows[flagged]["suites"]["general"]["shift"] = 4.0
    for shift, left in ((4.4, True), (3.6, False)):
        rows[near]["suites"]["general"]["shift"] = shift
        rows[near]["suites"]["legal"]["difference_rate"] = rows[flagged]["suites"]["legal"]["difference_rate"]
        read = read_summary(summary)
        panels = figure.draw_panels(read, read.audited, figure.fit_axes(read))
        panel = next(panel for panel in panels if panel.suite == "legal")
        assert next(dot for dot in panel.dots if dot.named).label_left == left


def test_names_do_not_cover_each_other() -> None:
    read = read_summary(LargeSweep(30_000, 2))
    axes = figure.fit_axes(read)
    for panel in figure.draw_panels(read, read.audited[:500], axes):
        named = [dot for dot in panel.dots if dot.named]
        assert named
        assert all(dot.flagged for dot in named)
        assert next(dot for dot in panel.dots if dot.flagged) is named[0], "the strongest has its name"
        sides = [(dot.x - 60 if dot.label_left else dot.x + 60, dot.y) for dot in named]
        for (x, y), (other_x, other_y) in combinations(sides, 2):
            assert abs(x - other_x) > 120 or abs(y - other_y) > 11


def test_the_shade_holds_every_candidate_in_the_square_where_its_dot_would_be() -> None:
    read = read_summary(LargeSweep(3000, 2))
    axes = figure.fit_axes(read)
    panels = figure.draw_panels(read, read.audited, axes)
    shades = figure.draw_crowd(read, axes)
    for panel in panels:
        counts = Counter(
            (int((dot.x - figure.PANEL_LEFT) // 4), int((dot.y - figure.PANEL_TOP) // 4))
            for dot in panel.dots
        )
        for bound, path in zip(figure.CROWD_BOUNDS, shades[panel.suite], strict=True):
            corners = [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h4v4h-4", path)]
            drawn = {((x - figure.PANEL_LEFT) // 4, (y - figure.PANEL_TOP) // 4) for x, y in corners}
            expected = {place for place, count in counts.items() if count >= bound}
            assert len(drawn ^ expected) <= 0.15 * len(expected), "but for dots rounded over an edge"
            assert drawn or bound == 100
    assert 'class="crowd"' in render_html(LargeSweep(3000, 2))


def test_the_flags_table_draws_rates_and_intervals_on_one_scale(summary: dict[str, Any]) -> None:
    read = read_summary(summary)
    rates = [read.by_id[flag.candidate].suites[flag.suite or ""] for flag in read.flags]
    scale = figure.rate_scale(rates, 6, figure.INTERVAL_WIDTH - 6)
    source = render_html(summary)
    table = source[source.index('<table class="flags"') :].split("</table>")[0]
    bands = re.findall(r'class="band" x1="([\d.]+)" x2="([\d.]+)"', table)
    estimates = re.findall(r'class="estimate" x1="([\d.]+)"', table)
    rules = re.findall(r'class="rule" x1="([\d.]+)"', table)
    assert [(float(low), float(high)) for low, high in bands] == [
        (scale.at(rate.ci_low or 0), scale.at(rate.ci_high or 0)) for rate in rates
    ]
    assert [float(one) for one in estimates] == [scale.at(rate.difference_rate or 0) for rate in rates]
    assert [float(one) for one in rules] == [scale.at(0.15)] * len(rates)


def test_a_long_passage_is_shown_around_its_focus(summary: dict[str, Any]) -> None:
    example = {
        "prompt": 3,
        "tokens": [f"w{index}" for index in range(5000)],
        "overlaps": [9] * 5000,
        "focus": 4000,
    }
    feature = {"feature": 77, "rate_base": 0.1, "rate_candidate": 0.2, "delta": 0.1, "examples": [example]}
    source = render_html(
        {**summary, "details": {"helpful-chat-v3": {"insecure_code": {"features": [feature]}}}}
    )
    shown = re.findall(r'<span class="token t-3( focus)?">(w\d+)<small>9</small>', source)
    assert [text for _, text in shown] == [f"w{index}" for index in range(3960, 4040)]
    assert [text for focus, text in shown if focus] == ["w4000"]
