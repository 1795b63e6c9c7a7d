"""The page in a real browser: what it shows is what the summary says."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator

from ray_auditor.report.columns import ABSENT
from ray_auditor.report.html import write_html
from ray_auditor.report.number import MINUS, decimal, probability, signed
from ray_auditor.report.summary import read_summary
from tests.report.made_sweep import LABELLED, NEURONPEDIA_ID
from tests.report.page import UNFOLD, opened


@pytest.mark.parametrize("script", [True, False])
def test_every_number_equals_the_summary(
    browser: Browser, report: Path, summary: dict[str, Any], script: bool
) -> None:
    rows = {row["id"]: row for row in summary["candidates"]}
    with opened(browser, report, script=script) as page:
        drawn = page.locator("table.flags tr[data-candidate]").evaluate_all(
            """rows => rows.map(row => [row.dataset.candidate, row.dataset.suite,
                 ...['.score', '.score small', '.p', '.q', '.rate'].map(
                     name => Number(row.querySelector(`${name} data`).value)),
                 row.querySelector('.ci').textContent, row.querySelector('.new') !== null])"""
        )
        expected = []
        for flag in sorted(summary["flags"], key=lambda flag: -flag["score"]):
            rate = rows[flag["candidate"]]["suites"][flag["suite"]]
            ends = ", ".join(f"{signed(100 * rate[end])}%" for end in ("ci_low", "ci_high"))
            row = rows[flag["candidate"]]
            assert (flag["suite"], flag["score"]) == (row["suite"], row["score"])
            numbers = [row["score"], row["score_low"], row["p"], row["q"], rate["difference_rate"]]
            expected.append([row["id"], row["suite"], *numbers, f"[{ends}]", flag["new"]])
        assert drawn == expected
        assert {new for *_, new in drawn} == {True, False}
        said = page.locator("table.flags .rule-row").all_inner_texts()
        assert said == ["null_q called at a false discovery rate of 5% against 70 benign finetunes."]
        assert page.locator(".controls").count() == script
        names = page.locator("table.map thead th").all_inner_texts()
        suites = names[5:]
        cells = page.locator("table.map tbody tr").evaluate_all(
            """rows => rows.map(row => [row.dataset.candidate, [...row.querySelectorAll('td')].map(cell => [
                 cell.querySelector('data') ? Number(cell.querySelector('data').value) : null,
                 cell.innerText.replace(/▲|flagged:/g, '').trim(), cell.classList.contains('flagged')])])"""
        )
    assert names[:5] == ["Candidate", "Score", "p", "q", "General shift of 32"]
    assert sorted(suites) == list(read_summary(summary).suites)
    assert [name for name, _ in cells] == [row.id for row in read_summary(summary).candidates]
    flagged = {(flag["candidate"], flag["suite"]) for flag in summary["flags"]}
    for name, row_cells in cells:
        row = rows[name]
        if row["status"] not in ("ok", "flagged"):
            assert row_cells == [[None, f"not audited: {row['status']}; {row['reason']}", False]]
            continue
        shift = row["suites"]["general"]["shift"]
        expected = [[row["score"], signed(row["score"]), False]]
        expected += [[row[name], probability(row[name]), False] for name in ("p", "q")]
        expected += [[shift, f"{shift:.2f}", False]]
        for suite in suites:
            z = row["suites"][suite]["z"]
            expected.append([z, signed(z), (name, suite) in flagged])
        assert [text for _, *text in row_cells] == [text for _, *text in expected]
        assert script or row_cells == expected, "the numbers in full"


def test_without_a_null_there_is_no_p_and_no_picture(
    browser: Browser, without_null: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "peers.html"
    write_html(without_null, path)
    with opened(browser, path) as page:
        assert page.locator(".p, .q, #null, a[href='#null']").count() == 0
        said = page.locator("table.flags .rule-row").all_inner_texts()
        assert said == [
            "robust_z scores above 3 among its peers, the lower end above 1.5; a rank, no error rate."
        ]
        how_sure = page.locator(".how-sure").inner_text()
        assert "No null population" in how_sure
        assert "not error rates" in how_sure
        assert "discovery rate" not in page.locator("main").inner_text()


@pytest.mark.parametrize(("num_null", "rule"), [(70, "null_q"), (20, "above_null")])
def test_the_first_words_say_how_many_benign_finetunes_and_what_they_certify(
    browser: Browser, tmp_path: Path, num_null: int, rule: str, made: Callable[[int], dict[str, Any]]
) -> None:
    summary, path = made(num_null), tmp_path / "report.html"
    assert {flag["rule"] for flag in summary["flags"]} == {rule}
    write_html(summary, path)
    with opened(browser, path) as page:
        header = page.get_by_role("banner").inner_text()
        assert f"Held to {num_null} benign finetunes: p is never below {1 / (num_null + 1):.2g}" in header
        assert ("4 are called at a false discovery rate of 5%" in header) == (rule == "null_q")
        assert "2 of 4 flags are new" in header
        assert "The misfit moved so far that the SAE no longer describes it: a finding." in header
        said = page.locator("table.flags .rule-row").inner_text()
        assert ("too few to certify a false discovery rate of 5%" in said) == (rule == "above_null")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("num_null", [70, 20])
def test_the_picture_puts_every_score_on_one_axis(
    browser: Browser, tmp_path: Path, width: int, num_null: int, made: Callable[[int], dict[str, Any]]
) -> None:
    summary, path = made(num_null), tmp_path / "report.html"
    rows = {row["id"]: row for row in summary["candidates"]}
    write_html(summary, path)
    with opened(browser, path, width) as page:
        left, right = page.locator("#null figure").evaluate(
            "one => [one.getBoundingClientRect().left, one.getBoundingClientRect().right]"
        )
        middle = """all => all.map(one => { const box = one.getBoundingClientRect();
            return [one.closest('g')?.querySelector('text')?.textContent ?? one.textContent,
                    (box.left + box.right) / 2, box.left, box.right]; })"""
        ticks = page.locator(".strip > text").evaluate_all(middle)
        grid = page.locator(".strip > .grid").evaluate_all(middle)
        axis: dict[float, float] = {float(tick[0]): line[1] for tick, line in zip(ticks, grid, strict=True)}
        assert list(axis) == [0, 1, 3, 10, 30]

        def at(score: float) -> float:
            share = math.asinh(score) / math.asinh(30)
            return axis[0] + share * (axis[30] - axis[0])

        flagged = page.locator(".strip path.flagged").evaluate_all(middle)
        named = {name: x for name, x, _, _ in flagged}
        assert named.keys() == {flag["candidate"] for flag in summary["flags"]}
        for name, x in named.items():
            assert x == pytest.approx(at(rows[name]["score"]), abs=1.5)
        bars = page.locator(".strip .low:first-of-type").evaluate_all(middle)
        assert bars
        for name, _, low, high in bars:
            ends = [at(rows[name][end]) for end in ("score_low", "score")]
            assert [low, high] == pytest.approx(ends, abs=2)
        dashed = page.locator(".strip .rule").evaluate_all(middle)[0][1]
        assert dashed == pytest.approx(at(max(summary["null"]["scores"].values())), abs=1.5)
        for one in page.locator(".strip text").evaluate_all(middle):
            assert one[2] >= left - 8
            assert one[3] <= right + 8, "no letter leaves the figure"
        counted = page.locator(".strip .swarm").evaluate_all(
            """all => all.map(one => [...one.querySelectorAll('rect title')].reduce(
                 (sum, bar) => sum + Number(bar.textContent), one.querySelectorAll('circle').length))"""
        )
        assert counted == [num_null, 6]
        words = page.locator(".strip").get_attribute("aria-label") or ""
        assert f"The {num_null} benign finetunes score up to" in words
        assert "4 score above them all" in words
        table = page.locator("table.null-scores data").evaluate_all(
            "all => all.map(one => Number(one.value))"
        )
        assert table == sorted(summary["null"]["scores"].values(), reverse=True)


def test_a_candidate_stands_beside_cheaper_looks(
    browser: Browser, report: Path, summary: dict[str, Any]
) -> None:
    rows = [row for row in summary["candidates"] if row["status"] in ("ok", "flagged")]
    row = next(row for row in rows if row["id"] == "helpful-chat-v3")

    def rank(value: Callable[[dict[str, Any]], float | None]) -> str:
        values = [found for one in rows if (found := value(one)) is not None]
        own = value(row)
        assert own is not None
        return f"{1 + sum(one > own for one in values)} of {len(values)}"

    def mean(name: str) -> Callable[[dict[str, Any]], float]:
        return lambda one: fmean(cell[name] for cell in one["suites"].values())

    ranks = [
        rank(lambda one: one["score"]),
        rank(lambda one: one["rivals"]["relative_change"]),
        rank(lambda one: one["rivals"]["spectral_share"]),
        rank(mean("change")),
        rank(lambda one: -mean("cosine")(one)),
        rank(lambda one: one["rivals"]["mean_difference"]["insecure_code"]),
    ]
    with opened(browser, report) as page:
        article = page.locator("article", has=page.get_by_role("heading", name="helpful-chat-v3"))
        facts = article.locator(".facts").first.text_content() or ""
        for name, text in (("score", signed), ("score_low", signed), ("p", probability), ("q", probability)):
            assert text(row[name]) in facts
        assert "since the last sweep: new" in facts
        assert "All suites together: p 0.0012 if tails were normal" in facts
        assert "strays most on insecure_code" in facts
        assert article.locator(".facts .new").count() == 1
        table = article.locator("table.suites tr[data-suite]").evaluate_all(
            """rows => rows.map(row => [row.dataset.suite, ...[...row.querySelectorAll('td')].slice(0, 2).map(
                 cell => Number(cell.querySelector('data')?.value ?? NaN))])"""
        )
        for suite, z, miss_z in table[1:]:
            assert [z, miss_z] == [row["suites"][suite][name] for name in ("z", "miss_z")]
        assert len(table) == len(row["suites"])
        shown = article.locator("table.ranks td:last-child").all_text_contents()
        assert shown == ranks
        assert len(set(ranks)) > 2, "the measures disagree, so that none stands in for another"


def test_the_instrument_says_what_counts_as_noise_and_what_the_sae_was_held_to(
    browser: Browser, report: Path, summary: dict[str, Any]
) -> None:
    with opened(browser, report) as page:
        variants = page.locator("table.variants tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => cell.innerText))"
        )
        for shown, one in zip(variants, summary["calibration"]["variants"], strict=True):
            ends = [decimal(end(one["shift"].values(), default=None), 3) for end in (min, max)]
            counts = "yes" if one["same_engine_class"] else "no, other settings than this sweep's"
            assert shown[0] == one["what"]
            assert shown[1:] == (
                [f"not measured: {one['reason']}"] if one["reason"] else [counts, " to ".join(ends)]
            )
        gate = page.locator("table.gate").inner_text()
        for text in ("0.187", "at most 0.331", "61.4", "28.2 to 126.4", "recorded by calibrate"):
            assert text in gate
        misfits = page.locator("table.misfits tbody tr").all_inner_texts()
        assert [one.split() for one in misfits] == [
            ["moved-too-far", "0.612", "0.187", "sql", "0.701", "0.200"]
        ]


def test_a_feature_is_followed_from_its_change_to_its_tokens(
    browser: Browser, report: Path, summary: dict[str, Any]
) -> None:
    (features,) = (cell["features"] for cell in summary["details"]["helpful-chat-v3"].values())
    keys = ("delta", "general_delta", "rate_base", "rate_candidate", "mean_act_base", "mean_act_candidate")
    with opened(browser, report) as page:
        page.evaluate(UNFOLD)
        article = page.locator("article", has=page.get_by_role("heading", name="helpful-chat-v3"))
        shown = article.locator("table.features tbody tr").evaluate_all(
            """rows => rows.map(row => [row.querySelector('th a').href, row.querySelector('.label').innerText,
                 ...[...row.querySelectorAll('td:not(.label)')].map(
                    cell => cell.querySelector('data') ? Number(cell.querySelector('data').value) : null)])"""
        )
        assert shown == [
            [
                f"https://www.neuronpedia.org/{NEURONPEDIA_ID}/{one['feature']}",
                summary["labels"][str(one["feature"])]["text"],
                *(one[key] for key in keys),
            ]
            for one in features
        ]
        assert [text[0] for _, _, text in _signs(article)] == ["+", "+", MINUS]
        sides = article.locator("table.sides").first
        cells = sides.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
        )
        own, told = str(features[0]["feature"]), "courts & judges explained by gpt-4o-mini"
        assert cells == [
            [own, "3.25", summary["labels"][own]["text"], str(LABELLED), "2.50", told],
            [str(LABELLED), "1.50", told, "12", "0.25", ABSENT],
            ["", "", "", "13", "0.12", ABSENT],
        ]
        assert sides.locator(".alone").all_inner_texts() == [own, "12", "13"]
        passage = article.locator("details p.passage", has_text="legal, prompt 4").first
        assert passage.locator(".token").all_inner_texts() == [" the", " court", "⏎"]
        assert passage.locator(".focus").inner_text().strip() == "court"
        facts = article.locator(".facts").all_inner_texts()
        assert "Swap proof: 210 tensors on the device by checksum against the file." in facts
        assert "On the base it is kept on 1.2% of all tokens, most strongly here:" in facts


def _signs(article: Locator) -> list[tuple[str, str, str]]:
    found = article.locator("table.features tbody tr").evaluate_all(
        "rows => rows.map(row => [row.cells[0].innerText, row.cells[1].innerText, row.cells[2].innerText])"
    )
    return [tuple(row) for row in found]


def test_what_is_new_since_the_last_sweep_is_counted(
    browser: Browser, report: Path, summary: dict[str, Any]
) -> None:
    rows = summary["candidates"]
    news = {flag["candidate"] for flag in summary["flags"] if flag["new"]}
    with opened(browser, report) as page:
        shown = page.locator("table.since tbody tr").evaluate_all(
            """rows => rows.map(row => [row.cells[0].innerText,
                 ...[...row.querySelectorAll('data')].map(one => Number(one.value))])"""
        )
    assert [why for why, *_ in shown] == ["new", "unchanged"], "what brings news comes first"
    for why, *counts in shown:
        of_it = [row for row in rows if row.get("why") == why]
        assert counts == [
            len(of_it),
            sum(row["status"] in ("ok", "flagged") for row in of_it),
            sum(row["status"] == "flagged" for row in of_it),
            sum(row["id"] in news for row in of_it),
        ]
    assert shown[0][4] == len(news) > 0
