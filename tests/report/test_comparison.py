"""Two sweeps side by side."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_auditor.__main__ import main
from ray_auditor.report.comparison import compare, print_comparison

KEYS = {"base_key": "b", "sae_key": "s", "hook_name": "h", "suites_key": "u", "k": 32, "engine_class": "e"}
SAID = {"who": "ada", "why": "ours", "until": "2027-01-31", "at": "2026-11-22T07:00:00Z"}


@pytest.fixture
def before(summary: dict[str, Any]) -> dict[str, Any]:
    summary["settings"] |= KEYS
    for at, row in enumerate(summary["candidates"]):
        row["content_sha256"] = f"{at:064x}"
    return summary


def row_of(summary: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = (row for row in summary["candidates"] if row["id"] == name)
    return row


def test_a_sweep_does_not_differ_from_itself(before: dict[str, Any]) -> None:
    same = compare(before, copy.deepcopy(before) | {"generated_at": "later"})
    assert (same.changes, same.num_same, same.alerts) == ((), len(before["flags"]) + 1, False)
    assert [same.listed, same.unlisted, same.lost, same.notes] == [(), (), {}, ()]


def test_every_kind_of_change_is_told_apart_with_its_reason(before: dict[str, Any]) -> None:
    after = copy.deepcopy(before)
    first, second, third, fourth = (flag["candidate"] for flag in before["flags"][:4])
    after["flags"][0] |= {"rule": "above_null", "acknowledged": SAID}
    row_of(after, second)["status"], row_of(after, second)["reason"] = "failed", "failed: a worker died"
    row_of(after, third)["content_sha256"] = "f" * 64
    row_of(after, fourth)["status"] = "ok"
    after["flags"] = [flag for flag in after["flags"] if flag["candidate"] not in (second, fourth)]
    after["candidates"] = [row for row in after["candidates"] if row["id"] != "moved-too-far"]
    newcomer = copy.deepcopy(row_of(before, first)) | {"id": "newcomer"}
    after["candidates"].append(newcomer)
    after["flags"].append({"candidate": "newcomer", "suite": "sql", "score": 9.0, "rule": "null_q"})
    oasst = row_of(after, "oasst-full")
    oasst["status"] = "flagged"
    after["flags"].append({"candidate": "oasst-full", "suite": "sql", "score": 4.0, "rule": "null_q"})
    found = compare(before, after)
    told = {(change.candidate, change.what): change.why for change in found.changes}
    assert told == {
        ("newcomer", "new"): "the candidate was not listed",
        ("oasst-full", "new"): "the same weights, held to other finetunes or other bounds",
        (first, "changed"): "rule null_q -> above_null; acknowledged",
        (second, "gone"): "it is not audited: failed: a worker died",
        (third, "changed"): "changed weights",
        (fourth, "gone"): "the same weights, held to other finetunes or other bounds",
        ("moved-too-far", "gone"): "the candidate is no longer listed",
    }
    assert [change.what for change in found.changes] == sorted(
        (change.what for change in found.changes), key=("new", "changed", "gone").index
    )
    assert (found.listed, found.unlisted) == (("newcomer",), ("moved-too-far",))
    assert found.lost == {second: "failed: a worker died"}
    assert found.alerts
    back = compare(after, before)
    assert {change.candidate for change in back.changes if change.what == "gone"} == {
        "newcomer",
        "oasst-full",
    }


def test_an_acknowledgement_alone_is_nothing_to_look_at(before: dict[str, Any]) -> None:
    after = copy.deepcopy(before)
    after["flags"][0]["acknowledged"] = SAID
    (change,) = compare(before, after).changes
    assert (change.what, change.why) == ("changed", "acknowledged")
    assert not compare(before, after).alerts
    assert compare(after, before).alerts  # it is open again
    after["flags"][0]["rule"] = "robust_z"
    assert compare(before, after).alerts


def test_a_score_changes_when_it_leaves_the_interval(before: dict[str, Any]) -> None:
    name, score = before["flags"][0]["candidate"], before["flags"][0]["score"]
    low = row_of(before, name)["score_low"]
    for now, now_low, said in (
        (low + 0.01, low - 1, ""),
        (low - 0.01, low - 1, "its score fell below the interval it had"),
        (score + 2, score + 1, "its score rose beyond the one it had, by more than its interval"),
    ):
        after = copy.deepcopy(before)
        after["flags"][0]["score"], row_of(after, name)["score_low"] = now, now_low
        assert [change.why for change in compare(before, after).changes] == ([said] if said else [])


def test_a_result_that_is_lost_alerts_even_when_nothing_stood_out(before: dict[str, Any]) -> None:
    after = copy.deepcopy(before)
    row_of(after, "oasst-full").update(status="deferred", reason="deferred:stall")
    assert compare(before, after).lost == {"oasst-full": "deferred:stall"}
    assert compare(before, after).alerts


@pytest.mark.parametrize("name", ["base_key", "sae_key", "hook_name", "suites_key", "k"])
def test_sweeps_that_cannot_be_compared_are_refused_by_name(before: dict[str, Any], name: str) -> None:
    after = copy.deepcopy(before)
    after["settings"][name] = "another"
    with pytest.raises(ValueError, match=rf"got others in {name} \({KEYS[name]} and another\)"):
        compare(before, after)


def test_what_else_moves_scores_is_noted(before: dict[str, Any]) -> None:
    after = copy.deepcopy(before)
    after["settings"]["engine_class"] = "another"
    after["settings"]["flag"]["min_z"] = 4.0
    after["null"]["units"] = {"n": "f" * 64}
    notes = compare(before, after).notes
    assert len(notes) == 3
    assert notes[1] == "flag.min_z is 3.0 in the first, 4.0 in the second"


def test_the_verb_prints_for_people_and_for_programs(
    before: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = copy.deepcopy(before)
    after["flags"][0]["acknowledged"] = SAID
    for name, one in (("a", before), ("b", after), ("c", after | {"settings": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(one | {"exit_code": 2}))
    paths = {name: str(tmp_path / name) for name in "abc"}
    assert main(["diff", paths["a"], paths["a"]]) == 0
    assert main(["diff", paths["a"], paths["b"]]) == 0
    assert main(["diff", paths["b"], paths["a"]]) == 1
    assert "0 new, 1 changed, 0 gone" in capsys.readouterr().out
    assert main(["diff", paths["a"], paths["b"], "diff.format=json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [change["why"] for change in told["changes"]] == ["acknowledged"]
    assert told["changes"][0]["after"]["acknowledged"] == SAID
    assert main(["diff", paths["a"], paths["c"]]) == 4
    assert main(["diff", paths["a"]]) == 4
    assert "diff.after must be given" in capsys.readouterr().err


def test_names_are_text(hostile: dict[str, Any]) -> None:
    hostile["settings"] |= KEYS
    empty = hostile | {"candidates": [], "flags": []}
    file = io.StringIO()
    print_comparison(compare(empty, hostile), Console(file=file, width=400, force_terminal=True))
    assert "\x1b]8" not in file.getvalue()
    assert "\u202e" not in file.getvalue()
    assert "[red]bold[/red]" in file.getvalue()
