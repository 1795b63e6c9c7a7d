"""The screened CPU path: the same promises as the reference, certificates that fail closed, equal bits."""

import pytest
import torch
from auditor_kernels import EncoderWeights, TopK, dispatch, encode_topk, screened
from auditor_kernels.dispatch import Implementation, choose
from auditor_kernels.screened import BF16_STEP, encode_screened, takes
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import assert_exact, make_encoder, pre_activations


@pytest.fixture
def ways(monkeypatch):
    """How many tokens took each way: certified at once, screened again, all dot products."""
    counts = {"first": 0, "again": 0, "all": 0}
    first, again, rank = screened._first, screened._again, screened._rank

    def watch_first(x, *rest):
        counts["first"] += len(x)
        return first(x, *rest)

    def watch_again(x, *rest):
        counts["again"] += len(x)
        return again(x, *rest)

    def watch_rank(x, rows, features, screen, kept):
        counts["all"] += len(x) == 1 and len(features) == screen.w_DF.shape[1]
        return rank(x, rows, features, screen, kept)

    monkeypatch.setattr(screened, "_first", watch_first)
    monkeypatch.setattr(screened, "_again", watch_again)
    monkeypatch.setattr(screened, "_rank", watch_rank)
    return counts


@given(
    n=st.integers(0, 40),
    d=st.integers(1, 90),
    spare=st.integers(0, 2000),
    k=st.integers(1, 128),
    threshold=st.sampled_from([0.0, 0.4, 2.5]),
    max_active=st.sampled_from([None, 1, 7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_matches_float64(n, d, spare, k, threshold, max_active, dtype, scale, seed):
    encoder = make_encoder(d, 64 * k + spare, seed=seed, max_active=max_active, dtype=dtype)
    encoder.threshold_F.fill_(threshold)
    resid = (torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1)) * scale).to(dtype)
    assert_exact(resid, encoder, k, encode_screened(resid, encoder, k=k))


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_adversarial_rows(ways, threshold):
    encoder = make_encoder(16, 3000)
    encoder.threshold_F.fill_(threshold)
    resid = torch.randn(10, 16)
    resid[1] = 0
    resid[2, 3] = torch.nan
    resid[3, 0] = torch.inf
    resid[4] = 3e38  # finite, but its pre-activations overflow
    resid[5, 7] = 1e6
    resid[6] = 1.0
    resid[7] = 1e25  # its square overflows, so that the bound is infinite
    resid[8] = 1e-42
    top = encode_screened(resid, encoder, k=32)
    for bad in (2, 3, 4):
        assert top.top_acts_NK[bad].isnan().all()
        assert (top.top_idx_NK[bad] == -1).all()
    good = torch.tensor([0, 1, 5, 6, 7, 8, 9])
    assert_exact(resid[good], encoder, 32, TopK(top.top_acts_NK[good], top.top_idx_NK[good]))
    assert ways["all"] >= 1


def test_duplicated_features_take_the_lowest_index():
    encoder = make_encoder(16, 4096)
    w_fd = encoder.W_enc_DF.t().clone()
    w_fd[2048:] = w_fd[:2048]
    bias = encoder.b_enc_F.clone()
    bias[2048:] = bias[:2048]
    encoder = EncoderWeights(w_fd.t(), bias, encoder.threshold_F, encoder.b_dec_D, None, None)
    resid = torch.randn(50, 16)
    top = encode_screened(resid, encoder, k=31)
    assert_exact(resid, encoder, 31, top)
    # k is odd, so the last pair is cut: its lower half must be the one that stays.
    assert (top.top_idx_NK[:, -1] < 2048).all()


def test_equal_scores_certify_nothing_and_the_lowest_indices_win(ways):
    ones = torch.ones(3000)
    encoder = EncoderWeights(torch.zeros(8, 3000), ones, ones * 0, torch.zeros(8), None, None)
    top = encode_screened(torch.randn(5, 8), encoder, k=40)
    assert ways == {"first": 5, "again": 5, "all": 5}
    assert (top.top_idx_NK == torch.arange(40)).all()
    assert (top.top_acts_NK == 1).all()


def test_a_crowded_group_is_searched_to_its_last_feature():
    """All winners in one group: its one maximum says nothing of the others."""
    encoder = make_encoder(32, 4096)
    groups = 4096 // screened.GROUP
    bias = encoder.b_enc_F.clone()
    bias[5::groups] += 40
    encoder = EncoderWeights(encoder.W_enc_DF, bias, encoder.threshold_F, encoder.b_dec_D, None, None)
    resid = torch.randn(64, 32)
    top = encode_screened(resid, encoder, k=32)
    assert_exact(resid, encoder, 32, top)
    assert (top.top_idx_NK % groups == 5).all()


def test_too_few_searched_groups_are_noticed(ways, monkeypatch):
    """With no group to spare the bound always reaches past those searched: all are screened again."""
    monkeypatch.setattr(screened, "SPARE_GROUPS", 0)
    encoder, resid = make_encoder(48, 8192), torch.randn(200, 48)
    top = encode_screened(resid, encoder, k=32)
    assert ways["again"] == 200
    assert_exact(resid, encoder, 32, top)


def test_every_way_gives_the_same_bits_in_any_company(monkeypatch):
    """A token's row does not depend on its neighbours, the threads, or which screen certified it."""
    encoder = make_encoder(65, 4100)
    resid = torch.randn(300, 65)
    resid[::7] *= 1000
    resid[5, 3] = torch.nan
    whole = encode_screened(resid, encoder, k=24)
    order = torch.randperm(300)
    threads = torch.get_num_threads()
    for size in (1, 17, 128):
        torch.set_num_threads(1 if size == 17 else threads)
        parts = [encode_screened(part, encoder, k=24) for part in resid[order].split(size)]
        torch.set_num_threads(threads)
        assert torch.equal(torch.cat([part.top_idx_NK for part in parts]), whole.top_idx_NK[order])
        acts = torch.cat([part.top_acts_NK for part in parts])
        assert torch.equal(acts.view(torch.int32), whole.top_acts_NK[order].view(torch.int32))
    for name, value in (("SPARE_GROUPS", 0), ("SPARE_CANDIDATES", 0)):
        monkeypatch.setattr(screened, name, value)
        slower = encode_screened(resid, encoder, k=24)
        assert torch.equal(slower.top_idx_NK, whole.top_idx_NK)
        assert torch.equal(slower.top_acts_NK.view(torch.int32), whole.top_acts_NK.view(torch.int32))


@pytest.mark.parametrize("kind", ["gauss", "outlier", "tiny", "uneven"])
def test_the_bound_holds_for_every_pair(kind):
    """1,000 tokens by 4,096 features a kind; `|score - dot product|` never exceeds what is claimed."""
    encoder = make_encoder(64, 4096)
    resid = torch.randn(1000, 64)
    if kind == "outlier":
        resid[:, 3] *= 1e4
    elif kind == "tiny":
        resid *= 1e-39
    elif kind == "uneven":
        encoder.W_enc_DF.mul_(torch.logspace(-6, 6, 4096))
    screen = screened._screen(encoder)
    x16 = torch.nn.functional.pad(resid.bfloat16(), (0, 2), value=1.0)
    score = torch.nn.functional.linear(x16, screen.w16_FD).double()
    off = (score - pre_activations(resid, encoder)).abs() - BF16_STEP * score.abs()
    assert (off <= screen.error(resid, x16[:, :-2])).all()
    exact = torch.addmm(encoder.b_enc_F, resid, encoder.W_enc_DF).double()
    assert ((exact - pre_activations(resid, encoder)).abs() <= screen.error(resid, None)).all()


def test_scores_stay_bounded(monkeypatch):
    largest = 0
    linear = torch.nn.functional.linear

    def watched(*args):
        nonlocal largest
        out = linear(*args)
        largest = max(largest, out.numel() * out.element_size())
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    encode_screened(torch.randn(3000, 4), make_encoder(4, 20000), k=8)
    assert 0 < largest <= screened.SCORE_BYTES


def test_dispatch_takes_it_where_it_is_fast_and_nowhere_else(monkeypatch):
    encoder = make_encoder(8, 2048)
    cpu = torch.device("cpu")
    monkeypatch.setattr(screened, "is_fast_here", lambda: True)
    assert choose(cpu, torch.float32, 9, encoder, 32, hinted=False)[0] is Implementation.SCREENED
    for other in (
        make_encoder(8, 2047),
        make_encoder(8, 2048, threshold=1.0),
        make_encoder(8, 2048, two_sided=True),
    ):
        assert not takes(other, 32)
        assert choose(cpu, torch.float32, 9, other, 32, hinted=False)[0] is Implementation.REFERENCE
        with pytest.raises(ValueError, match="unset AUDITOR_KERNELS"):
            encode_screened(torch.zeros(1, 8), other, k=32)
    monkeypatch.setattr(screened, "is_fast_here", lambda: False)
    assert choose(cpu, torch.float32, 9, encoder, 32, hinted=False)[0] is Implementation.REFERENCE
    monkeypatch.setenv(dispatch.OVERRIDE, "cpu-screened")
    resid = torch.randn(9, 8)
    assert torch.equal(
        encode_topk(resid, encoder, k=32).top_acts_NK, encode_screened(resid, encoder, k=32).top_acts_NK
    )
