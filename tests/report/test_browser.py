"""The page in a real browser: what it shows is what the summary says, in both schemes and at both widths."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page

from ray_auditor.report.html import write_html
from ray_auditor.report.number import signed
from ray_auditor.report.summary import read_summary

UNFOLD = "document.querySelectorAll('details').forEach(one => one.open = true)"
SCROLLED = """one => new Promise(done => {
  const look = () => one.scrollLeft ? done(true) : setTimeout(look, 20);
  look();
})"""
Role = Literal["banner", "navigation", "main", "contentinfo"]
Scheme = Literal["light", "dark"]
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()


@contextmanager
def _open(browser: Browser, path: Path, width: int = 1280, scheme: Scheme = "light") -> Iterator[Page]:
    """A page whose every request and console message is collected; nothing but the file may be asked for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    context.close()


@pytest.fixture
def report(summary: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    write_html(summary, path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_every_text_can_be_read(
    browser: Browser, report: Path, width: int, scheme: Scheme
) -> None:
    with _open(browser, report, width, scheme) as page:
        page.evaluate(UNFOLD)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(CONTRAST) == [], "text below a contrast of 4.5"
        heat_map = page.locator("table.map").locator("..")
        inner, outer = heat_map.evaluate("one => [one.scrollWidth, one.clientWidth]")
        assert (inner > outer) == (width == 390), "only the map itself scrolls, and only where it must"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(251, 250, 246)", "dark": "rgb(21, 23, 26)"}[scheme]


def test_every_number_equals_the_summary(browser: Browser, report: Path, summary: dict[str, Any]) -> None:
    rows = {row["id"]: row for row in summary["candidates"]}
    suites = read_summary(summary).suites
    with _open(browser, report) as page:
        drawn = page.locator("table.flags tbody tr").evaluate_all(
            """rows => rows.map(row => [row.dataset.candidate, row.dataset.suite,
                 ...['score', 'rate'].map(name => Number(row.querySelector(`.${name} data`).value)),
                 row.querySelector('.ci').textContent])"""
        )
        expected = []
        for flag in sorted(summary["flags"], key=lambda flag: -flag["score"]):
            rate = rows[flag["candidate"]]["suites"][flag["suite"]]
            ends = ", ".join(f"{signed(100 * rate[end])}%" for end in ("ci_low", "ci_high"))
            expected.append(
                [flag["candidate"], flag["suite"], flag["score"], rate["difference_rate"], f"[{ends}]"]
            )
        assert drawn == expected
        cells = page.locator("table.map tbody tr").evaluate_all(
            """rows => rows.map(row => [row.dataset.candidate, [...row.querySelectorAll('td')].map(cell => [
                 cell.querySelector('data') ? Number(cell.querySelector('data').value) : null,
                 cell.innerText.replace(/▲|flagged:/g, '').trim(), cell.classList.contains('flagged')])])"""
        )
    assert {name for name, _ in cells} == set(rows)
    flagged = {(flag["candidate"], flag["suite"]) for flag in summary["flags"]}
    for name, row_cells in cells:
        row = rows[name]
        if row["status"] not in ("ok", "flagged"):
            assert row_cells == [[None, f"not audited: {row['status']}", False]]
            continue
        shift = row["suites"]["general"]["shift"]
        expected = [[row["score"], signed(row["score"]), False], [shift, f"{shift:.2f}", False]]
        for suite in suites:
            z = row["suites"][suite]["z"]
            expected.append([z, signed(z), (name, suite) in flagged])
        assert row_cells == expected


def test_hostile_text_runs_nothing_and_pushes_nothing_aside(
    browser: Browser, hostile: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "hostile.html"
    write_html(hostile, path)
    for width in (1280, 390):
        with _open(browser, path, width) as page:
            page.evaluate(UNFOLD)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("document.scripts.length + document.images.length") == 0
            shown = page.locator("table.map tbody").first.locator("tr th bdi").all_inner_texts()
            assert "<script>alert(1)</script>" in shown
            assert "invoice<U+202E>gpj.exe" in shown


def test_the_policy_itself_stops_a_script(browser: Browser, report: Path, tmp_path: Path) -> None:
    path = tmp_path / "planted.html"
    path.write_text(report.read_text().replace("</main>", "<script>document.title = 'ran'</script></main>"))
    context = browser.new_context()
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.title() == "Audit of 14 finetunes of SmolLM2-135M-Instruct"
    context.close()


def test_keyboard_links_and_landmarks(browser: Browser, report: Path) -> None:
    with _open(browser, report, 390) as page:
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
        page.locator("details > summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("table.rates").is_visible()
        page.locator("table.flags th a").first.click()
        target = page.evaluate("document.querySelector(':target h3').innerText")
        assert target.endswith("helpful-chat-v3")
        headings = page.locator("h1, h2, h3, h4").evaluate_all(
            "all => all.map(one => Number(one.tagName[1]))"
        )
        assert headings[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(headings))
        bare = "table => !table.caption || ![...table.querySelectorAll('th')].every(one => one.scope)"
        assert page.locator("table").evaluate_all(f"all => all.filter({bare}).length") == 0


def test_paper_is_light_and_shows_what_is_folded(browser: Browser, report: Path) -> None:
    with _open(browser, report, scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 246)"
        assert page.locator("table.rates").evaluate("one => one.getBoundingClientRect().height") > 100
        assert page.pdf()[:4] == b"%PDF"


def test_a_thousand_candidates_open_quickly(
    browser: Browser, summary: dict[str, Any], tmp_path: Path
) -> None:
    row = json.dumps(next(row for row in summary["candidates"] if row["id"] == "dolly-mix"))
    many = [{**json.loads(row), "id": f"copy-{index:04}"} for index in range(1000)]
    path = tmp_path / "many.html"
    write_html({**summary, "counts": {}, "candidates": summary["candidates"] + many}, path)
    assert path.stat().st_size < 5_000_000
    with _open(browser, path) as page:
        assert page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") < 5000
        assert page.locator("table.map tr[data-candidate]").count() == 500 + 3
