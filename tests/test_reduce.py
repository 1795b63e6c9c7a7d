import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_auditor.reduce import CHUNK_TOKENS, MISS_FLOOR, NonfiniteActivations, available_ks, reduce_prompts
from ray_auditor.store import TokenRows

SUITES = ("general", "maths", "sql")


def make_pair(num_tokens=60, k=6, d_sae=12, seed=0, ties=False, negative=False):
    """Base and candidate rows over the same tokens, with inactive features, few enough features to meet."""
    rng = np.random.default_rng(seed)

    def side():
        idx_NK = np.argsort(rng.random((num_tokens, d_sae)), axis=1)[:, :k].astype(np.int32)
        acts_NK = rng.exponential(size=(num_tokens, k)).astype(np.float32) + np.float32(0.01)
        if ties:
            acts_NK = np.ceil(acts_NK)
        if negative:
            acts_NK *= rng.choice([-1, 1], acts_NK.shape).astype(np.float32)
        inactive_NK = np.arange(k) >= rng.integers(0, k + 1, num_tokens)[:, None]
        idx_NK[inactive_NK], acts_NK[inactive_NK] = -1, 0
        at = np.arange(num_tokens)
        fvu = rng.random((2, num_tokens))
        moves = rng.uniform(-1, 1, num_tokens), rng.exponential(size=num_tokens)
        return TokenRows.from_unsorted(at // 25 % 3, at // 9, at, idx_NK, acts_NK, fvu[0], fvu[1], *moves)

    return side(), side()


def oracle(base, cand, k):
    """The definitions, token by token."""
    sums = {}
    for n in range(base.num_tokens):
        tops, acts = [], []
        for rows in (base, cand):
            active = [
                (abs(a), i) for i, a in zip(rows.top_idx_NK[n], rows.top_acts_NK[n], strict=True) if i >= 0
            ]
            active.sort(key=lambda one: (-one[0], one[1]))
            tops.append({i for _, i in active[:k]})
            acts.append({int(i): float(a) for a, i in active})
        overlap = len(tops[0] & tops[1])
        union = acts[0].keys() | acts[1].keys()
        smaller = sum(min(acts[0].get(i, 0), acts[1].get(i, 0)) for i in union)
        larger = sum(max(acts[0].get(i, 0), acts[1].get(i, 0)) for i in union)
        key = (SUITES[base.suite_N[n]], int(base.prompt_N[n]))
        row = sums.setdefault(key, np.zeros(13))
        floor = MISS_FLOOR * float(base.fvu_total_N[n])
        row += (
            1,
            overlap,
            max(len(tops[0]), len(tops[1]), 1) - overlap,
            smaller / larger if union else 1,
            cand.fvu_err_N[n],
            cand.fvu_total_N[n],
            base.fvu_err_N[n],
            base.fvu_total_N[n],
            cand.cosine_N[n],
            cand.change_N[n],
            float(cand.change_N[n]) ** 4,
            np.log(max(float(cand.fvu_err_N[n]), floor) / max(float(base.fvu_err_N[n]), floor)),
            (max(len(acts[0]), len(acts[1]), 1) - len(acts[0].keys() & acts[1].keys())) ** 4,
        )
    return sums


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 12),
    st.integers(0, 99),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1 << 24]),
)
def test_sums_are_those_of_the_definitions(num_tokens, k, seed, ties, negative, offset):
    pair = make_pair(num_tokens, k, 12, seed, ties, negative)
    for rows in pair:
        rows.top_idx_NK[rows.top_idx_NK >= 0] += offset  # indices that need wide keys
    table = reduce_prompts(*pair, suites=SUITES)
    names = (
        "tokens",
        "overlap",
        "shift",
        "jaccard",
        "fvu_err",
        "fvu_total",
        "base_fvu_err",
        "base_fvu_total",
        "cosine",
        "change",
        "change_quartic",
        "log_miss",
        "shift_quartic",
    )
    for kept in available_ks(k):
        expected = oracle(*pair, kept)
        assert list(zip(table["suite"].to_pylist(), table["prompt"].to_pylist(), strict=True)) == list(
            expected
        )
        for column, name in enumerate(names):
            found = table[f"{name}_{kept}" if name in ("overlap", "shift") else name].to_numpy()
            wanted = np.array([row[column] for row in expected.values()])
            if found.dtype.kind == "i":
                np.testing.assert_array_equal(found, wanted)
            else:
                np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_table_worked_by_hand():
    # token 1: A = {3, 7, 9} by activation 9 > 7 > 3, B = {7, 9}; token 2: nothing active on either side
    base = TokenRows.from_unsorted(
        [0, 0], [4, 4], [8, 9], [[3, 7, 9], [-1, -1, -1]], [[1, 2, 4], [0, 0, 0]], [1, 1], [4, 4]
    )
    cand = TokenRows.from_unsorted(
        [0, 0],
        [4, 4],
        [8, 9],
        [[7, 9, -1], [-1, -1, -1]],
        [[5, 4, 0], [0, 0, 0]],
        [2, 3],
        [4, 4],
        [0.5, -1],
        [0.25, 2],
    )
    assert reduce_prompts(base, cand, suites=["general"], ks=(1, 2)).to_pylist() == [
        {
            "suite": "general",
            "prompt": 4,
            "tokens": 2,
            "overlap_1": 0,  # 9 against 7
            "shift_1": 1 + 1,
            "overlap_2": 2,
            "shift_2": 0 + 1,
            "overlap_3": 2,
            "shift_3": 1 + 1,  # max(3, 2) - 2, and max(0, 0, 1) - 0
            "shift_quartic": 1**4 + 1**4,
            "jaccard": (2 + 4) / (1 + 5 + 4) + 1,
            "fvu_err": 5.0,
            "fvu_total": 8.0,
            "base_fvu_err": 2.0,
            "base_fvu_total": 8.0,
            "log_miss": pytest.approx(np.log(2 / 1) + np.log(3 / 1)),
            "cosine": -0.5,
            "change": 2.25,
            "change_quartic": 0.25**4 + 2.0**4,
        }
    ]


def test_the_base_against_itself_does_not_shift():
    base, _ = make_pair(300, ties=True)
    table = reduce_prompts(base, base, suites=SUITES)
    nothing = (base.top_idx_NK < 0).all(1)
    assert sum(table["shift_6"].to_pylist()) == nothing.sum()  # an empty token has shift 1 by definition
    assert sum(table["jaccard"].to_pylist()) == pytest.approx(300)


def test_chunks_do_not_show():
    base, cand = make_pair(2 * CHUNK_TOKENS + 17, 4, 9)
    whole = reduce_prompts(base, cand, suites=SUITES)
    at = np.array([suite == "maths" for suite in whole["suite"].to_pylist()])
    part_N = base.suite_N == 1
    part = reduce_prompts(
        *(
            TokenRows(*(getattr(rows, field.name)[part_N] for field in dataclasses.fields(TokenRows)))
            for rows in (base, cand)
        ),
        suites=SUITES,
    )
    assert part.num_rows > 100
    assert part.to_pydict() == whole.filter(at).to_pydict()


def test_no_tokens_give_no_rows():
    assert reduce_prompts(*make_pair(0), suites=SUITES).num_rows == 0


@pytest.mark.parametrize(
    ("name", "match"),
    [("suite_N", "row 20 is"), ("prompt_N", "row 20 is"), ("position_N", "they must be the same tokens")],
)
def test_other_tokens_are_refused(name, match):
    base, cand = make_pair()
    getattr(cand, name)[20] += 1
    with pytest.raises(ValueError, match=match):
        reduce_prompts(base, cand, suites=SUITES)


def test_other_shapes_are_refused():
    base, cand = make_pair()
    with pytest.raises(ValueError, match="60 tokens with k 6, the base 59 with k 6"):
        reduce_prompts(make_pair(59)[0], cand, suites=SUITES)
    with pytest.raises(ValueError, match="60 tokens with k 5, the base 60 with k 6"):
        reduce_prompts(base, make_pair(60, 5)[1], suites=SUITES)
    with pytest.raises(ValueError, match=r"suite must be in \[0, 2\), got 0 to 2"):
        reduce_prompts(base, cand, suites=SUITES[:2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_candidate_that_is_not_finite_is_an_error_with_its_count(value):
    base, cand = make_pair()
    for at in (3, 30):
        cand.top_idx_NK[at], cand.top_acts_NK[at] = -1, np.nan
    cand.fvu_err_N[7] = value
    with pytest.raises(NonfiniteActivations, match="3 of 60 tokens") as caught:
        reduce_prompts(base, cand, suites=SUITES)
    assert (caught.value.code, caught.value.num_tokens) == ("nonfinite_activations", 3)


def test_available_ks():
    assert available_ks(32) == (1, 5, 10, 20, 32)
    assert available_ks(8) == (1, 5, 8)
    assert available_ks(64, (64, 8, 100)) == (8, 64)
