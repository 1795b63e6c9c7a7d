"""Every figure as data: what the page saves is what the summary says, and starts no spreadsheet formula."""

import csv
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page

from ray_auditor.report.html import write_html
from ray_auditor.report.number import MINUS
from tests.report.page import opened


def saved(page: Page, button: Locator) -> list[list[str]]:
    with page.expect_download() as download:
        button.click()
    return list(csv.reader(download.value.path().read_text(encoding="utf-8").splitlines()))


def test_a_figures_file_holds_its_numbers_in_full(
    browser: Browser, report: Path, summary: dict[str, Any]
) -> None:
    rows = {row["id"]: row for row in summary["candidates"]}
    with opened(browser, report) as page:
        flags = saved(page, page.locator("table.flags caption button"))
        assert flags[0] == [
            "Candidate", "Suite", "Score", "Lower end", "p", "q", "Difference rate", "low", "high",
            "Feature that moved most there", "Rule",
        ]  # fmt: skip
        assert len(flags) == 1 + len(summary["flags"])
        for name, suite, *numbers, feature, rule in flags[1:]:
            row, cell = rows[name.removesuffix(" new")], rows[name.removesuffix(" new")]["suites"][suite]
            keys = [row[key] for key in ("score", "score_low", "p", "q")]
            assert [float(one) for one in numbers] == [
                *keys, *(cell[key] for key in ("difference_rate", "ci_low", "ci_high"))
            ]  # fmt: skip
            assert rule == "null_q"
            moved = max(summary["details"][row["id"]][suite]["features"], key=lambda one: abs(one["delta"]))
            assert feature.startswith(f"{moved['feature']} ")
        rates = saved(page, page.locator("#rates .take button"))
        head, lines = rates[0], {line[0]: line[1:] for line in rates[1:]}
        assert head[2:5] == ["french", "french, low", "french, high"]
        for name, line in lines.items():
            assert len(line) == len(head) - 1
            cell = rows[name]["suites"]["french"]
            values = [cell[key] for key in ("difference_rate", "ci_low", "ci_high")]
            assert [float(one) if one else None for one in line[1:4]] == values
        null = saved(page, page.locator("#null .take button"))
        assert {name: float(score) for name, score in null[1:]} == summary["null"]["scores"]
        funnel = saved(page, page.locator("table.funnel caption button"))
        assert funnel[:2] == [["Stage", "Candidates", "Lost on the way"], ["listed", "15", "–"]]  # noqa: RUF001
        heat = saved(page, page.get_by_role("button", name="Save these rows as CSV"))
        assert heat[0][:5] == ["Candidate", "Score", "p", "q", "General shift of 32"]
        assert {line[0] for line in heat[1:]} == set(rows)
        assert not any(MINUS in field for line in heat[1:] for field in line[1:-1])


def test_every_table_can_be_saved_and_every_line_has_its_fields(browser: Browser, report: Path) -> None:
    with opened(browser, report) as page:
        tables = page.locator("table").evaluate_all("all => all.map(one => one.className)")
        assert page.locator("caption .save").count() == len(tables) - tables.count("pairs") - 1, (
            "the map has its own"
        )
        files = page.evaluate(
            "[...document.querySelectorAll('table[data-name]')].map(one => [...tableRows(one)])"
        )
    assert len(files) > 20
    for lines in files:
        assert len(lines) > 1
        assert len({len(line) for line in lines}) == 1 or any("not measured" in field for field in lines[-1])


@pytest.mark.parametrize("what", ["refusals", "flags", "heat map"])
def test_what_a_stranger_wrote_is_no_formula(
    browser: Browser, hostile: dict[str, Any], tmp_path: Path, what: str
) -> None:
    path = tmp_path / "hostile.html"
    write_html(hostile, path)
    with opened(browser, path) as page:
        button = (
            page.get_by_role("button", name="Save these rows as CSV")
            if what == "heat map"
            else page.locator(f"table.{what} caption button")
        )
        fields = [field for line in saved(page, button) for field in line]
        assert any("cmd|" in field for field in fields)
        assert not any(field[:1] in ("=", "@", "+", "\t") and not field[1:2].isdigit() for field in fields)
