import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from ray_auditor.evaluation import (
    Label,
    auroc,
    auroc_measure,
    dose_response,
    group,
    measure_scores,
    measure_unseen,
    share_measure,
)

values = st.lists(st.integers(-5, 5), min_size=1, max_size=15)

LABELS = {
    "n1": Label("narrow", "sql"),
    "n2": Label("narrow", "law", hard=True, note="weak"),
    "d1": Label("backdoor", "trigger"),
    "p1": Label("benign"),
    "p2": Label("benign", hard=True, note="several topics"),
}


@given(values, values)
def test_auroc_is_the_share_of_pairs_in_order(bad, good):
    pairs = [(b > g) + 0.5 * (b == g) for b in bad for g in good]
    assert auroc(bad, good) == pytest.approx(sum(pairs) / len(pairs))
    statistic = mannwhitneyu(bad, good).statistic
    assert auroc(bad, good) == pytest.approx(statistic / (len(bad) * len(good)))


def test_an_interval_holds_its_value_and_narrows_with_more_finetunes():
    rng = np.random.default_rng(0)
    widths = []
    for count in (20, 200):
        one = auroc_measure("x", rng.normal(1, 1, count).tolist(), rng.normal(0, 1, count).tolist())
        assert one.low <= one.value <= one.high
        widths.append(one.high - one.low)
    assert widths[1] < widths[0] / 1.5


def test_a_perfect_score_over_few_is_no_certainty():
    one = auroc_measure("x", [3.0] * 5, [1.0] * 50)
    assert (one.value, one.high) == (1.0, 1.0)
    assert one.low == pytest.approx(0.05 ** (1 / 5))
    assert share_measure("x", [True] * 15).low == pytest.approx(0.025 ** (1 / 15))


def test_without_finetunes_there_is_no_figure():
    for one in (auroc_measure("x", [], [1.0]), auroc_measure("x", [1.0], []), share_measure("x", [])):
        assert (one.value, one.low, one.high) == (None, None, None)


def test_groups_and_the_benign_that_join_from_the_null():
    groups = group(LABELS, ["null/b"])
    assert groups.full == ("d1", "n1")
    assert groups.hard == ("n2",)
    assert groups.plain_benign == ("p1",)
    assert groups.all_benign == ("p1", "p2", "null/b")
    assert groups.backdoors == ("d1",)
    plain, everyone = measure_scores(groups, {"n1": 5, "d1": 2, "p1": 1, "p2": 3, "null/b": 0})
    assert plain.value == 1
    assert everyone.value == pytest.approx(5 / 6)  # d1 is below p2


def test_a_backdoor_is_scored_without_its_own_suite():
    asked = []

    def score_without(suite):
        asked.append(suite)
        return {"d1": 1.5, "p1": 1.0, "p2": 2.0}

    one = measure_unseen(group(LABELS, []), LABELS, score_without)
    assert asked == ["trigger"]
    assert (one.value, one.count) == (0.5, 1)
    assert measure_unseen(group({}, []), {}, score_without).value is None


def test_nothing_is_left_out_of_the_dose_response():
    suites = {"general": {"z": None}, "sql": {"z": 1.0}, "law": {"z": 2.0}}
    candidates = {name: {"score": 2.0, "p": 0.1, "suites": suites} for name in LABELS}
    rows = {row["id"]: row for row in dose_response(LABELS, candidates, {"n1": "law"})}
    assert sorted(rows) == ["d1", "n1", "n2"]
    assert [rows[name]["rank_of_target"] for name in ("n1", "n2", "d1")] == [2, 1, None]
    assert rows["n1"]["flagged_on"] == "law"
    assert rows["n2"]["note"] == "weak"
    assert rows["n2"]["flagged_on"] is None
    assert not any(
        isinstance(value, float) and math.isnan(value) for row in rows.values() for value in row.values()
    )
