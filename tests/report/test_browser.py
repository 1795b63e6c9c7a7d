"""The page in a real browser: it fits, can be read, runs nothing, and is reached by key and link."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser

from ray_auditor.report.html import write_html
from tests.report.large_sweep import LargeSweep
from tests.report.page import UNFOLD, Scheme, opened

SCROLLED = """one => new Promise(done => {
  const look = () => one.scrollLeft ? done(true) : setTimeout(look, 20);
  look();
})"""
Role = Literal["banner", "navigation", "main", "contentinfo"]
A4_LESS_MARGINS = 718  # pixels: 190 mm
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_every_text_can_be_read(
    browser: Browser, report: Path, width: int, scheme: Scheme
) -> None:
    with opened(browser, report, width, scheme) as page:
        page.evaluate(UNFOLD)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(CONTRAST) == [], "text below a contrast of 4.5"
        heat_map = page.locator("table.map").locator("..")
        inner, outer = heat_map.evaluate("one => [one.scrollWidth, one.clientWidth]")
        assert (inner > outer) == (width == 390), "only the map itself scrolls, and only where it must"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(251, 250, 246)", "dark": "rgb(21, 23, 26)"}[scheme]


def test_hostile_text_runs_nothing_and_pushes_nothing_aside(
    browser: Browser, hostile: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "hostile.html"
    write_html(hostile, path)
    for width in (1280, 390):
        with opened(browser, path, width) as page:
            page.evaluate(UNFOLD)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("[document.scripts.length, document.images.length]") == [2, 0]
            shown = page.locator("table.map tbody").first.locator("tr th bdi").all_inner_texts()
            assert "<script>alert(1)</script>" in shown
            assert "invoice<U+202E>gpj.exe" in shown


def test_the_policy_itself_stops_a_script(browser: Browser, report: Path, tmp_path: Path) -> None:
    path = tmp_path / "planted.html"
    path.write_text(report.read_text().replace("</main>", "<script>document.title = 'ran'</script></main>"))
    context = browser.new_context()
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.title() == "Audit of 15 finetunes of SmolLM2-135M-Instruct"
    context.close()


def test_keyboard_links_and_landmarks(browser: Browser, report: Path) -> None:
    with opened(browser, report, 390) as page:
        page.keyboard.press("Tab")
        focus = "[document.activeElement.className, getComputedStyle(document.activeElement).outlineStyle]"
        assert page.evaluate(focus) == ["skip", "solid"]
        assert page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
        landmarks: list[Role] = ["banner", "navigation", "main", "contentinfo"]
        for landmark in landmarks:
            assert page.get_by_role(landmark).count() == 1
        region = page.get_by_role("region", name="Candidate by suite").locator(".scroll")
        region.focus()
        page.keyboard.press("ArrowRight")
        assert region.evaluate(SCROLLED)
        page.locator("#rates details > summary").focus()
        page.keyboard.press("Enter")
        assert page.locator("table.rates").is_visible()
        page.locator("table.flags th a").first.click()
        target = page.evaluate("document.querySelector(':target h3').textContent")
        assert target.endswith("smol-legal-lora-r8")
        headings = page.locator("h1, h2, h3, h4").evaluate_all(
            "all => all.map(one => Number(one.tagName[1]))"
        )
        assert headings[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(headings))
        bare = "table => !table.caption || ![...table.querySelectorAll('th')].every(one => one.scope)"
        assert page.locator("table").evaluate_all(f"all => all.filter({bare}).length") == 0


def test_paper_is_light_and_shows_what_is_folded(browser: Browser, report: Path) -> None:
    with opened(browser, report, scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 246)"
        assert page.locator("table.rates").evaluate("one => one.getBoundingClientRect().height") > 100
        assert page.pdf()[:4] == b"%PDF"


@pytest.mark.parametrize("num_suites", [7, 20])
def test_no_column_falls_off_the_paper(
    browser: Browser, report: Path, tmp_path: Path, num_suites: int
) -> None:
    path = report
    if num_suites == 20:
        path = tmp_path / "wide.html"
        write_html(LargeSweep(60, num_suites), path)
    with opened(browser, path, width=A4_LESS_MARGINS) as page:
        page.emulate_media(media="print")
        assert page.locator("table.rates thead th").count() == 2 + num_suites
        right = "all => all.map(one => [one.innerText, one.getBoundingClientRect().right])"
        ends = page.locator("table :is(th, td)").evaluate_all(right)
        assert [text for text, end in ends if end > A4_LESS_MARGINS + 0.5] == []


def test_a_thousand_candidates_open_quickly(
    browser: Browser, summary: dict[str, Any], tmp_path: Path
) -> None:
    row = json.dumps(next(row for row in summary["candidates"] if row["id"] == "dolly-mix"))
    many = [{**json.loads(row), "id": f"copy-{index:04}"} for index in range(1000)]
    path = tmp_path / "many.html"
    write_html({**summary, "counts": {}, "candidates": summary["candidates"] + many}, path)
    assert path.stat().st_size < 5_000_000
    with opened(browser, path) as page:
        assert page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") < 5000
        assert 30 < page.locator("table.map tr[data-candidate]").count() < 200, "those in view, and some more"
