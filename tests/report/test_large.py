"""A hundred thousand candidates in one page, in a real browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from ray_auditor.report.html import write_html
from ray_auditor.report.number import decimal, probability, signed
from tests.report.large_sweep import LargeSweep
from tests.report.page import opened

NUM, NUM_SUITES = 100_000, 6
HEADS = ["Candidate", "Score", "p", "q", "General shift of 32"]
IN_VIEW = """() => { const { top } = document.querySelector("article:target").getBoundingClientRect();
  return top >= 0 && top < innerHeight / 2; }"""
TEXTS = """all => all.map(row => [row.dataset.candidate, ...[...row.querySelectorAll('td')].map(
  cell => cell.innerText.replace(/▲|flagged:/g, '').trim())])"""


@pytest.fixture(scope="module")
def sweep() -> LargeSweep:
    return LargeSweep(NUM, NUM_SUITES)


@pytest.fixture(scope="module")
def large(sweep: LargeSweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "report.html"
    write_html(sweep, path)
    return path


@pytest.fixture
def page(browser: Browser, large: Path) -> Iterator[Page]:
    with opened(browser, large) as page:
        yield page


def said(page: Page) -> str:
    return page.locator("#map [role=status]").inner_text()


def names(page: Page) -> list[str]:
    return [text for text, *_ in page.locator("table.map tr[data-candidate]").evaluate_all(TEXTS)]


def expected(sweep: LargeSweep, at: int, suites: list[str]) -> list[str]:
    if not sweep.audited[at]:
        row = sweep.candidate(at)
        return [row["id"], f"not audited: {row['status']}; {row['reason']}"]
    z = [signed(float(sweep.z[at, sweep.suites.index(suite)])) for suite in suites]
    p, q = (probability(float(values[at])) for values in (sweep.p, sweep.q))
    return [sweep.names[at], signed(float(sweep.score[at])), p, q, decimal(float(sweep.shift[at])), *z]


def in_order(sweep: LargeSweep) -> list[int]:
    """The report's order: audited ones by falling score, then the others by status and reason."""
    found = [at for at in range(NUM) if sweep.audited[at]]
    found.sort(key=lambda at: (-sweep.score[at], sweep.names[at]))
    return found


def test_it_is_small_and_opens_quickly(page: Page, large: Path) -> None:
    assert large.stat().st_size <= 5_000_000
    entry = page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
    assert entry["loadEventEnd"] < 5000, "two seconds on a machine that does nothing else: bench_report.py"
    assert said(page) == "100,000 of 100,000 candidates"
    assert page.locator("table.map tr[data-candidate]").count() < 200
    assert page.locator("table.map").get_attribute("aria-rowcount") == "100001"


def test_every_number_equals_the_sweeps(page: Page, sweep: LargeSweep) -> None:
    """Every row of the page's data, read through the page's own code, and rows in view at many places."""
    heads = page.locator("table.map thead th").all_inner_texts()
    assert heads[:5] == HEADS
    suites = heads[5:]
    assert sorted(suites) == sorted(sweep.suites)
    seen: dict[str, list[str]] = {}
    for share in (0, 0.1, 0.33, 0.5, 0.77, 0.94, 0.97, 1):
        page.evaluate("share => { const one = document.querySelector('#map .scroll');"
                      "one.scrollTop = share * one.scrollHeight; }", share)  # fmt: skip
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        for name, *cells in page.locator("table.map tr[data-candidate]").evaluate_all(TEXTS):
            seen[name] = [name, *cells]
    number = {name: at for at, name in enumerate(sweep.names)}
    assert len(seen) > 8 * 40
    assert any(not sweep.audited[number[name]] for name in seen)
    for name, cells in seen.items():
        assert cells == expected(sweep, number[name], suites)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save these rows as CSV").click()
    lines = download.value.path().read_text(encoding="utf-8").splitlines()
    assert len(lines) == NUM + 1
    for at, line in zip(in_order(sweep), lines[1:], strict=False):
        cells = expected(sweep, at, suites)
        plain = [cell.replace("\N{MINUS SIGN}", "-") for cell in cells]
        assert line.split(",")[: len(plain)] == plain


def test_it_sorts_searches_and_keeps_that_in_the_address(page: Page, sweep: LargeSweep) -> None:
    order = in_order(sweep)
    assert names(page)[:20] == [sweep.names[at] for at in order[:20]]
    head = page.locator("table.map thead th", has_text="General shift")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    largest = max(order, key=lambda at: sweep.shift[at])
    assert names(page)[0] == sweep.names[largest]
    head.get_by_role("button").click()
    smallest = decimal(float(min(sweep.shift[at] for at in order)))
    assert page.locator("table.map .shift").first.inner_text() == smallest
    suite = page.locator("table.map thead th").last
    suite.get_by_role("button").click()
    assert page.url.endswith(f"#sort=-z+{suite.inner_text()}")
    before = names(page)
    head.get_by_role("button").click()
    page.evaluate("text => { location.hash = text; }", f"sort=-z+{suite.inner_text()}")
    expect(suite).to_have_attribute("aria-sort", "descending")
    assert names(page) == before
    head.get_by_role("button").click()
    head.get_by_role("button").click()
    page.get_by_label("Name holds").fill("LEGAL")
    page.get_by_role("combobox", name="Status").select_option("flagged")
    wanted = {sweep.names[at] for at in sweep.flagged if "legal" in sweep.names[at]}
    assert set(names(page)) == wanted
    assert said(page) == f"{len(wanted)} of 100,000 candidates"
    assert page.url.endswith("#find=LEGAL&status=flagged&sort=shift")
    page.get_by_label("Name holds").fill("no such name")
    assert said(page) == "0 of 100,000 candidates"
    page.get_by_label("Name holds").fill("")
    page.get_by_role("combobox", name="Status").select_option("")
    page.get_by_role("combobox", name="Since the last sweep").select_option("new")
    new = sum(sweep.audited[at] and at % 50 == 0 for at in range(NUM))
    assert said(page) == f"{new:,} of 100,000 candidates"


def test_an_address_leads_to_any_candidate_and_keys_walk_on(
    browser: Browser, large: Path, sweep: LargeSweep
) -> None:
    order = in_order(sweep)
    middle = 47_000
    name = sweep.names[order[middle]]
    focused = "document.activeElement.dataset.candidate"
    with opened(browser, large, fragment=f"#candidate={name.replace('/', '%2F')}") as page:
        assert page.evaluate(focused) == name
        assert page.locator("table.map tr:focus").is_visible()
        for key, at in (("ArrowDown", middle + 1), ("ArrowUp", middle), ("Home", 0), ("End", NUM - 1)):
            page.keyboard.press(key)
            row = page.locator("table.map tr:focus")
            assert row.get_attribute("aria-rowindex") == str(at + 2)
            box, region = row.bounding_box(), page.locator("#map .scroll").bounding_box()
            assert box is not None
            assert region is not None
            assert region["y"] <= box["y"] <= region["y"] + region["height"] - box["height"] + 1
        page.keyboard.press("Home")
        assert page.evaluate(focused) == sweep.names[order[0]]
        page.keyboard.press("PageDown")
        assert page.evaluate("Number(document.activeElement.dataset.at)") > 5
        assert page.url.split("#candidate=")[1].replace("%2F", "/") == page.evaluate(focused)
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        assert page.locator("article:target h3").inner_text().endswith(sweep.names[order[0]])
        page.wait_for_function(IN_VIEW)
        assert page.url.endswith(page.locator("article:target").get_attribute("id") or "no id")
    with opened(browser, large, fragment="#candidate=nobody%2Fnothing") as page:
        assert said(page) == "The candidate of this address is not in this page."


def test_without_a_script_the_strongest_stand_there_and_the_rest_is_named(
    browser: Browser, large: Path, sweep: LargeSweep
) -> None:
    with opened(browser, large, script=False) as page:
        strongest = [sweep.names[at] for at in in_order(sweep)[:50]]
        assert names(page)[:50] == strongest
        note: Any = page.locator("#map noscript").text_content()
        assert f"of {int(sweep.audited.sum()):,} audited candidates are shown" in note
        assert page.locator(".controls").count() == 0
