"""Encoders, residuals and the float64 oracle of the `encode_topk` benchmark."""

from __future__ import annotations

from dataclasses import replace

import torch
from auditor_kernels import EncoderWeights
from auditor_kernels.dispatch import Implementation, launch
from torch import Tensor

# Name of a row, what runs, and whether it is told the base's k-th values.
DEVICE_ROWS = {
    "hopper-filter": (Implementation.HOPPER, False),
    "hopper-filter, hint": (Implementation.HOPPER, True),
    "triton-filter": (Implementation.FILTER, False),
    "triton-filter, hint": (Implementation.FILTER, True),
    "hopper-int8": (Implementation.INT8, False),
    "hopper-int8, hint": (Implementation.INT8, True),
}
# A finetune's residuals differ from the base's by noise of this relative size.
FINETUNE_NOISE = 0.1


def make_encoder(d_in: int, d_sae: int, device: str, dtype: torch.dtype) -> EncoderWeights:
    """Unit-norm Gaussian features: the hardest case for a filter, without a gap at the k-th value."""
    w_fd = torch.empty(d_sae, d_in, dtype=dtype, device=device)
    for block in w_fd.split(8192):
        rows = torch.randn(block.shape, device=device)
        block.copy_(rows / rows.norm(dim=1, keepdim=True))
    zeros = torch.zeros(d_sae, device=device)
    bias = torch.randn(d_sae, device=device) * 0.02
    return EncoderWeights(w_fd.t(), bias, zeros, torch.zeros(d_in, device=device), w_fd, None)


def sae_like(num_tokens: int, encoder: EncoderWeights) -> tuple[Tensor, EncoderWeights]:
    """Residuals made of a few popular features and of large dimensions, and the encoder with a negative bias.

    48 of the features, chosen by a power law, with exponential amplitudes, over noise; 8 dimensions are 5
    times as large. In outline what trained encoders see; it has a gap where Gaussian data have none.
    """
    w_fd = encoder.W_enc_DF.t()
    d_sae, d_in = w_fd.shape
    x_nd = torch.randn(num_tokens, d_in, device=w_fd.device) * 0.35
    for _ in range(48):
        chosen = (d_sae * torch.rand(num_tokens, device=w_fd.device) ** 3).long().clamp(max=d_sae - 1)
        amplitude = torch.empty(num_tokens, 1, device=w_fd.device).exponential_() * 12 + 1
        x_nd += w_fd[chosen].float() * amplitude
    x_nd[:, :8] *= 5
    return x_nd.to(w_fd.dtype), replace(encoder, b_enc_F=encoder.b_enc_F - 0.5)


def perturbed(x_nd: Tensor) -> Tensor:
    scale = FINETUNE_NOISE * x_nd.float().square().mean(1, keepdim=True).sqrt()
    return (x_nd + scale * torch.randn_like(x_nd, dtype=torch.float32)).to(x_nd.dtype)


def oracle(x_nd: Tensor, encoder: EncoderWeights, k: int) -> tuple[Tensor, Tensor]:
    """Float64 values and indices of the top k."""
    pre = x_nd.double() @ encoder.W_enc_DF.double() + encoder.b_enc_F.double()
    top = pre.topk(k, dim=1)
    return top.values, top.indices


def count_misses(
    x_nd: Tensor, encoder: EncoderWeights, top_idx: Tensor, k: int, truth: tuple[Tensor, Tensor] | None = None
) -> dict[str, int]:
    """Rows whose set differs from float64's, and those among them that float32 rounding does not explain."""
    values, indices = truth or oracle(x_nd, encoder, k)
    mine = top_idx.long()
    same = (mine.sort(1).values == indices.sort(1).values).all(1)
    wrong = 0
    for row in (~same).nonzero().flatten().tolist():
        w_kd = encoder.W_enc_DF.t()[mine[row].clamp(min=0)].double()
        score = w_kd @ x_nd[row].double() + encoder.b_enc_F[mine[row].clamp(min=0)].double()
        # 2^-16 relative is what the keys of the group designs resolve; float32 sums err by less.
        tolerance = 2.0**-16 * float(values[row, 0])
        distinct = mine[row].unique().numel() == k and bool((mine[row] >= 0).all())
        wrong += not (distinct and bool((score >= values[row, -1] - tolerance).all()))
    return {"rows": x_nd.shape[0], "sets_differ": int((~same).sum()), "misses": wrong}


def check_many_rows(total: int) -> list[dict[str, object]]:
    """Every device implementation against float64 over `total` rows of fresh data."""
    tokens, results = 16384, []
    for d_in, d_sae, k in ((896, 14336, 32), (896, 14336, 64), (2304, 16384, 32)):
        encoder = make_encoder(d_in, d_sae, "cuda", torch.bfloat16)
        counts = {row: {"rows": 0, "sets_differ": 0, "misses": 0, "recomputed": 0} for row in DEVICE_ROWS}
        while counts["hopper-filter"]["rows"] < total / 3:
            base = torch.randn(tokens, d_in, device="cuda", dtype=torch.bfloat16)
            tuned = perturbed(base)
            hint = launch(Implementation.FILTER, base, encoder, k, None).val_NK[:, -1].contiguous()
            truth = oracle(tuned, encoder, k)
            for row, (which, hinted) in DEVICE_ROWS.items():
                launcher = launch(which, tuned, encoder, k, hint if hinted else None)
                counts[row]["recomputed"] += launcher.num_recomputed()
                for name, number in count_misses(tuned, encoder, launcher.idx_NK, k, truth).items():
                    counts[row][name] += number
        results += [{"d_in": d_in, "d_sae": d_sae, "k": k, "row": row, **c} for row, c in counts.items()]
    return results
