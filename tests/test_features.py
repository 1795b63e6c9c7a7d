import numpy as np
import pytest

from ray_auditor.features import describe_features, moved_features
from ray_auditor.report.summary import read_summary
from ray_auditor.store import SuitePrompt, TokenRows

TOKENS = ["Ġthe", "<script>", "Ġsea", "Ċ"]


def make_rows(fires, num_prompts=20):
    """Two suites, positions 1 to 3 a prompt; `fires(suite, prompt, position)` -> {feature: act}; k = 3."""
    at, idx_NK, acts_NK = [], [], []
    for suite in range(2):
        for prompt in range(num_prompts):
            for position in (1, 2, 3):
                kept = sorted(fires(suite, prompt, position).items()) + [(-1, 0.0)] * 3
                at.append((suite, prompt, position))
                idx_NK.append([feature for feature, _ in kept[:3]])
                acts_NK.append([act for _, act in kept[:3]])
    zeros = np.zeros(len(at))
    suite_N, prompt_N, position_N = np.array(at, int).reshape(-1, 3).T
    idx_NK, acts_NK = np.array(idx_NK).reshape(-1, 3), np.array(acts_NK).reshape(-1, 3)
    return TokenRows.from_unsorted(suite_N, prompt_N, position_N, idx_NK, acts_NK, zeros, zeros)


def base_fires(suite, prompt, position):
    return {5: 1.0, 7: 2.0} if position < 3 else {5: 1.0}


def cand_fires(suite, prompt, position):
    kept = base_fires(suite, prompt, position)
    kept[9] = 0.5  # a feature that rose everywhere: a general change, no finding
    if suite == 1 and position == 2:
        del kept[7]  # fell on the suite alone
    if suite == 1 and position == 3 and prompt < 15:
        kept[11] = 1.0 + prompt  # rose on the suite alone, most on the last prompts
    return kept


@pytest.fixture
def pair():
    return make_rows(base_fires), make_rows(cand_fires)


def test_features_that_moved_on_the_suite_alone_come_first(pair):
    fell, rose = moved_features(*pair, suite=1, general=0)
    assert (fell.feature, rose.feature) == (7, 11)
    assert fell.rate_base == pytest.approx(2 / 3)
    assert fell.rate_candidate == pytest.approx(1 / 3)
    assert (fell.delta, fell.general_delta) == (pytest.approx(-1 / 3), 0)
    assert (fell.mean_act_base, fell.mean_act_candidate) == (2.0, 2.0)
    assert (fell.mean_rank_base, fell.mean_rank_candidate) == (1.0, 1.0)  # above features 5 and 9
    assert rose.delta == rose.rate_candidate == 15 / 60
    assert rose.rate_base == rose.general_delta == 0
    assert (rose.mean_act_base, rose.mean_act_candidate) == (None, 8.0)
    assert rose.mean_rank_base is None
    assert rose.mean_rank_candidate == 1 + 0 / 15  # never below another: a tie at 1.0 is none


def test_examples_are_the_tokens_that_moved_most_one_a_prompt(pair):
    fell, rose = moved_features(*pair, suite=1, general=0, num_examples=4)
    assert rose.examples == ((14, 3), (13, 3), (12, 3), (11, 3))
    assert fell.examples == ((0, 2), (1, 2), (2, 2), (3, 2))
    assert len(moved_features(*pair, suite=1, general=0, num_features=1)) == 1


def test_nothing_moved_gives_nothing(pair):
    base, cand = pair
    assert moved_features(base, base, suite=1, general=0) == []
    assert moved_features(base, cand, suite=0, general=0) == []
    assert moved_features(make_rows(base_fires, 0), make_rows(base_fires, 0), suite=1, general=0) == []


def test_records_are_what_the_report_reads(pair):
    base, cand = pair
    content = [False, True, True, True]
    prompts = [SuitePrompt(1, "sea", number, "", [0, 1, 2, 3], TOKENS, content) for number in range(20)]
    moved = moved_features(base, cand, suite=1, general=0, num_examples=1)
    records = describe_features(moved, base, cand, prompts, num_context=2)
    fell, rose = (record["examples"] for record in records)
    sides = {"base": [(7, 2.0), (5, 1.0)], "candidate": [(5, 1.0), (9, 0.5)]}  # largest first, at the focus
    assert fell == [{"prompt": 0, "tokens": TOKENS, "overlaps": [-1, 2, 1, 1], "focus": 2, "sides": sides}]
    sides = {"base": [(5, 1.0)], "candidate": [(11, 15.0), (5, 1.0), (9, 0.5)]}
    assert rose == [{"prompt": 14, "tokens": TOKENS[1:], "overlaps": [2, 1, 1], "focus": 2, "sides": sides}]
    candidate = {"id": "c", "status": "ok", "suites": {}}
    summary = read_summary({"candidates": [candidate], "details": {"c": {"sea": {"features": records}}}})
    assert [one.feature for one in summary.details["c"]["sea"]] == [7, 11]
    assert summary.details["c"]["sea"][1].delta == 0.25
