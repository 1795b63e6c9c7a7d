import io
import re
from typing import Any

import pytest
from rich.console import Console

from ray_auditor.report.number import percent, signed
from ray_auditor.report.printable import printable
from ray_auditor.report.summary import read_summary
from ray_auditor.report.terminal import print_candidate, print_summary


def _console(width: int = 140, **options: Any) -> Console:
    return Console(file=io.StringIO(), width=width, **options)


def _read(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_summary_names_every_flag_and_every_candidate_without_a_result(summary: dict[str, Any]) -> None:
    console = _console()
    print_summary(summary, console)
    text = _read(console)
    assert text.index("Coverage: 14 listed = 4 flagged, 7 ok, 1 rejected, 1 skipped, 1 failed") < text.index(
        "Flags"
    )
    for row in summary["candidates"]:
        assert row["id"] in text
        assert row["reason"] is None or row["reason"] in text
    body = text[text.index("Robust z by suite") :]
    for row in read_summary(summary).audited:
        line = next(line for line in body.splitlines() if f" {row.id} " in line)
        shown = [re.sub("▲", "", word) for word in line.split() if word != "▲"]
        assert shown[3:] == [signed(row.suites[suite].z) for suite in read_summary(summary).suites]
    for flag in summary["flags"]:
        rate = next(row for row in summary["candidates"] if row["id"] == flag["candidate"])["suites"][
            flag["suite"]
        ]
        assert percent(rate["difference_rate"]) in text


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
        assert percent(rate.difference_rate) in line
    feature = summary["details"]["helpful-chat-v3"]["insecure_code"]["features"][0]
    assert f"feature {feature['feature']}: rate {feature['rate_base']:.4f}" in text
    assert "shall[,] upon" in text, "the focus stands in brackets"
    only = _console()
    print_candidate(summary, "helpful-chat-v3", "sql", only)
    assert "sql" in _read(only)
    assert "medical" not in _read(only)
    assert "Features that moved" not in _read(only)


def test_a_candidate_without_a_result_shows_its_reason_and_no_number(summary: dict[str, Any]) -> None:
    console = _console()
    print_candidate(summary, "old-pickle", None, console)
    assert "Not audited: skipped:pickle_only" in _read(console)
    assert "overlap" not in _read(console)


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


def test_without_peers_the_terminal_maps_rates(summary: dict[str, Any]) -> None:
    rows = [row for row in summary["candidates"] if row["status"] == "ok"][:2]
    for row in rows:
        row["score"] = None
        for rate in row["suites"].values():
            rate["z"] = None
    console = _console()
    print_summary({"candidates": rows}, console)
    text = _read(console)
    assert "too few peers for a z" in text
    assert percent(rows[0]["suites"]["sql"]["difference_rate"]) in text
