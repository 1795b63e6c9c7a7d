"""What the device kernels want of an encoder, made once per encoder and dtype."""

# Shape suffixes: F = d_sae, D = d_in padded to a whole number of 16-byte units.

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from auditor_kernels.weights import EncoderWeights


@dataclass(frozen=True, eq=False)
class Prepared:
    """Feature-major weights in the dtype of the products, and the scalars that need a host sync to learn."""

    w_FD: Tensor
    bias_F: Tensor
    threshold_F: Tensor
    has_threshold: bool
    two_sided: bool
    overflow_bound: float  # a token with sum |x| below it has finite pre-activations, whatever their signs

    def match(self, resid_ND: Tensor) -> Tensor:
        """The residuals in this dtype and width, contiguous and aligned; no copy when they already are."""
        resid_ND = resid_ND.to(self.w_FD.dtype)
        missing = self.w_FD.shape[1] - resid_ND.shape[1]
        if missing:
            return functional.pad(resid_ND, (0, missing))
        resid_ND = resid_ND.contiguous()
        return resid_ND.clone() if resid_ND.data_ptr() % 16 else resid_ND


_CACHE: WeakKeyDictionary[EncoderWeights, dict[torch.dtype, Prepared]] = WeakKeyDictionary()


def prepare(encoder: EncoderWeights, resid_dtype: torch.dtype) -> Prepared:
    """The encoder in the residuals' dtype if it has it, else both in float32 (no input is ever rounded)."""
    dtype = resid_dtype if encoder.W_enc_DF.dtype == resid_dtype else torch.float32
    by_dtype = _CACHE.setdefault(encoder, {})
    if dtype not in by_dtype:
        w_fd = encoder.W_enc_DF.t().to(dtype)
        unit = 16 // w_fd.element_size()
        missing = -w_fd.shape[1] % unit
        w_fd = functional.pad(w_fd, (0, missing)) if missing else w_fd.contiguous()  # padding by 0 would copy
        if w_fd.data_ptr() % 16:
            w_fd = w_fd.clone()
        low, high = (float(end) for end in torch.aminmax(w_fd))
        largest = max(-low, high, 1e-30)
        bias_is_small = bool((encoder.b_enc_F.abs() < 1e37).all())
        by_dtype[dtype] = Prepared(
            w_FD=w_fd,
            bias_F=encoder.b_enc_F.contiguous(),
            threshold_F=encoder.threshold_F.contiguous(),
            has_threshold=bool((encoder.threshold_F > 0).any()),
            two_sided=encoder.two_sided,
            overflow_bound=min(1e38, 1e38 / largest) if bias_is_small and largest < float("inf") else 0.0,
        )
    return by_dtype[dtype]
