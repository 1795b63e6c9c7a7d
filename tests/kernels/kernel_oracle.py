"""The float64 oracle that every implementation is checked against, and the encoders it is checked on."""

from __future__ import annotations

import torch
from auditor_kernels import EncoderWeights, TopK
from torch import Tensor


def make_encoder(
    d_in: int,
    d_sae: int,
    *,
    seed: int = 0,
    threshold: float = 0.0,
    max_active: int | None = None,
    two_sided: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> EncoderWeights:
    """A random encoder with unit-norm features; thresholds differ per feature when `threshold` > 0."""
    generator = torch.Generator(device=device).manual_seed(seed)
    w_fd = torch.randn(d_sae, d_in, generator=generator, device=device)
    w_fd /= w_fd.norm(dim=1, keepdim=True)
    spread_f = torch.rand(d_sae, generator=generator, device=device)
    return EncoderWeights(
        W_enc_DF=w_fd.to(dtype).t(),
        b_enc_F=torch.randn(d_sae, generator=generator, device=device) * 0.05,
        threshold_F=threshold * (0.5 + spread_f),
        b_dec_D=torch.randn(d_in, generator=generator, device=device) * 0.1,
        W_dec_FD=w_fd.to(dtype),
        max_active=max_active,
        two_sided=two_sided,
    )


def pre_activations(resid_nd: Tensor, encoder: EncoderWeights) -> Tensor:
    """Float64 pre-activations of the values as given (no rounding of the inputs)."""
    return resid_nd.double() @ encoder.W_enc_DF.double() + encoder.b_enc_F.double()


def assert_exact(
    resid_nd: Tensor, encoder: EncoderWeights, k: int, top: TopK, *, rtol: float = 2e-6, bits: int = 24
) -> None:
    """Every property `TopK` promises, against float64.

    The tolerance is that of float32 accumulation, relative to |x| |w|: a feature may be missing only if it
    lies within it of the k-th value, or of its own threshold. `bits` of mantissa are expected in the values.
    """
    acts, idx = top.top_acts_NK.double(), top.top_idx_NK.long()
    assert top.top_acts_NK.dtype == torch.float32
    assert top.top_idx_NK.dtype == torch.int32
    assert acts.shape == idx.shape == (resid_nd.shape[0], k)
    pre = pre_activations(resid_nd, encoder)
    finite = resid_nd.isfinite().all(1) & (pre.abs() < torch.finfo(torch.float32).max).all(1)
    assert acts[~finite].isnan().all()
    assert (idx[~finite] == -1).all()
    acts, idx, pre, x = acts[finite], idx[finite], pre[finite], resid_nd[finite].double()
    tol = rtol * (
        1 + x.norm(dim=1, keepdim=True) * encoder.W_enc_DF.double().norm(dim=0).max()
    ) + 2.0**-bits * pre.abs().amax(1, True)
    rank = pre.abs() if encoder.two_sided else pre
    score = torch.where(rank > encoder.threshold_F, rank, 0.0)
    size = acts.abs() if encoder.two_sided else acts

    active = idx >= 0
    assert (acts[~active] == 0).all()
    assert (active[:, :-1] >= active[:, 1:]).all()
    assert (size[:, :-1] >= size[:, 1:]).all()
    tied = active[:, 1:] & (size[:, 1:] == size[:, :-1])
    assert (idx[:, 1:] > idx[:, :-1])[tied].all()
    safe = idx.clamp(min=0)
    assert ((pre.gather(1, safe) - acts).abs() <= tol)[active].all()
    near_threshold = rank.gather(1, safe) > encoder.threshold_F[safe] - tol
    assert near_threshold[active].all()

    limit = min(k, encoder.max_active or k)
    kth = score.topk(limit, dim=1).values[:, -1:]
    taken = torch.zeros_like(score).scatter_add_(1, safe, active.double()).bool()
    assert (taken.sum(1) == active.sum(1)).all(), "a feature was returned twice"
    surely_active = score > encoder.threshold_F + tol
    must = surely_active & (score > kth + 2 * tol)
    assert taken[must].all(), "a feature above the k-th value is missing"
    assert (score.gather(1, safe) >= kth - 2 * tol)[active & (score.gather(1, safe) > 0)].all()
    count = active.sum(1)
    assert (count <= limit).all()
    assert (count >= surely_active.sum(1).clamp(max=limit)).all()
