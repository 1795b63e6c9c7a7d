import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ray_auditor.conformal import cross_conformal_p, null_size_needed, q_values, smallest_level

finite = st.floats(-1e6, 1e6, allow_nan=False)


def conformal_p(scores, null):
    """Every null member under the same fit."""
    return cross_conformal_p(np.tile(np.asarray(scores, float), (len(null), 1)), null)


def test_a_table_by_hand():
    null = [0.1, 0.2, 0.3, 0.4]
    assert conformal_p([0.05, 0.2, 0.35, 0.4, 9.0, np.nan], null).tolist() == [1.0, 0.8, 0.4, 0.4, 0.2, 1.0]


def test_benjamini_hochberg_by_hand():
    assert q_values([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.9])
    assert len(q_values([])) == 0


@given(st.lists(finite, min_size=1, max_size=40), st.lists(finite, min_size=1, max_size=40))
def test_it_counts_what_a_loop_counts_in_any_order(scores, null):
    expected = [(1 + sum(other >= score for other in null)) / (len(null) + 1) for score in scores]
    assert conformal_p(scores, null[::-1]).tolist() == expected


@given(st.integers(1, 500), st.integers(1, 1000), st.integers(1, 20), st.floats(0.001, 0.5))
def test_the_null_size_needed_is_the_smallest_that_certifies_the_level(num_null, num_cand, num_out, level):
    best = q_values(
        np.r_[np.full(min(num_out, num_cand), 1 / (num_null + 1)), np.ones(max(0, num_cand - num_out))]
    )
    if num_out <= num_cand:
        assert smallest_level(num_null, num_cand, num_out) == pytest.approx(min(1, best[0]))
    needed = null_size_needed(level, num_cand, num_out)
    assert smallest_level(needed, num_cand, num_out) <= level * (1 + 1e-9)
    if needed:
        assert smallest_level(needed - 1, num_cand, num_out) > level * (1 - 1e-9)


def test_a_benign_candidate_is_called_as_often_as_the_level_says():
    rng = np.random.default_rng(0)
    for level in (0.01, 0.05, 0.2):
        null, scores = rng.normal(size=(4000, 199)), rng.normal(size=4000)
        called = sum(conformal_p([score], row)[0] <= level for score, row in zip(scores, null, strict=True))
        assert binomtest(int(called), 4000, level).pvalue > 0.001


def test_the_false_discovery_rate_is_kept_with_a_shared_null():
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(400):
        scores = np.r_[rng.normal(size=80), rng.normal(6, 1, size=20)]
        called = q_values(conformal_p(scores, rng.normal(size=399))) <= 0.1
        shares.append(called[:80].sum() / max(called.sum(), 1))
    assert np.mean(shares) <= 0.1


def test_a_null_without_scores_is_refused():
    for null in ([], [1.0, np.nan]):
        with pytest.raises(ValueError, match="a null must hold scores"):
            conformal_p([1.0], null)
        with pytest.raises(ValueError, match="a null must hold scores"):
            cross_conformal_p(np.ones((len(null), 1)), null)
