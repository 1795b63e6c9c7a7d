"""axe-core on the page as a reader meets it: two schemes, three widths, every fold open."""

import re
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from ray_auditor.report.html import write_html
from tests.report.large_sweep import LargeSweep
from tests.report.page import UNFOLD, opened

WIDTHS = (1280, 768, 390)


def violations(page: Page, *rules: str) -> list[str]:
    """What axe-core finds, by every rule or by these."""
    page.evaluate(UNFOLD)
    options = {"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})}
    found = Axe().run(page, options=options).response["violations"]
    return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]


@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_no_violation(browser: Browser, report: Path, width: int) -> None:
    with opened(browser, report, width) as page:
        assert violations(page) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_nor_in_the_dark_where_only_colours_differ(browser: Browser, report: Path, width: int) -> None:
    with opened(browser, report, width, "dark") as page:
        assert violations(page, "color-contrast", "link-in-text-block") == []


def test_nor_where_only_the_rows_in_view_are_there(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(LargeSweep(560, 1), path)
    with opened(browser, path, 390) as page:
        assert page.locator("#map .scroll.tall").count() == 1
        page.locator("table.map tbody tr").first.focus()
        page.keyboard.press("PageDown")
        assert violations(page) == []


def test_nor_without_the_script(browser: Browser, report: Path) -> None:
    report.write_text(re.sub(r"<script>.*?</script>", "", report.read_text(), flags=re.S))
    with opened(browser, report, 390, controls=False) as page:
        assert page.locator(".controls").count() == 0
        assert violations(page) == []


def test_nor_when_every_text_is_a_strangers(
    browser: Browser, hostile: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "hostile.html"
    write_html(hostile, path)
    with opened(browser, path, 390) as page:
        assert violations(page) == []


def test_axe_would_find_one(browser: Browser, report: Path, tmp_path: Path) -> None:
    path = tmp_path / "worse.html"
    path.write_text(report.read_text().replace('<html lang="en">', "<html>"))
    with opened(browser, path) as page:
        assert [one.split(":")[0] for one in violations(page, "html-has-lang")] == ["html-has-lang"]
