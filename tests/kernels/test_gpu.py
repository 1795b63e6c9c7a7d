"""Every device implementation on a GPU, in the dtypes it is for, against the same oracle."""

import pytest
import torch
from auditor_kernels import EncoderWeights, TopK, encode_topk, fvu_parts, hopper
from auditor_kernels.dispatch import Implementation, choose, launch
from kernel_oracle import assert_exact, make_encoder, pre_activations

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ON_CPU = (Implementation.REFERENCE, Implementation.SCREENED)
ALL = [which for which in Implementation if which not in ON_CPU]
ON_HOPPER = (Implementation.HOPPER, Implementation.INT8)
FILTERS = [Implementation.FILTER, Implementation.HOPPER, Implementation.INT8]


def kth_value(resid: torch.Tensor, encoder: EncoderWeights, k: int) -> torch.Tensor:
    pre = pre_activations(resid, encoder)
    rank = pre.abs() if encoder.two_sided else pre
    limit = min(k, encoder.max_active or k)
    return torch.where(rank > encoder.threshold_F, rank, 0.0).topk(limit, dim=1).values[:, -1].float()


def run(
    which: Implementation,
    resid: torch.Tensor,
    encoder: EncoderWeights,
    k: int,
    hint: torch.Tensor | None = None,
) -> tuple[TopK, int]:
    """Run with outputs' memory poisoned first, so that a row nobody wrote cannot look right."""
    if which in ON_HOPPER and hopper.load()[0] is None:
        pytest.skip(hopper.load()[1])
    poison = torch.full((resid.shape[0], k), 7, dtype=torch.int32, device=DEVICE)
    del poison
    launcher = launch(which, resid, encoder, k, hint)
    return TopK(launcher.val_NK, launcher.idx_NK), launcher.num_recomputed()


@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize(
    ("dtype", "n", "d", "f", "k", "threshold", "max_active", "two_sided"),
    [
        (torch.bfloat16, 300, 256, 8192, 32, 0.0, None, False),
        (torch.bfloat16, 1, 64, 5000, 8, 0.0, None, False),
        (torch.float16, 257, 904, 9001, 17, 0.3, None, False),
        (torch.bfloat16, 130, 33, 4100, 64, 0.0, 20, False),
        (torch.bfloat16, 200, 576, 9216, 32, 1.5, None, False),
        (torch.bfloat16, 129, 128, 6000, 24, 0.2, None, True),
        (torch.float32, 257, 904, 9001, 17, 0.3, None, False),
        (torch.float16, 70, 100, 300, 128, 0.0, None, False),
    ],
)
def test_every_implementation(which, dtype, n, d, f, k, threshold, max_active, two_sided):
    if which in ON_HOPPER and (dtype == torch.float32 or two_sided):
        pytest.skip(
            "the Hopper filters take 16-bit types and one-sided encoders; dispatch sends the rest to Triton"
        )
    encoder = make_encoder(
        d, f, threshold=threshold, max_active=max_active, two_sided=two_sided, dtype=dtype, device=DEVICE
    )
    resid = torch.randn(n, d, device=DEVICE).to(dtype)
    for hint in (None, kth_value(resid, encoder, k)):
        top, _ = run(which, resid, encoder, k, hint)
        assert_exact(resid, encoder, k, top, bits=16)


@pytest.mark.parametrize("which", FILTERS)
def test_a_sample_of_features_certifies(which):
    encoder = make_encoder(256, 32768, dtype=torch.bfloat16, device=DEVICE)
    resid = torch.randn(3000, 256, device=DEVICE).bfloat16()
    for k in (1, 32, 64):
        top, recomputed = run(which, resid, encoder, k)
        assert_exact(resid, encoder, k, top, bits=16)
        assert recomputed <= (40 if which is Implementation.INT8 else 3)


@pytest.mark.parametrize("which", FILTERS)
def test_good_hints_certify_and_bad_ones_are_recomputed(which):
    encoder = make_encoder(256, 16384, dtype=torch.bfloat16, device=DEVICE)
    resid = torch.randn(512, 256, device=DEVICE).bfloat16()
    hint = kth_value(resid, encoder, 32)
    top, recomputed = run(which, resid, encoder, 32, hint)
    assert_exact(resid, encoder, 32, top, bits=16)
    assert recomputed <= 8
    hint[:100] *= 10
    hint[100:200] = 0
    hint[200:220] = torch.nan
    hint[220:230] = -torch.inf
    top, recomputed = run(which, resid, encoder, 32, hint)
    assert_exact(resid, encoder, 32, top, bits=16)
    assert recomputed >= 230


@pytest.mark.parametrize("which", ALL)
def test_adversarial_rows(which):
    encoder = make_encoder(128, 8192, dtype=torch.bfloat16, device=DEVICE)
    w_fd = encoder.W_enc_DF.t().clone()
    w_fd[4096:] = w_fd[:4096]  # every feature twice: ties everywhere
    bias = encoder.b_enc_F.clone()
    bias[4096:] = bias[:4096]
    encoder = EncoderWeights(w_fd.t(), bias, encoder.threshold_F, encoder.b_dec_D, None, None)
    resid = torch.randn(200, 128, device=DEVICE).bfloat16()
    resid[1] = 0
    resid[2, 3] = torch.nan
    resid[3, 0] = torch.inf
    resid[4] = 3e38
    resid[5, 7] = 1e4
    resid[6] = -torch.inf
    good = torch.tensor([i for i in range(200) if i not in (2, 3, 4, 6)], device=DEVICE)
    for hint in (None, kth_value(resid, encoder, 31)):
        top, _ = run(which, resid, encoder, 31, hint)
        for bad in (2, 3, 4, 6):
            assert top.top_acts_NK[bad].isnan().all()
            assert (top.top_idx_NK[bad] == -1).all()
        assert_exact(resid[good], encoder, 31, TopK(top.top_acts_NK[good], top.top_idx_NK[good]), bits=16)


@pytest.mark.parametrize("which", ALL)
def test_all_equal_rows_are_ranked_by_index(which):
    zeros = torch.zeros(64, 8192, device=DEVICE, dtype=torch.bfloat16)
    ones = torch.ones(8192, device=DEVICE)
    encoder = EncoderWeights(zeros, ones, ones * 0, torch.zeros(64, device=DEVICE), None, None)
    resid = torch.randn(40, 64, device=DEVICE).bfloat16()
    top, recomputed = run(which, resid, encoder, 64, torch.full((40,), 0.5, device=DEVICE))
    assert recomputed == 40
    assert (top.top_idx_NK == torch.arange(64, device=DEVICE)).all()
    assert (top.top_acts_NK == 1).all()


def test_one_feature_group_overflow_fails_closed():
    encoder = make_encoder(64, 8192, dtype=torch.bfloat16, device=DEVICE)
    bias = encoder.b_enc_F.clone()
    bias[:40] += 50  # 40 winners crowd one group of the tile, more than a group keeps
    encoder = EncoderWeights(encoder.W_enc_DF, bias, encoder.threshold_F, encoder.b_dec_D, None, None)
    resid = torch.randn(64, 64, device=DEVICE).bfloat16()
    for which in ALL:
        top, recomputed = run(which, resid, encoder, 32, kth_value(resid, encoder, 32))
        assert recomputed == 64 or which is not Implementation.FILTER  # the others' lists know no groups
        assert_exact(resid, encoder, 32, top, bits=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fvu_parts_match_the_cpu(dtype):
    encoder = make_encoder(576, 9216, dtype=dtype, device=DEVICE)
    resid = torch.randn(300, 576, device=DEVICE).to(dtype)
    resid[5, 0] = torch.nan
    top = encode_topk(resid, encoder, k=32)
    there = fvu_parts(resid, top, encoder)
    here = fvu_parts(resid.cpu(), TopK(top.top_acts_NK.cpu(), top.top_idx_NK.cpu()), encoder.to("cpu"))
    for ours, expected in zip(there, here, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_dispatch_runs_what_it_says(monkeypatch):
    encoder = make_encoder(64, 16384, dtype=torch.bfloat16, device=DEVICE)
    resid = torch.randn(300, 64, device=DEVICE).bfloat16()
    hint = kth_value(resid, encoder, 32)
    which, why = choose(resid.device, resid.dtype, 300, encoder, 32, hinted=True)
    if torch.cuda.get_device_capability() == (9, 0):
        assert (which is Implementation.HOPPER) == (hopper.load()[0] is not None), why
    assert_exact(resid, encoder, 32, encode_topk(resid, encoder, k=32, hint_N=hint), bits=16)
    which, why = choose(resid.device, resid.dtype, 300, encoder, 32, hinted=False)
    assert (which is Implementation.HOPPER) == (hopper.load()[0] is not None), why
    assert_exact(resid, encoder, 32, encode_topk(resid, encoder, k=32), bits=16)
    assert encode_topk(resid[:0], encoder, k=32).top_idx_NK.shape == (0, 32)
