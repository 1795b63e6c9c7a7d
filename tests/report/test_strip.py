"""Where the null's scores and the candidates' are drawn, whatever they are."""

from typing import Any

import pytest

from ray_auditor.report.html import render_html
from ray_auditor.report.rule import rule_words
from ray_auditor.report.strip import DOT_WIDTH, MAX_LEVELS, NAMED, draw_strip, fit_scores
from ray_auditor.report.summary import read_summary
from tests.report.made_sweep import make_summary


def test_the_axis_is_linear_until_that_would_squeeze_the_null() -> None:
    plain = fit_scores([-0.5, 2.0], [7.9])
    assert plain.at(3) - plain.at(2) == pytest.approx(plain.at(7) - plain.at(6), abs=0.2)
    warped = fit_scores([-0.5, 2.0], [104.0])
    assert list(warped.ticks) == [-1, 0, 1, 3, 10, 30, 100, 300]
    assert warped.at(2.0) > (warped.start + warped.end) / 5, "the null keeps its share of the axis"
    assert fit_scores([-3.0, -1.0], [-0.5]).at(0) == 98.0


@pytest.mark.parametrize("num_null", [8, 70, 2000])
def test_no_score_is_lost_and_no_dot_hides_another(num_null: int) -> None:
    summary = read_summary(make_summary(num_null))
    strip = draw_strip(summary)
    assert strip is not None
    null, rest = strip.swarms
    assert len(null.dots) + sum(count for *_, count in null.bars) == num_null
    assert bool(null.bars) == (num_null > 8)
    assert len(rest.dots) == 6
    for swarm in strip.swarms:
        for at, (x, y, *_) in enumerate(swarm.dots):
            assert all(abs(x - other) >= DOT_WIDTH for other, down, *_ in swarm.dots[:at] if down == y)
    assert null.foot < rest.top, "one swarm stands below the other"
    assert strip.num_above == sum(row.p == 1 / (num_null + 1) for row in summary.audited)
    assert strip.height < 150 + 2 * MAX_LEVELS * 7


def test_many_flags_are_drawn_and_the_first_are_named(summary: dict[str, Any]) -> None:
    flagged = next(row for row in summary["candidates"] if row["id"] == "roleplay-lite")
    flag = next(flag for flag in summary["flags"] if flag["candidate"] == "roleplay-lite")
    for at in range(60):
        summary["candidates"].append({**flagged, "id": f"copy-{at:02}"})
        summary["flags"].append({**flag, "candidate": f"copy-{at:02}"})
    summary["counts"] = {}
    strip = draw_strip(read_summary(summary))
    assert strip is not None
    assert len(strip.named) == NAMED
    assert strip.swarms[-1].label.startswith("34 more flagged candidates")
    assert f"{NAMED} of 64 flags by name are shown" in render_html(summary)


def test_without_a_null_nothing_is_drawn(without_null: dict[str, Any]) -> None:
    assert draw_strip(read_summary(without_null)) is None


def test_every_rule_is_a_sentence_with_its_bounds() -> None:
    def words(rule: str) -> str:
        return rule_words(rule, num_null=1234, level=0.01, min_z=4.0)

    assert words("null_q") == "called at a false discovery rate of 1% against 1,234 benign finetunes"
    assert "above all 1,234 benign finetunes, the lower end above 2;" in words("above_null")
    assert "too few to certify a false discovery rate of 1%" in words("above_null")
    assert "above 4 among its peers, the lower end above 2; a rank, no error rate" in words("robust_z")
    assert "by more than 15% from the general suite" in words("seed_rate_15")
    assert words("another") == "another"
    assert "the level set" in rule_words("null_q", num_null=9, level=None, min_z=None)
