import io
import re
from typing import Any

import pytest
from rich.console import Console

from ray_auditor.report.dossier import print_candidate
from ray_auditor.report.headline import write_headline
from ray_auditor.report.html import render_html
from ray_auditor.report.number import ABSENT, percent, signed
from ray_auditor.report.printable import printable
from ray_auditor.report.summary import read_summary
from ray_auditor.report.terminal import print_summary


def _console(width: int = 140, **options: Any) -> Console:
    return Console(file=io.StringIO(), width=width, **options)


def _read(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_summary_names_every_flag_and_every_candidate_without_a_result(summary: dict[str, Any]) -> None:
    console = _console()
    print_summary(summary, console)
    text = _read(console)
    assert text.index(
        "Coverage: 15 listed = 4 flagged, 7 ok, 1 sae_misfit, 1 rejected, 1 skipped, 1 failed"
    ) < text.index("Flags")
    for row in summary["candidates"]:
        assert row["id"] in text
        assert row["reason"] is None or row["reason"] in text
    body = text[text.index("z by suite") :]
    for row in read_summary(summary).audited:
        line = next(line for line in body.splitlines() if f" {row.id} " in line)
        shown = [re.sub("▲", "", word) for word in line.split() if word != "▲"]
        assert shown[3:] == [signed(row.suites[suite].z) for suite in read_summary(summary).suites]
    assert "null_q: called at a false discovery rate of 5% against 70 benign finetunes" in text
    assert "How sure: The strongest scores +15.9, lower end +11.1, p 0.014, q 0.035. Held to 70" in text
    assert "New: 2 of 4 flags are new" in text
    assert "SAE on the base: FVU 0.187 (at most 0.331), L0 61.4 (28.2 to 126.4)" in text
    assert re.search(r"chunking half \(1024 .* 2048\): floor, 0\.\d+ to 0\.\d+", text)
    assert re.search(r"dtype bfloat16 .*: no floor, other settings than this sweep's, ", text)
    assert "card (another kind of GPU): not measured: the workers have no GPU" in text
    table = text[text.index("\nFlags") : text.index("null_q:")]
    for row in (row for row in summary["candidates"] if row["status"] == "flagged"):
        words = next(line for line in table.splitlines() if row["id"] in line).split()
        assert (words[2] == "new") == (row["why"] == "new")
        numbers = [signed(row["score"]), signed(row["score_low"]), "0.014", "0.035"]
        assert words[words.index(row["suite"]) + 1 :][:4] == numbers
    for flag in summary["flags"]:
        rate = next(row for row in summary["candidates"] if row["id"] == flag["candidate"])["suites"][
            flag["suite"]
        ]
        assert percent(rate["difference_rate"]) in text


def test_what_somebody_looked_at_is_said_first_and_what_is_open_again_says_why(
    summary: dict[str, Any],
) -> None:
    said = {"who": "ana", "why": "read it", "until": "2027-01-31", "at": "2026-11-20T00:00:00Z"}
    first, second = summary["flags"][:2]
    first |= {"acknowledged": said, "reopened": None}
    second |= {"acknowledged": None, "reopened": "changed weights"}
    misfit = next(row for row in summary["candidates"] if row["status"] == "sae_misfit")
    misfit |= {"acknowledged": None, "reopened": "expired"}
    headline = write_headline(read_summary(summary))
    again = "2 are open again: 1 changed weights, 1 expired."
    assert headline.acknowledged == f"1 of 5 findings. {again}"
    console = _console(200)
    print_summary(summary, console)
    text = _read(console)
    assert f"Acknowledged: 1 of 5 findings. {again}" in text
    lines = text[text.index("\nFlags") :].splitlines()
    assert "acknowledged" in next(line for line in lines if first["candidate"] in line)
    assert "open again: changed weights" in next(line for line in lines if second["candidate"] in line)
    page = render_html(summary)
    assert f"<dd>1 of 5 findings. {again}</dd>" in page
    assert page.count("open again: changed weights") == page.count("open again: expired") == 1
    assert "Open again: changed weights." in page
    console = _console(200)
    print_candidate(summary, second["candidate"], None, console)
    assert "open again: changed weights" in _read(console)


def test_without_a_null_it_says_how_many_benign_ones_such_a_bound_flagged(
    summary: dict[str, Any], without_null: dict[str, Any]
) -> None:
    words = "7 to 13% of the benign finetunes scored above 3"
    assert words in write_headline(read_summary(without_null)).how_sure
    assert words not in write_headline(read_summary(summary)).how_sure


def test_a_narrow_terminal_says_what_it_leaves_out(summary: dict[str, Any]) -> None:
    console = _console(80)
    print_summary(summary, console)
    text = _read(console)
    assert re.search(r"The map of every suite needs \d+ columns", text)
    assert all(len(line) <= 80 for line in text.splitlines())
    for flag in summary["flags"]:
        assert flag["candidate"] in text


def test_one_candidate_shows_its_suites_features_and_passages(summary: dict[str, Any]) -> None:
    console = _console()
    print_candidate(summary, "helpful-chat-v3", None, console)
    text = _read(console)
    for suite, rate in read_summary(summary).by_id["helpful-chat-v3"].suites.items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [suite])
        assert f"{rate.tokens:,}" in line
        shown = [re.sub("▲", "", word) for word in line.split()[1:6]]
        if suite == "general":
            assert shown == [ABSENT, ABSENT, f"{rate.shift:.2f}", ABSENT, ABSENT]
            continue
        assert percent(rate.difference_rate) in line
        assert shown[:2] == [signed(rate.z), signed(rate.miss_z)]
    row = read_summary(summary).by_id["helpful-chat-v3"]
    assert f"score {signed(row.score)}, lower end {signed(row.score_low)}, p 0.014, q 0.035" in text
    assert "since the last sweep: new" in text
    assert "all suites together p 0.0012 if tails were normal" in " ".join(text.split())
    assert "▲ insecure_code, new: called at a false discovery rate of 5% against 70" in text
    for measure, place in (
        ("score", "3 of 10"),
        ("‖ΔW‖ / ‖W‖", "10 of 11"),
        ("mean difference on", "7 of 11"),
    ):
        line = next(line for line in text.splitlines() if line.startswith(f" {measure}"))
        assert line.rstrip().endswith(place)
    feature = summary["details"]["helpful-chat-v3"]["insecure_code"]["features"][0]
    assert f"feature {feature['feature']}: rate {feature['rate_base']:.4f}" in text
    assert f"({signed(feature['delta'], 4)}, in general {signed(feature['general_delta'], 4)})" in text
    assert "shall[,] upon" in text, "the focus stands in brackets"
    only = _console()
    print_candidate(summary, "helpful-chat-v3", "sql", only)
    assert "sql" in _read(only)
    assert "medical" not in _read(only)
    assert "Features that moved" not in _read(only)
    refused = _console()
    with pytest.raises(ValueError, match=r"show\.suite must be a suite of this candidate, got 'sqlx'"):
        print_candidate(summary, "helpful-chat-v3", "sqlx", refused)
    assert not _read(refused)


def test_a_candidate_without_a_result_shows_its_reason_and_no_number(summary: dict[str, Any]) -> None:
    console = _console()
    print_candidate(summary, "old-pickle", None, console)
    assert "Not audited: skipped:pickle_only" in _read(console)
    assert "overlap" not in _read(console)


def test_a_narrow_terminal_still_shows_where_a_candidate_strays(summary: dict[str, Any]) -> None:
    console = _console(80)
    print_candidate(summary, "helpful-chat-v3", None, console)
    lines = [line.split() for line in _read(console).splitlines()]
    assert all(len(line) <= 80 for line in _read(console).splitlines())
    for suite, rate in read_summary(summary).by_id["helpful-chat-v3"].suites.items():
        words = next(words for words in lines if words[:1] == [suite])
        z, rise = (
            (ABSENT, ABSENT) if suite == "general" else (signed(rate.miss_z), percent(rate.difference_rate))
        )
        assert words[2:5] == [z, f"{rate.shift:.2f}", rise]


def test_a_misfit_shows_what_the_sae_misses_beside_the_base(summary: dict[str, Any]) -> None:
    console = _console()
    print_candidate(summary, "moved-too-far", None, console)
    text = _read(console)
    assert "Not compared, which is a finding: sae_misfit:general_fvu" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["general", "0.612", "0.187", "6,000"] in rows
    assert ["sql", "0.701", "0.200", "6,000"] in rows
    assert "n.d." not in text, "what was not measured is left out"


def test_unknown_names_are_refused_with_the_nearest(summary: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got 'helpful-chat-v4'; nearest: \['helpful-chat-v3'"):
        print_candidate(summary, "helpful-chat-v4", None, _console())
    with pytest.raises(ValueError, match=r"show\.suite must be .* got 'sqll'; choose from \['general'"):
        print_candidate(summary, "helpful-chat-v3", "sqll", _console())


@pytest.mark.parametrize("width", [60, 140, 4000])
def test_text_from_strangers_moves_nothing_on_the_terminal(hostile: dict[str, Any], width: int) -> None:
    console = _console(width, force_terminal=True, color_system="truecolor")
    print_summary(hostile, console)
    for row in hostile["candidates"]:
        print_candidate(hostile, row["id"], None, console)
    text = _read(console)
    text.encode("utf-8")
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert set(re.findall(r"\x1b\[[0-9;]*m", text)) <= {
        f"\x1b[{code}m" for code in ("0", "1", "2", "4", "1;31", "31", "1;7", "34")
    }
    assert all(char.isprintable() or char == "\n" for char in bare)
    if width == 4000:
        for row in hostile["candidates"]:
            assert printable(row["id"]) in bare


def test_an_empty_sweep_prints_its_emptiness() -> None:
    console = _console()
    print_summary({"candidates": []}, console)
    assert "Nothing was listed" in _read(console)
    assert "Coverage: 0 listed = none" in _read(console)


def test_without_peers_the_terminal_maps_rates(without_null: dict[str, Any]) -> None:
    rows = [row for row in without_null["candidates"] if row["status"] == "ok"][:2]
    for row in rows:
        row["score"] = None
        for rate in row["suites"].values():
            rate["z"] = None
    console = _console()
    print_summary({"candidates": rows}, console)
    text = _read(console)
    assert "too few peers for a z" in text
    assert percent(rows[0]["suites"]["sql"]["difference_rate"]) in text
