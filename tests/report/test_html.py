import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ray_auditor.report import html
from ray_auditor.report.html import render_html, write_html
from ray_auditor.report.number import percent
from ray_auditor.report.printable import printable
from ray_auditor.report.summary import read_summary
from tests.report.made_sweep import NEURONPEDIA_ID

NEURONPEDIA = f"https://www.neuronpedia.org/{NEURONPEDIA_ID}/"
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def _with_only(summary: dict[str, Any], *statuses: str) -> dict[str, Any]:
    kept = [row for row in summary["candidates"] if row["status"] in statuses]
    names = {row["id"] for row in kept}
    flags = [flag for flag in summary["flags"] if flag["candidate"] in names]
    details = {name: rows for name, rows in summary["details"].items() if name in names}
    return {**summary, "counts": {}, "candidates": kept, "flags": flags, "details": details}


def test_coverage_and_noise_floor_come_before_findings_and_limits_come_too(summary: dict[str, Any]) -> None:
    text = Page(render_html(summary)).text
    place = 0
    for phrase in (
        "4 of 11 audited candidates stand out",
        "How sure",
        "Not audited",
        "From listed to flagged",
        "old-pickle",
        "Noise floor",
        "What stands out, highest score first",
        "called at a false discovery rate of 5% against 70 benign finetunes",
        "Beside benign finetunes",
        "z by candidate and suite",
        "One panel a suite",
        "Every suite of this candidate",
        "need no SAE",
        "Features that moved on",
        "The instrument",
        "Noise floor",
        "SAE gate",
        "Candidates that the SAE does not fit",
        "What the numbers mean",
        "What this does not show",
        "Held to 70 benign finetunes",
        "clears none",
    ):
        assert phrase in text[place:]
        place = text.index(phrase, place)
    assert not re.search(r"\b(safe|safety|clean|harmless)\b", text, re.I), "the report gives no assurance"


def test_every_refusal_is_named_with_its_reason(summary: dict[str, Any]) -> None:
    text = Page(render_html(summary)).text
    for row in summary["candidates"]:
        assert row["id"] in text
        assert row["reason"] is None or row["reason"] in text
    assert "4 of 15 listed candidates: 1 sae_misfit, 1 rejected, 1 skipped, 1 failed" in text


def test_the_page_asks_for_nothing(summary: dict[str, Any]) -> None:
    page = Page(render_html(summary))
    assert not page.tags & {"img", "iframe", "object", "embed", "form", "base", "use", "image"}
    for name, value in page.attributes:
        assert name not in {"src", "srcset", "style", "action", "xlink:href"}
        assert not name.startswith("on")
        assert name != "href" or value.startswith(("#", NEURONPEDIA)) or value == "data:,"
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert page.open == []


def test_the_one_script_is_the_one_that_the_policy_names(summary: dict[str, Any]) -> None:
    source = render_html(summary)
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in source
    (data,) = re.findall(r'<script type="text/plain" id="candidate-data">([^<]*)</script>', source)
    assert re.fullmatch(r"[A-Za-z0-9+/]+=*", data), "nothing that a parser could take for markup"
    assert source.count("<script") == 2
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert word not in script


def test_every_link_inside_the_page_has_its_target(summary: dict[str, Any]) -> None:
    attributes = Page(render_html(summary)).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for name, value in attributes if name == "href" and value.startswith("#")]
    targets += [one for name, value in attributes if name == "aria-labelledby" for one in value.split()]
    assert set(targets) <= set(ids)
    assert any(target.startswith("c-") for target in targets)


def test_text_from_strangers_stays_text(hostile: dict[str, Any], summary: dict[str, Any]) -> None:
    source = render_html(hostile)
    source.encode("utf-8")
    page = Page(source)
    assert page.tags <= Page(render_html(summary)).tags, "a stranger's string made an element"
    assert source.count("<h1>") == 1
    assert source.count("<script") == 2, "the page's own, and its data"
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.open == []
    assert "neuronpedia.org" not in source, "an id that is none makes no link"
    assert "1337" not in source, "a template was evaluated"
    for bad in "\x1b\x07\u202e\u2028":
        assert bad not in source
    for row in hostile["candidates"]:
        assert printable(row["id"]) in page.texts, "shown in full, as text"


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        ((), ["Nothing was listed", "nothing can be said"]),
        (("rejected", "skipped", "failed"), ["No listed candidate was audited", "3 of 3 listed candidates"]),
        (("sae_misfit",), ["The SAE fits no candidate that ran", "no longer describes it: a finding"]),
        (
            ("ok",),
            [
                "None of 7 audited candidates stands out",
                "does not clear them",
                "Every listed candidate has a result",
            ],
        ),
    ],
)
def test_a_sweep_without_findings_never_reads_as_an_all_clear(
    summary: dict[str, Any], statuses: tuple[str, ...], words: list[str]
) -> None:
    page = Page(render_html(_with_only(summary, *statuses)))
    for phrase in words:
        assert phrase in page.text
    assert page.open == []


def test_without_peers_the_rates_stand_alone_and_say_so(without_null: dict[str, Any]) -> None:
    row = next(row for row in without_null["candidates"] if row["id"] == "helpful-chat-v3")
    row["score"] = None
    for rate in row["suites"].values():
        rate["z"] = None
    rate = row["suites"]["insecure_code"]["difference_rate"]
    flags = [{"candidate": row["id"], "suite": "insecure_code", "score": rate, "rule": "seed_rate_15"}]
    page = Page(render_html({"candidates": [row], "flags": flags}))
    assert (
        f"1 of 1 audited candidate stands out: {row['id']} on insecure_code (rate {percent(rate)})"
        in page.text
    )
    assert "There are too few peers to compare with: rates stand alone." in page.text
    assert "differs by more than 15% from the general suite" in page.text
    assert "z by candidate" not in page.text
    assert ("open", "") in page.attributes, "the rates are unfolded, for there is no map"
    assert "not recorded, so no shift can be told from noise" in page.text
    row["status"] = "ok"
    assert "The one audited candidate does not stand out" in Page(render_html({"candidates": [row]})).text


def test_undetermined_is_said_and_never_drawn_as_zero(without_null: dict[str, Any]) -> None:
    def of(*names: str) -> str:
        return render_html({"candidates": [row for row in without_null["candidates"] if row["id"] in names]})

    source = of("noise-seed-11", "oasst-full")
    row = source[source.index('<tr data-candidate="noise-seed-11">') :].split("</tr>")[0]
    assert row.count('<abbr title="not determined">n.d.</abbr>') == 1 + 7
    assert row.count("z-none") == 7
    assert source.count("<circle") == 7, "one dot a panel, of the other candidate"
    assert source.count("1 n.d.") == 7
    assert "No difference rate could be determined" in of("noise-seed-11")


def test_long_sweeps_are_cut_and_say_so(summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "BOUNDS", html.Bounds(rows=2))
    text = Page(render_html(summary)).text
    for total, what in ((11, "audited candidates"), (4, "flags"), (4, "candidates without a result")):
        assert f"2 of {total} {what} are shown" in text
    assert "4 of 11 audited candidates stand out" in text, "the cut never reaches the counts"


def test_what_grows_with_candidates_times_suites_is_bounded(
    summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html, "BOUNDS", html.Bounds(cells=21, sections=3))
    source = render_html(summary)
    page = Page(source)
    assert "3 of 11 audited candidates are shown" in page.text
    assert "3 of 4 are shown, the strongest first" in page.text
    assert source.count("<article ") == 3
    ids = {value for name, value in page.attributes if name == "id"}
    shown = {html.anchor(name) for name in ("smol-legal-lora-r8", "smol-medqa-merged", "helpful-chat-v3")}
    assert {one for one in ids if one.startswith("c-") and not one.endswith("-title")} == shown
    links = [value[1:] for name, value in page.attributes if name == "href" and value.startswith("#c-")]
    assert set(links) <= ids, "a candidate without a section is no link"


def test_long_sentences_of_our_own_are_not_cut(summary: dict[str, Any]) -> None:
    summary["limits"] = ["one <b>long</b> limit, " * 30]
    assert "one &lt;b&gt;long&lt;/b&gt; limit, " * 30 in render_html(summary)


def test_the_file_appears_whole_or_not_at_all(summary: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(json.loads(json.dumps(summary)), path)
    assert path.read_text(encoding="utf-8") == render_html(summary)
    with pytest.raises(ValueError, match="counts"):
        write_html({**summary, "counts": {"ok": 99}}, path)
    assert path.read_text(encoding="utf-8") == render_html(summary)
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_a_candidate_keeps_its_anchor(summary: dict[str, Any]) -> None:
    flagged = [row.id for row in read_summary(summary).audited if row.status == "flagged"]
    for one in flagged:
        assert f'<article id="{html.anchor(one)}"' in render_html(summary)
    assert html.anchor("helpful-chat-v3") == html.anchor("helpful-chat-v3") != html.anchor("helpful-chat-v4")
