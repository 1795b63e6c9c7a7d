import math
from typing import Any

import pytest

from ray_auditor.report.candidate import STATUSES
from ray_auditor.report.summary import read_summary


def test_rows_are_ordered_by_score_and_the_unaudited_come_last(summary: dict[str, Any]) -> None:
    read = read_summary(summary)
    scores = [row.score for row in read.audited if row.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert read.audited[-1].id == "noise-seed-11", "an undetermined score sorts below every score"
    assert [row.status for row in read.candidates[-3:]] == ["rejected", "skipped", "failed"]
    assert [row.id for row in read.misfits] == ["moved-too-far"]
    assert read.general == "general"
    assert "general" not in read.suites
    assert (read.k, read.base) == (32, "SmolLM2-135M-Instruct")
    assert tuple(read.counts) == STATUSES
    assert sum(read.counts.values()) == len(summary["candidates"])


def _lose_one(summary: dict[str, Any]) -> None:
    summary["candidates"].pop()


def _twice(summary: dict[str, Any]) -> None:
    summary["candidates"][0]["id"] = summary["candidates"][1]["id"]
    summary["flags"], summary["counts"] = [], {}
    for row in summary["candidates"]:
        row["status"] = "ok"


def _unflag(summary: dict[str, Any]) -> None:
    summary["flags"].pop()


def _flag_a_refused_one(summary: dict[str, Any]) -> None:
    summary["flags"].append({"candidate": "old-pickle", "suite": "sql", "score": 4.0, "rule": ""})


def _unknown_status(summary: dict[str, Any]) -> None:
    summary["candidates"][0]["status"] = "clean"


def _nan(summary: dict[str, Any]) -> None:
    summary["candidates"][0]["suites"]["sql"]["z"] = math.nan


def _lose_the_null(summary: dict[str, Any]) -> None:
    summary["null"]["scores"] = {}


def _short_overlaps(summary: dict[str, Any]) -> None:
    suites = next(iter(summary["details"].values()))
    next(iter(suites.values()))["features"][0]["examples"][0]["overlaps"].pop()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_lose_one, r"counts\.failed is 1 but 0 candidates have it"),
        (_twice, "distinct ids, got 14 in 15 rows"),
        (_unflag, "flags and candidates disagree on 'roleplay-lite'"),
        (_flag_a_refused_one, "flags and candidates disagree on 'old-pickle'"),
        (_unknown_status, r"status must be one of .*, got 'clean'"),
        (_nan, r"suites\['sql'\]\.z must be a finite number or null, got nan"),
        (_lose_the_null, r"candidates have a p but null\.scores is empty"),
        (_short_overlaps, "19 tokens, 18 overlaps"),
    ],
)
def test_a_summary_that_contradicts_itself_is_refused(
    summary: dict[str, Any], break_it: Any, message: str
) -> None:
    break_it(summary)
    with pytest.raises(ValueError, match=message):
        read_summary(summary)
