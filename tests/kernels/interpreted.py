"""Cases for Triton's interpreter; a script, because it must be switched on before Triton is imported."""

import functools
import sys

import torch
from auditor_kernels import EncoderWeights, TopK, encode_topk, fvu_parts, hopper, int8_rounding, int8_screen
from auditor_kernels.designs import choose_sample, encode_filter, encode_rows, hint_capacity
from auditor_kernels.launch import Launcher
from auditor_kernels.prepared import prepare
from auditor_kernels.reconstruct import fvu_rows
from kernel_oracle import assert_exact, make_encoder, pre_activations


def run(design, resid, encoder, k, *, hint=None, cap=None):
    """One design on poisoned outputs; returns the result and how many tokens were recomputed."""
    prepared = prepare(encoder, resid.dtype)
    kept = min(k, encoder.max_active or k)
    d_sae = encoder.b_enc_F.shape[0]
    slots = choose_sample(kept, d_sae).capacity if hint is None else hint_capacity(kept, d_sae)
    launcher = Launcher(prepared, prepared.match(resid), k, kept, cap or slots)
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


def model_of_filter_int8(launcher, screen, x, coins, sums, floor, count, cand):
    """What `hopper_filter.cu` does with 8-bit operands, in torch: the one part that no interpreter runs."""
    step_t1, rest_t1, size_t1 = x.scalars[:, :3].split(1, dim=1)
    score = (x.q.double() @ screen.q_FE.double().T).float() * screen.step_F * step_t1 + screen.table_F4[:, 2]
    tile = screen.tiles.repeat_interleave(int8_rounding.TILE, 0)[: launcher.d_sae]
    error = coins * ((step_t1 * tile[:, 0]) ** 2 + (rest_t1 * tile[:, 1]) ** 2).sqrt()
    error += sums * (size_t1 * tile[:, 0] + tile[:, 2])
    hit = score > torch.maximum(torch.where(floor < 0, 0.0, floor)[:, None], tile[:, 3]) - error
    count += hit.sum(1).int()
    for row, passed in enumerate(hit):
        feature = passed.nonzero().flatten()
        feature = feature[torch.randperm(len(feature))][: launcher.cap]
        bits = score[row, feature].view(torch.int32).long() << 32
        cand[row, : len(feature)] = bits | ((0x3FFFFFFF - feature) * 2)


hopper.filter_int8 = model_of_filter_int8


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
    guess = kth_value(resid.nan_to_num(), encoder, 9)
    for design, hint in ((encode_rows, None), (encode_filter, guess), (encode_filter, None)):
        top, _ = run(design, resid, encoder, 9, hint=hint)
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
    encoder = make_encoder(64, 2048, dtype=torch.float16)
    resid = torch.randn(16, 64).half()
    resid[:, 3] *= 1e3
    source, share = int8_rounding.split_dimensions(resid)
    assert (source == 3).sum() > 50  # the outlier is taken in many parts
    assert (torch.zeros(64).index_add(0, source.long(), share) - 1).abs().max() < 1e-5
    hint = kth_value(resid, encoder, 8)
    top, recomputed = run(encode_int8, resid, encoder, 8, hint=hint, cap=128)
    assert recomputed <= 2
    assert_exact(resid, encoder, 8, top)
    hint[0:2] *= 100
    hint[2] = torch.nan
    hint[3] = torch.inf
    hint[4:6] = 0
    top, recomputed = run(encode_int8, resid, encoder, 8, hint=hint, cap=128)
    assert 6 <= recomputed <= 8
    assert_exact(resid, encoder, 8, top)
    top, recomputed = run(encode_int8, resid, encoder, 8, hint=kth_value(resid, encoder, 40), cap=16)
    assert recomputed == 16
    assert_exact(resid, encoder, 8, top)
    top, recomputed = run(
        encode_int8, torch.randn(16, 64).half(), encoder, 8, cap=256
    )  # no hint; it splits as before
    assert recomputed <= 2


def case_int8_classes():
    """Thresholds, gates, sizes that are multiples of nothing, rows that are not finite."""
    for dtype, options in (
        (torch.float16, {"threshold": 0.5, "max_active": 6}),
        (torch.float16, {"threshold": 1.5}),
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
    for hint in (kth_value(resid, crowded, 40), None):
        top, recomputed = run(encode_filter, resid, crowded, 40, hint=hint)
        assert recomputed == 16
        assert_exact(resid, crowded, 40, top, bits=16)
    low = kth_value(resid, encoder, 30)
    top, recomputed = run(encode_filter, resid, encoder, 5, hint=low, cap=8)
    assert recomputed == 16
    assert_exact(resid, encoder, 5, top)


def case_ties():
    """Equal scores everywhere: the certificate fails and the lowest indices win."""
    ones = torch.ones(700)
    encoder = EncoderWeights(torch.zeros(16, 700), ones, ones * 0, torch.zeros(16), None, None)
    for design in (encode_rows, encode_filter):
        top, recomputed = run(design, torch.randn(16, 16), encoder, 20)
        assert recomputed == 16
        assert (top.top_idx_NK == torch.arange(20)).all()
        assert (top.top_acts_NK == 1).all()


def case_sample():
    """A sample of features gives a floor that certifies; one that misleads is noticed."""
    encoder = make_encoder(16, 6144)  # every third feature is sampled
    resid = torch.randn(5, 16)
    top, recomputed = run(encode_filter, resid, encoder, 8)
    assert recomputed == 0
    assert_exact(resid, encoder, 8, top)
    bias = encoder.b_enc_F.clone()
    bias[::3][:45] += 50  # the largest are all among the sampled, the floor is too high ...
    lifted = EncoderWeights(encoder.W_enc_DF, bias, encoder.threshold_F, encoder.b_dec_D, None, None)
    top, recomputed = run(encode_filter, resid, lifted, 40)
    assert recomputed == 5
    assert_exact(resid, lifted, 40, top)
    bias = encoder.b_enc_F - 100
    bias[1::3] += 200  # ... or no sampled feature is active, and the floor is 0
    sunk = EncoderWeights(encoder.W_enc_DF, bias, encoder.threshold_F, encoder.b_dec_D, None, None)
    top, recomputed = run(encode_filter, resid, sunk, 8)
    assert recomputed == 5
    assert_exact(resid, sunk, 8, top)


def case_long_lists():
    """Lists of more than 128 candidates are shortened before they are sorted, unless too many are equal."""
    encoder = make_encoder(16, 8192)
    resid = torch.randn(5, 16)
    top, recomputed = run(encode_filter, resid, encoder, 100)  # about 190 candidates
    assert recomputed <= 1
    assert_exact(resid, encoder, 100, top)
    ones = torch.zeros(8192)
    ones[::50] = 1
    equal = EncoderWeights(torch.zeros(16, 8192), ones, ones * 0, torch.zeros(16), None, None)
    top, recomputed = run(encode_filter, resid, equal, 100, hint=torch.full((5,), 0.5))
    assert recomputed == 5  # 164 equal scores are more than one sort takes
    assert (top.top_idx_NK == torch.arange(0, 5000, 50)).all()


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
