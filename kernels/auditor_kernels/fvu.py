"""The parts of the fraction of variance unexplained, from the kept features alone."""

# Shape suffixes: N packed tokens, C tokens of a chunk, D = d_in, F = d_sae, K = kept features.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from auditor_kernels.weights import EncoderWeights, TopK

GATHER_BYTES = 64 << 20


def fvu_parts(resid_ND: Tensor, top: TopK, encoder: EncoderWeights) -> tuple[Tensor, Tensor]:
    """Squared reconstruction error and squared size of each token, both about `b_dec`.

    The reconstruction uses the kept features only; nothing of size [N, F] exists.

    Args:
        resid_ND: the residuals that were encoded; float32, bfloat16 or float16.
        top: what `encode_topk` gave for them.
        encoder: the same encoder, with `W_dec_FD`.

    Returns:
        `(|x - x_hat|^2, |x - b_dec|^2)`, each float32 [N]; NaN where the row's activations are NaN.

    Raises:
        ValueError: the encoder has no decoder, or the shapes do not fit together.
    """
    if encoder.W_dec_FD is None:
        raise ValueError("encoder.W_dec_FD is None; load the SAE with its decoder to compute FVU")
    num_tokens, d_in = resid_ND.shape
    if top.top_idx_NK.shape[0] != num_tokens or encoder.b_dec_D.shape[0] != d_in:
        raise ValueError(
            f"resid_ND has shape {tuple(resid_ND.shape)}, but top holds {top.top_idx_NK.shape[0]} tokens "
            f"and the encoder takes width {encoder.b_dec_D.shape[0]}; pass the residuals that were encoded"
        )
    w_dec_fd = encoder.W_dec_FD
    if resid_ND.is_cuda:
        from auditor_kernels.reconstruct import fvu_rows  # Triton is imported on the first CUDA call only

        with torch.cuda.device(resid_ND.device):
            return fvu_rows(resid_ND, *top, w_dec_fd, encoder.b_dec_D)
    if 4 * w_dec_fd.numel() <= GATHER_BYTES:
        w_dec_fd = w_dec_fd.float()
    err_N = resid_ND.new_empty(num_tokens, dtype=torch.float32)
    total_N = torch.empty_like(err_N)
    k = top.top_idx_NK.shape[1]
    rows = max(1, GATHER_BYTES // (4 * d_in * (1 if w_dec_fd.dtype == torch.float32 else k)))
    for start in range(0, num_tokens, rows):
        part = slice(start, start + rows)
        centred_cd = resid_ND[part].float() - encoder.b_dec_D
        recon_cd = _decode(top.top_acts_NK[part], top.top_idx_NK[part].clamp(min=0), w_dec_fd)
        total_N[part] = centred_cd.square().sum(1)
        err_N[part] = centred_cd.sub_(recon_cd).square_().sum(1)
    # A row that is not finite is NaN in both parts, never an infinity that an average would carry on.
    total_N.masked_fill_(err_N.isnan(), torch.nan)
    return err_N, total_N


def _decode(acts_CK: Tensor, idx_CK: Tensor, w_dec_FD: Tensor) -> Tensor:
    """`sum_k act_k * W_dec[idx_k]`, accumulated in float32; inactive slots carry act 0."""
    if w_dec_FD.dtype == torch.float32:
        return functional.embedding_bag(idx_CK, w_dec_FD, per_sample_weights=acts_CK, mode="sum")
    return torch.bmm(acts_CK[:, None, :], w_dec_FD[idx_CK].float()).squeeze(1)
