"""Which implementation runs, and why."""

# Shape suffixes: N packed tokens, D = d_in, F = d_sae, K = kept features.

from __future__ import annotations

from torch import Tensor

from auditor_kernels.encode_topk_ref import encode_topk_ref
from auditor_kernels.weights import EncoderWeights, TopK, check_call


def encode_topk(resid_ND: Tensor, encoder: EncoderWeights, *, k: int, hint_N: Tensor | None = None) -> TopK:
    """Encode residuals and keep the k largest active features of each token.

    Args:
        resid_ND: normalised residuals; float32, bfloat16 or float16, on the encoder's device.
        encoder: the folded encoder.
        k: features to keep, 1 to min(128, F).
        hint_N: a guess of each token's k-th value, such as that of the base model. A guess can cost time,
            never correctness.

    Returns:
        The kept features; see `TopK`.

    Raises:
        ValueError: an argument is out of bounds or does not fit the encoder.
    """
    check_call(resid_ND, encoder, k, hint_N)
    return encode_topk_ref(resid_ND, encoder, k=k)
