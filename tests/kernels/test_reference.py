"""The reference against float64: values, order, ties, inactive features, bad rows, bounded memory."""

import pytest
import torch
from auditor_kernels import EncoderWeights, TopK, dispatch, encode_topk, encode_topk_ref, fvu, fvu_parts
from auditor_kernels.encode_topk_ref import stable_topk
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import assert_exact, make_encoder, pre_activations


@pytest.fixture(autouse=True, scope="module")
def reference_path():
    """Whatever this processor would choose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.OVERRIDE, "reference")
        yield


@given(
    n=st.integers(0, 40),
    d=st.integers(1, 70),
    f=st.integers(1, 900),
    k=st.integers(1, 128),
    threshold=st.sampled_from([0.0, 0.4, 2.5]),
    max_active=st.sampled_from([None, 1, 7]),
    two_sided=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_matches_float64(n, d, f, k, threshold, max_active, two_sided, dtype, seed):
    encoder = make_encoder(
        d, f, seed=seed, threshold=threshold, max_active=max_active, two_sided=two_sided, dtype=dtype
    )
    resid = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    k = min(k, f)
    assert_exact(resid, encoder, k, encode_topk(resid, encoder, k=k))


@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 6000),
    k=st.integers(1, 128),
    levels=st.sampled_from([2, 30, 10**6]),
)
@settings(max_examples=60, deadline=None)
def test_selection_is_stable_whatever_ties(rows, width, k, levels):
    k = min(k, width)
    generator = torch.Generator().manual_seed(width)
    score = torch.randint(1, levels + 1, (rows, width), generator=generator).float()
    values, idx = stable_topk(score, k)
    expected = score.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k])
    assert torch.equal(idx, expected.indices[:, :k])


def test_chunks_and_blocks_do_not_show(monkeypatch):
    encoder = make_encoder(24, 500, threshold=0.3, two_sided=True)
    resid = torch.randn(33, 24, generator=torch.Generator().manual_seed(3))
    whole = encode_topk(resid, encoder, k=40)
    monkeypatch.setattr(encode_topk_ref, "BLOCK_FEATURES", 64)
    monkeypatch.setattr(encode_topk_ref, "CHUNK_BYTES", 4096)
    parts = encode_topk(resid, encoder, k=40)
    assert_exact(resid, encoder, 40, parts)
    torch.testing.assert_close(whole.top_acts_NK, parts.top_acts_NK)


def test_pre_activations_stay_bounded(monkeypatch):
    largest = 0
    addmm = torch.addmm

    def watched(*args, out):
        nonlocal largest
        largest = max(largest, out.numel() * out.element_size())
        return addmm(*args, out=out)

    monkeypatch.setattr(torch, "addmm", watched)
    encode_topk(torch.randn(3000, 4), make_encoder(4, 20000), k=8)
    assert 0 < largest <= encode_topk_ref.CHUNK_BYTES


def duplicated_features(d: int, f: int) -> EncoderWeights:
    encoder = make_encoder(d, f)
    w_fd = encoder.W_enc_DF.t().clone()
    w_fd[f // 2 :] = w_fd[: f // 2]
    bias = encoder.b_enc_F.clone()
    bias[f // 2 :] = bias[: f // 2]
    return EncoderWeights(w_fd.t(), bias, encoder.threshold_F, encoder.b_dec_D, None, None)


def test_duplicated_features_take_the_lowest_index():
    encoder = duplicated_features(16, 640)
    resid = torch.randn(50, 16)
    top = encode_topk(resid, encoder, k=31)
    assert_exact(resid, encoder, 31, top)
    # k is odd, so the last pair is cut: its lower half must be the one that stays.
    assert (top.top_idx_NK[:, -1] < 320).all()


@pytest.mark.parametrize("two_sided", [False, True])
def test_adversarial_rows(two_sided):
    encoder = make_encoder(16, 3000, two_sided=two_sided)
    resid = torch.randn(8, 16)
    resid[1] = 0
    resid[2, 3] = torch.nan
    resid[3, 0] = torch.inf
    resid[4] = 3e38  # finite, but its pre-activations overflow
    resid[5, 7] = 1e6
    resid[6] = 1.0
    top = encode_topk(resid, encoder, k=32)
    for bad in (2, 3, 4):
        assert top.top_acts_NK[bad].isnan().all()
        assert (top.top_idx_NK[bad] == -1).all()
    good = torch.tensor([0, 1, 5, 6, 7])
    assert_exact(resid[good], encoder, 32, TopK(top.top_acts_NK[good], top.top_idx_NK[good]))


def test_all_equal_pre_activations_are_ranked_by_index():
    zeros = torch.zeros(8, 700)
    encoder = EncoderWeights(zeros, torch.ones(700), torch.zeros(700), torch.zeros(8), None, None)
    top = encode_topk(torch.randn(5, 8), encoder, k=64)
    assert (top.top_idx_NK == torch.arange(64)).all()
    assert (top.top_acts_NK == 1).all()


def test_threshold_is_strict_and_inactive_is_minus_one():
    w = torch.eye(4)
    encoder = EncoderWeights(
        w, torch.zeros(4), torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.zeros(4), None, None
    )
    top = encode_topk(torch.tensor([[0.0, 1.0, 1.5, 5.0]]), encoder, k=4)
    assert top.top_idx_NK.tolist() == [[3, 2, -1, -1]]
    assert top.top_acts_NK.tolist() == [[5.0, 1.5, 0.0, 0.0]]


def test_hint_changes_nothing():
    encoder = make_encoder(16, 300)
    resid = torch.randn(9, 16)
    plain = encode_topk(resid, encoder, k=5)
    for hint in (
        torch.full((9,), 1e30),
        torch.zeros(9),
        torch.full((9,), torch.nan),
        torch.full((9,), -torch.inf),
    ):
        hinted = encode_topk(resid, encoder, k=5, hint_N=hint)
        assert torch.equal(plain.top_idx_NK, hinted.top_idx_NK)


@pytest.mark.parametrize(
    ("dtype", "gather_bytes"), [(torch.float32, 1 << 20), (torch.bfloat16, 1 << 20), (torch.bfloat16, 8000)]
)
def test_fvu_parts_match_a_dense_reconstruction(dtype, gather_bytes, monkeypatch):
    monkeypatch.setattr(fvu, "GATHER_BYTES", gather_bytes)
    encoder = make_encoder(20, 200, threshold=0.5, dtype=dtype)
    resid = torch.randn(30, 20).to(dtype)
    resid[4, 0] = torch.nan
    top = encode_topk(resid, encoder, k=16)
    err, total = fvu_parts(resid, top, encoder)
    acts = torch.zeros(30, 200, dtype=torch.float64)
    acts.scatter_add_(1, top.top_idx_NK.clamp(min=0).long(), top.top_acts_NK.double())
    assert encoder.W_dec_FD is not None
    x = resid.double()
    b_dec = encoder.b_dec_D.double()
    expected_err = (x - acts @ encoder.W_dec_FD.double() - b_dec).square().sum(1)
    keep = torch.arange(30) != 4
    torch.testing.assert_close(err[keep].double(), expected_err[keep], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total[keep].double(), (x - b_dec).square().sum(1)[keep], rtol=1e-4, atol=1e-4)
    assert err[4].isnan()
    assert total[4].isnan()


def test_fvu_refuses_an_encoder_without_decoder():
    encoder = make_encoder(4, 8)
    bare = EncoderWeights(encoder.W_enc_DF, encoder.b_enc_F, encoder.threshold_F, encoder.b_dec_D, None, None)
    resid = torch.randn(2, 4)
    with pytest.raises(ValueError, match="W_dec_FD is None"):
        fvu_parts(resid, encode_topk(resid, bare, k=2), bare)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k must be in \[1, 8\], got 0"),
        ({"k": 9}, r"k must be in \[1, 8\], got 9"),
        ({"resid_ND": torch.zeros(3, 5)}, r"shape \(N, 4\), got \(3, 5\)"),
        ({"resid_ND": torch.zeros(3, 4, dtype=torch.float64)}, "float64"),
        ({"hint_N": torch.zeros(2)}, r"hint_N must be .* \(3,\)"),
        ({"hint_N": torch.zeros(3, dtype=torch.int32)}, "hint_N must be floating point"),
    ],
)
def test_bad_calls_are_refused(change, message):
    call = {"resid_ND": torch.zeros(3, 4), "encoder": make_encoder(4, 8), "k": 2} | change
    with pytest.raises(ValueError, match=message):
        encode_topk(call.pop("resid_ND"), call.pop("encoder"), **call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_enc_F": torch.zeros(3)}, r"encoder.b_enc_F must have shape \(8,\)"),
        ({"b_dec_D": torch.zeros(4, dtype=torch.float64)}, "encoder.b_dec_D must be float32"),
        ({"threshold_F": torch.full((8,), -1.0)}, "encoder.threshold_F must be >= 0, got -1.0"),
        ({"max_active": 0}, "encoder.max_active must be >= 1"),
        ({"W_dec_FD": torch.zeros(4, 8)}, r"encoder.W_dec_FD must have shape \(8, 4\)"),
        ({"W_enc_DF": torch.zeros(4, 8, dtype=torch.int8)}, "encoder.W_enc_DF must be"),
    ],
)
def test_bad_encoders_are_refused(change, message):
    fields = {
        "W_enc_DF": torch.zeros(4, 8),
        "b_enc_F": torch.zeros(8),
        "threshold_F": torch.zeros(8),
        "b_dec_D": torch.zeros(4),
        "W_dec_FD": None,
        "max_active": None,
    }
    with pytest.raises(ValueError, match=message):
        EncoderWeights(**(fields | change))


def test_moving_an_encoder_changes_the_matrices_only():
    moved = make_encoder(6, 10).to(dtype=torch.bfloat16)
    assert moved.W_enc_DF.dtype == torch.bfloat16
    assert moved.W_enc_DF.t().is_contiguous()
    assert moved.W_dec_FD is not None
    assert moved.W_dec_FD.dtype == torch.bfloat16
    assert moved.b_enc_F.dtype == moved.threshold_F.dtype == moved.b_dec_D.dtype == torch.float32
    assert pre_activations(torch.ones(1, 6), moved).shape == (1, 10)
