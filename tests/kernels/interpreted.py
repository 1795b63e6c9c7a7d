"""Cases for Triton's interpreter; a script, because it must be switched on before Triton is imported."""

import functools
import sys

import torch
from auditor_kernels import EncoderWeights, TopK, encode_topk, fvu_parts, int8_screen
from auditor_kernels.designs import (
    capacity,
    encode_filter,
    encode_groups,
    encode_rows,
    encode_two_pass,
)
from auditor_kernels.launch import Launcher
from auditor_kernels.prepared import prepare
from auditor_kernels.reconstruct import fvu_rows
from kernel_oracle import assert_exact, make_encoder, pre_activations


def run(design, resid, encoder, k, *, hint=None, cap=None):
    """One design on poisoned outputs; returns the result and how many tokens were recomputed."""
    prepared = prepare(encoder, resid.dtype)
    kept = min(k, encoder.max_active or k)
    launcher = Launcher(
        prepared, prepared.match(resid), k, kept, cap or capacity(kept, encoder.b_enc_F.shape[0])
    )
    launcher.val_NK.fill_(7.0)
    launcher.idx_NK.fill_(7)
    if design is encode_filter:
        encode_filter(launcher, hint)
    elif design is encode_int8:
        encode_filter(launcher, hint, functools.partial(int8_screen.filter_pass, launcher))
    else:
        design(launcher)
    return TopK(launcher.val_NK, launcher.idx_NK), launcher.num_recomputed()


def encode_int8():
    """Names the filter whose product is of integers; `run` knows it."""


def kth_value(resid, encoder, k):
    pre = pre_activations(resid, encoder)
    rank = pre.abs() if encoder.two_sided else pre
    kept = min(k, encoder.max_active or k)
    return torch.where(rank > encoder.threshold_F, rank, 0.0).topk(kept, dim=1).values[:, -1].float()


def check_designs(dtype, **encoder_options):
    """Sizes that are multiples of nothing, and rows that are zero, huge, NaN and infinite."""
    encoder = make_encoder(33, 777, dtype=dtype, **encoder_options)
    resid = torch.randn(18, 33).to(dtype)
    resid[1] = 0
    resid[3, 2] = torch.nan
    resid[5, 1] = -torch.inf
    resid[7, 0] = 1e3
    for design in (encode_rows, encode_filter, encode_groups, encode_two_pass):
        top, _ = run(design, resid, encoder, 9, hint=kth_value(resid.nan_to_num(), encoder, 9))
        assert_exact(resid, encoder, 9, top, bits=16)


def case_one_sided():
    check_designs(torch.float16, max_active=6)


def case_thresholds():
    check_designs(torch.float32, threshold=0.5)


def case_two_sided():
    check_designs(torch.float32, two_sided=True, threshold=0.2)


def case_hints():
    """A good hint certifies; one too high, one that is no number and one that admits too much do not."""
    encoder = make_encoder(16, 4096)
    resid = torch.randn(16, 16)
    good = kth_value(resid, encoder, 8)
    top, recomputed = run(encode_filter, resid, encoder, 8, hint=good)
    assert recomputed == 0
    assert_exact(resid, encoder, 8, top)
    bad = good.clone()
    bad[0:2] *= 100
    bad[2] = torch.nan
    bad[3] = torch.inf
    bad[4:6] = 0
    top, recomputed = run(encode_filter, resid, encoder, 8, hint=bad)
    assert recomputed == 6
    assert_exact(resid, encoder, 8, top)


def case_int8():
    """Good hints certify, bad ones and crowded lists do not; values keep 24 bits; an outlier does no harm."""
    encoder = make_encoder(64, 2048)
    resid = torch.randn(16, 64)
    resid[:, 3] *= 1e4
    hint = kth_value(resid, encoder, 8)
    top, recomputed = run(encode_int8, resid, encoder, 8, hint=hint, cap=64)
    assert recomputed <= 2
    assert_exact(resid, encoder, 8, top)
    hint[0:2] *= 100
    hint[2] = torch.nan
    hint[3] = torch.inf
    hint[4:6] = 0
    top, recomputed = run(encode_int8, resid, encoder, 8, hint=hint, cap=64)
    assert 6 <= recomputed <= 8
    assert_exact(resid, encoder, 8, top)
    top, recomputed = run(encode_int8, resid, encoder, 8, hint=kth_value(resid, encoder, 40), cap=16)
    assert recomputed == 16
    assert_exact(resid, encoder, 8, top)


def case_int8_classes():
    """Thresholds, gates and two sides, sizes that are multiples of nothing, rows that are not finite."""
    for dtype, options in (
        (torch.float16, {"threshold": 0.5, "max_active": 6}),
        (torch.float32, {"two_sided": True, "threshold": 0.2}),
    ):
        encoder = make_encoder(33, 301, dtype=dtype, **options)
        resid = torch.randn(8, 33).to(dtype)
        resid[1] = 0
        resid[3, 2] = torch.nan
        resid[5, 1] = -torch.inf
        resid[7, 0] = 1e3
        hint = kth_value(resid.nan_to_num(), encoder, 9)
        top, _ = run(encode_int8, resid, encoder, 9, hint=hint, cap=64)
        assert_exact(resid, encoder, 9, top)


def case_overflow_fails_closed():
    """Winners that crowd one group, or a list too short for them, are recomputed and never returned short."""
    encoder = make_encoder(16, 1024)
    bias = encoder.b_enc_F.clone()
    bias[: 8 * 12] += 50
    crowded = EncoderWeights(encoder.W_enc_DF, bias, encoder.threshold_F, encoder.b_dec_D, None, None)
    resid = torch.randn(16, 16)
    for design in (encode_filter, encode_groups, encode_two_pass):
        top, recomputed = run(design, resid, crowded, 40, hint=kth_value(resid, crowded, 40))
        assert recomputed == 16, design
        assert_exact(resid, crowded, 40, top, bits=16)
    low = kth_value(resid, encoder, 30)
    top, recomputed = run(encode_filter, resid, encoder, 5, hint=low, cap=8)
    assert recomputed == 16
    assert_exact(resid, encoder, 5, top)


def case_ties():
    """Equal scores everywhere: the certificate fails and the lowest indices win."""
    ones = torch.ones(700)
    encoder = EncoderWeights(torch.zeros(16, 700), ones, ones * 0, torch.zeros(16), None, None)
    for design in (encode_rows, encode_groups):
        top, recomputed = run(design, torch.randn(16, 16), encoder, 20)
        assert recomputed == 16
        assert (top.top_idx_NK == torch.arange(20)).all()
        assert (top.top_acts_NK == 1).all()


def case_fvu():
    """The parts from the kept features, with rows that are short of features, empty and not finite."""
    for dtype, d_in, k, two_sided in ((torch.float16, 33, 9, False), (torch.float32, 700, 20, True)):
        encoder = make_encoder(d_in, 300, threshold=0.5, dtype=dtype, two_sided=two_sided)
        resid = torch.randn(7, d_in).to(dtype)
        resid[1] = 0
        resid[2, 3] = torch.nan
        resid[3, 0] = torch.inf
        top = encode_topk(resid, encoder, k=k)
        top.top_idx_NK[4], top.top_acts_NK[4] = -1, 0
        err, total = fvu_rows(resid, *top, encoder.W_dec_FD, encoder.b_dec_D)
        expected = fvu_parts(resid, top, encoder)
        assert err[2:4].isnan().all()
        assert total[2:4].isnan().all()
        assert err[4] == total[4]
        torch.testing.assert_close(err, expected[0], equal_nan=True, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(total, expected[1], equal_nan=True, rtol=1e-5, atol=1e-4)


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[f"case_{sys.argv[1]}"]()
