"""Every figure as data: what the page saves is what the summary says, and starts no spreadsheet formula."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page

from ray_auditor.report.html import write_html
from ray_auditor.report.number import MINUS
from tests.report.page import UNFOLD, opened


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
            "Candidate", "New", "Acknowledged", "Suite", "Score", "Lower end", "p", "q", "Difference rate",
            "low", "high", "Feature that moved most beyond general", "Change", "In general",
            "What it stands for", "Rule",
        ]  # fmt: skip
        assert len(flags) == 1 + len(summary["flags"])
        for name, new, said, suite, *numbers, feature, delta, general, label, rule in flags[1:]:
            row, cell = rows[name], rows[name]["suites"][suite]
            assert (new, said) == ("new" if row["why"] == "new" else "", "")
            keys = [row[key] for key in ("score", "score_low", "p", "q")]
            assert [float(one) for one in numbers] == [
                *keys, *(cell[key] for key in ("difference_rate", "ci_low", "ci_high"))
            ]  # fmt: skip
            assert rule == "null_q"
            first = summary["details"][name][suite]["features"][0]
            assert [float(feature), float(delta), float(general)] == [
                first[key] for key in ("feature", "delta", "general_delta")
            ]  # fmt: skip
            assert label == summary["labels"][feature]["text"]
        gate = saved(page, page.locator("table.gate caption button"))
        assert gate[0] == ["Measure", "Base", "At least", "At most"]
        assert [line[1:] for line in gate[1:]] == [["0.1873", "", "0.331"], ["61.4", "28.2", "126.4"]]
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


def test_a_file_of_one_candidate_names_it_outside_and_inside(
    browser: Browser, summary: dict[str, Any], tmp_path: Path
) -> None:
    name, path = "org/a b", tmp_path / "named.html"
    text = json.dumps(summary).replace('"helpful-chat-v3"', json.dumps(name))
    write_html(json.loads(text), path)
    row = next(row for row in summary["candidates"] if row["id"] == "helpful-chat-v3")
    with opened(browser, path) as page:
        page.evaluate(UNFOLD)
        article = page.locator("article", has_text=name)
        with page.expect_download() as download:
            article.locator("table.suites caption button").click()
        assert download.value.suggested_filename == "org_a_b_suites.csv"
        lines = saved(page, article.locator("table.suites caption button"))
        assert lines[0][:2] == ["Candidate", "Suite"]
        for _, suite, _, _, overlap, shift, _, _, _, change, tokens in lines[1:]:
            cell = row["suites"][suite]
            shown = [cell[key] for key in ("overlap", "shift", "change", "tokens")]
            assert [float(one) for one in (overlap, shift, change, tokens)] == shown
        assert {line[0] for line in lines[1:]} == {name}
        buttons = article.locator("caption button").all()
        files = []
        for button in buttons:
            with page.expect_download() as download:
                button.click()
            files.append(download.value.suggested_filename)
        assert len(set(files)) == len(files) > 5


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
