"""What the kernels take and give: a folded encoder, and the kept features of each token."""

# Shape suffixes: N packed tokens, D = d_in, F = d_sae, K = kept features.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_K = 128


@dataclass(frozen=True, eq=False)
class EncoderWeights:
    """A sparse autoencoder's encoder with every constant folded in, and its decoder for FVU.

    Feature `j` of a residual `x` has the pre-activation `pre_j = x @ W_enc_DF[:, j] + b_enc_F[j]` and is
    active iff `pre_j > threshold_F[j]` (strict; `|pre_j|` if `two_sided`). An active feature's activation is
    `pre_j` itself. ReLU, TopK, BatchTopK, JumpReLU and gated encoders are all of this form.

    Attributes:
        W_enc_DF: float32, bfloat16 or float16. Stored fastest when `W_enc_DF.t()` is contiguous.
        b_enc_F: float32; the decoder bias, scales and norms are folded in.
        threshold_F: float32, >= 0; zeros for ReLU and TopK.
        b_dec_D: float32.
        W_dec_FD: rows such that `x_hat = sum_k act_k * W_dec_FD[idx_k] + b_dec_D`; None means no FVU.
        max_active: at most this many features are active per token (the SAE's own k); None means no bound.
        two_sided: rank and threshold by `|pre|`; values keep their sign.

    Raises:
        ValueError: a shape, dtype, device or range is not as stated above.
    """

    W_enc_DF: Tensor
    b_enc_F: Tensor
    threshold_F: Tensor
    b_dec_D: Tensor
    W_dec_FD: Tensor | None
    max_active: int | None
    two_sided: bool = False

    def __post_init__(self) -> None:
        if self.W_enc_DF.ndim != 2:
            raise ValueError(f"encoder.W_enc_DF must have 2 dimensions, got {self.W_enc_DF.ndim}")
        d_in, d_sae = self.W_enc_DF.shape
        vectors = {"b_enc_F": (self.b_enc_F, d_sae), "threshold_F": (self.threshold_F, d_sae)}
        vectors["b_dec_D"] = (self.b_dec_D, d_in)
        for name, (tensor, size) in vectors.items():
            if tensor.shape != (size,):
                raise ValueError(f"encoder.{name} must have shape ({size},), got {tuple(tensor.shape)}")
            if tensor.dtype != torch.float32:
                raise ValueError(f"encoder.{name} must be float32, got {tensor.dtype}; cast it with .float()")
        if self.W_dec_FD is not None and self.W_dec_FD.shape != (d_sae, d_in):
            raise ValueError(
                f"encoder.W_dec_FD must have shape ({d_sae}, {d_in}), got {tuple(self.W_dec_FD.shape)}"
            )
        for name, matrix in (("W_enc_DF", self.W_enc_DF), ("W_dec_FD", self.W_dec_FD)):
            if matrix is not None and matrix.dtype not in FLOAT_DTYPES:
                raise ValueError(f"encoder.{name} must be float32, bfloat16 or float16, got {matrix.dtype}")
        devices = {t.device for t in (self.W_enc_DF, self.b_enc_F, self.threshold_F, self.b_dec_D)}
        if len(devices) > 1:
            raise ValueError(
                f"encoder tensors must be on one device, got {sorted(map(str, devices))}; use .to()"
            )
        if self.max_active is not None and self.max_active < 1:
            raise ValueError(f"encoder.max_active must be >= 1 or None, got {self.max_active}")
        if not bool((self.threshold_F >= 0).all()):
            lowest = float(self.threshold_F.min())
            raise ValueError(f"encoder.threshold_F must be >= 0, got {lowest}; clamp it at 0")

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> EncoderWeights:
        """Move to `device`; `dtype` applies to the two matrices only. The encoder is left feature-major."""
        w_dec_fd = self.W_dec_FD
        return replace(
            self,
            W_enc_DF=self.W_enc_DF.t().to(device=device, dtype=dtype).contiguous().t(),
            b_enc_F=self.b_enc_F.to(device),
            threshold_F=self.threshold_F.to(device),
            b_dec_D=self.b_dec_D.to(device),
            W_dec_FD=None if w_dec_fd is None else w_dec_fd.to(device=device, dtype=dtype),
        )


class TopK(NamedTuple):
    """The k largest active features of each token.

    Exact, but for one way of computing it on a wide encoder (`int8_screen.py`), which may miss a feature in
    one call of a million whatever the data.

    Attributes:
        top_acts_NK: float32, descending (by `|.|` if two-sided); 0 where inactive; NaN in the whole row when
            the residual or one of its pre-activations is not finite.
        top_idx_NK: int32, ties by lowest index; -1 where inactive and in the whole row when not finite.
    """

    top_acts_NK: Tensor
    top_idx_NK: Tensor


def check_call(resid_ND: Tensor, encoder: EncoderWeights, k: int, hint_N: Tensor | None) -> None:
    """Refuse a call whose arguments do not fit together.

    Raises:
        ValueError: naming the argument, its value, the bound and the remedy.
    """
    d_in, d_sae = encoder.W_enc_DF.shape
    if resid_ND.ndim != 2 or resid_ND.shape[1] != d_in:
        raise ValueError(
            f"resid_ND must have shape (N, {d_in}), got {tuple(resid_ND.shape)}; check the hook's width"
        )
    if resid_ND.dtype not in FLOAT_DTYPES:
        raise ValueError(f"resid_ND must be float32, bfloat16 or float16, got {resid_ND.dtype}")
    if resid_ND.device != encoder.W_enc_DF.device:
        raise ValueError(
            f"resid_ND is on {resid_ND.device}, the encoder on {encoder.W_enc_DF.device}; move one with .to()"
        )
    bound = min(MAX_K, d_sae)
    if not 1 <= k <= bound:
        raise ValueError(f"k must be in [1, {bound}], got {k}; lower k")
    if hint_N is not None:
        if hint_N.shape != resid_ND.shape[:1] or not hint_N.is_floating_point():
            raise ValueError(
                f"hint_N must be floating point of shape ({resid_ND.shape[0]},), "
                f"got {hint_N.dtype} {tuple(hint_N.shape)}; pass the k-th value of each token or None"
            )
        if hint_N.device != resid_ND.device:
            raise ValueError(
                f"hint_N is on {hint_N.device}, resid_ND on {resid_ND.device}; move it with .to()"
            )
