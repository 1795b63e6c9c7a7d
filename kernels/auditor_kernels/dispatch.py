"""Which implementation runs, and why. The rules are `choose`, top to bottom."""

# Shape suffixes: N packed tokens, D = d_in, F = d_sae, K = kept features.

from __future__ import annotations

import functools
import os
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from auditor_kernels import screened
from auditor_kernels.encode_topk_ref import encode_topk_ref
from auditor_kernels.weights import EncoderWeights, TopK, check_call

if TYPE_CHECKING:
    from auditor_kernels.launch import Launcher

OVERRIDE = "AUDITOR_KERNELS"
# Below this many tokens the exact row kernel reads W once and needs no second look.
FEW_TOKENS = 16
# A warp of the Hopper filter keeps 160 groups of a tile's 1024: at 1 feature in 40 it never needs more.
HOPPER_FEATURES_PER_CANDIDATE = 40

# From here on scoring candidates again costs less than 8-bit products save (measured, see docs/kernel.md).
INT8_WIDTH = 2304
INT8_FEATURES_PER_KEPT = 2048


class Implementation(StrEnum):
    """How `encode_topk` can run; the values are what the override accepts."""

    REFERENCE = "reference"
    SCREENED = "cpu-screened"
    ROWS = "triton-rows"
    FILTER = "triton-filter"
    HOPPER = "hopper-filter"
    INT8 = "hopper-int8"


def choose(
    device: torch.device,
    dtype: torch.dtype,
    num_tokens: int,
    encoder: EncoderWeights,
    k: int,
    *,
    hinted: bool,
) -> tuple[Implementation, str]:
    """The implementation for a call, and the reason in words."""
    forced = os.environ.get(OVERRIDE)
    if forced:
        return Implementation(forced), f"{OVERRIDE}={forced}"
    if device.type != "cuda":
        if device.type != "cpu" or not screened.is_fast_here():
            return Implementation.REFERENCE, f"device is {device.type}, no bfloat16 tiles (AMX)"
        if not screened.takes(encoder, k):
            return Implementation.REFERENCE, "device is cpu; two-sided, thresholds differ, or k is dense"
        return Implementation.SCREENED, "device is cpu with bfloat16 tiles (AMX)"
    from auditor_kernels.designs import choose_sample, per_group  # Triton: on the first CUDA call only

    d_sae = encoder.W_enc_DF.shape[1]
    kept = min(k, encoder.max_active or k)
    floor = "a hint" if hinted else "a sample of features"
    expected = 2 * kept if hinted else choose_sample(kept, d_sae).expected
    if num_tokens <= FEW_TOKENS:
        return Implementation.ROWS, f"{num_tokens} tokens, at most {FEW_TOKENS}"
    if per_group(expected, d_sae) is None:
        reason = f"k {kept} is too large a part of {d_sae} features for any filter to certify"
        return Implementation.ROWS, reason
    if dtype == torch.float32 or encoder.W_enc_DF.dtype != dtype:
        return Implementation.FILTER, f"floor from {floor}, float32"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return Implementation.FILTER, f"floor from {floor}, not a Hopper GPU"
    if encoder.two_sided:
        return Implementation.FILTER, f"floor from {floor}, two-sided encoder"
    if d_sae < HOPPER_FEATURES_PER_CANDIDATE * expected:
        return Implementation.FILTER, f"floor from {floor}, k {kept} is dense for {d_sae} features"
    from auditor_kernels.agreement import check_hopper

    works, reason = check_hopper(device)
    if not works:
        return Implementation.FILTER, f"floor from {floor}, Hopper GPU, {reason}"
    if encoder.W_enc_DF.shape[0] >= INT8_WIDTH and d_sae >= INT8_FEATURES_PER_KEPT * kept:
        return (
            Implementation.INT8,
            f"floor from {floor}, Hopper GPU, wide: 8-bit products cost half, {reason}",
        )
    return Implementation.HOPPER, f"floor from {floor}, Hopper GPU, {reason}"


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
    num_tokens = resid_ND.shape[0]
    which, _ = choose(resid_ND.device, resid_ND.dtype, num_tokens, encoder, k, hinted=hint_N is not None)
    if which is Implementation.REFERENCE or num_tokens == 0:
        return encode_topk_ref(resid_ND, encoder, k=k)
    if which is Implementation.SCREENED:
        return screened.encode_screened(resid_ND, encoder, k=k)
    # Kernels launch on the current device, whichever their arguments are on.
    with torch.cuda.device(resid_ND.device):
        launcher = launch(which, resid_ND, encoder, k, hint_N)
    return TopK(launcher.val_NK, launcher.idx_NK)


def launch(
    which: Implementation, resid_ND: Tensor, encoder: EncoderWeights, k: int, hint_N: Tensor | None
) -> Launcher:
    """Run one of the device implementations; the launcher holds the outputs and what was recomputed."""
    from auditor_kernels import designs, hopper, int8_screen
    from auditor_kernels.launch import Launcher
    from auditor_kernels.prepared import prepare

    prepared = prepare(encoder, resid_ND.dtype)
    kept, d_sae = min(k, encoder.max_active or k), encoder.W_enc_DF.shape[1]
    sampled = designs.choose_sample(kept, d_sae).capacity
    cap = sampled if hint_N is None else designs.hint_capacity(kept, d_sae)
    if which is Implementation.INT8:
        cap *= designs.INT8_CANDIDATES
    launcher = Launcher(prepared, prepared.match(resid_ND), k, kept, cap)
    if which is Implementation.ROWS:
        designs.encode_rows(launcher)
    elif which in (Implementation.HOPPER, Implementation.INT8):
        room = hopper if which is Implementation.HOPPER else int8_screen
        designs.encode_filter(launcher, hint_N, functools.partial(room.filter_pass, launcher))
    else:
        designs.encode_filter(launcher, hint_N)
    return launcher


def describe_dispatch(encoder: EncoderWeights, *, k: int, num_tokens: int, dtype: torch.dtype) -> list[str]:
    """What would run on the encoder's device, with and without a hint, and why; one line each."""
    lines = []
    for hinted in (True, False):
        device = encoder.W_enc_DF.device
        which, why = choose(device, dtype, num_tokens, encoder, k, hinted=hinted)
        lines.append(f"encode_topk {'with' if hinted else 'without'} a hint: {which} ({why})")
    return lines
