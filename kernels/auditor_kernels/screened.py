"""The CPU path where bfloat16 is multiplied much faster than float32 (AMX): screen, then score again.

A bfloat16 product gives every score with an error that is bounded for each token, whatever the data. What
could be among the k largest by that bound is scored again, one float32 dot product at a time; the rest could
not be, and is never looked at. A token whose bound admits too much is screened again by a float32 product,
and after that (many equal scores) takes the dot products of all features.

Values come from those dot products alone, and each depends on one token and one feature. So a token's row is
the same to the last bit in whatever company it is encoded and by however many threads.
"""

# Shape suffixes: N packed tokens, C tokens of a chunk, D = d_in, F = d_sae, G groups of features, K = kept
# features, Z candidates of a chunk.

from __future__ import annotations

import warnings
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from auditor_kernels.encode_topk_ref import encode_topk_ref, largest
from auditor_kernels.weights import EncoderWeights, TopK

SCORE_BYTES = 32 << 20
LEAST_ROWS = 128
# Features of a group: so many inner maxima of so many scores each.
OUTER, INNER = 4, 8
GROUP = OUTER * INNER
# Groups that are searched beyond the k with the largest maxima.
SPARE_GROUPS = 64
# A token with more candidates than k and these is cheaper to screen again in float32.
SPARE_CANDIDATES = 96
# Largest relative error of a rounding to bfloat16 (8 bits) and to float32 (24 bits).
BF16_STEP = 2.0**-8
FP32_STEP = 2.0**-24
# Processors flush to 0 what is smaller than 1.2e-38, before and after a product.
FLUSHED = 1e-35
NEVER = -3.0e38
LAST_FEATURE = 0x7FFFFFFF


def is_fast_here() -> bool:
    """Whether this processor multiplies bfloat16 in tiles (AMX), several times faster than float32."""
    return bool(torch.cpu._is_amx_tile_supported())


def takes(encoder: EncoderWeights, k: int) -> bool:
    """Whether scores alone rank the features (one-sided, one threshold for all), and k is few of them."""
    if encoder.two_sided or encoder.W_enc_DF.shape[1] < 2 * GROUP * k:
        return False
    low, high = torch.aminmax(encoder.threshold_F)
    return bool(low == high)


@dataclass(frozen=True)
class Screen:
    """An encoder rounded for screening, and the norms that bound what rounding does."""

    w16_FD: Tensor  # a whole number of groups; the bias, in two parts, is 2 more columns
    w_DF: Tensor  # float32
    bias_F: Tensor
    threshold: float
    norm: float  # largest |w_j|
    norm_lost: float  # largest |w_j - its rounding|
    max_bias: float
    max_weight: float

    def error(self, x_CD: Tensor, x16_CD: Tensor | None) -> Tensor:
        """Bound [C, 1] of |score - dot product| before the score is rounded; None is the float32 screen.

        `|x.w - x'.w'| <= |x - x'| |w| + |x'| |w - w'|`; and each of the two sums of D products errs by at
        most D steps of `|x| |w|`.
        """
        size: Tensor = torch.linalg.vector_norm(x_CD, dim=1, keepdim=True) * (1 + BF16_STEP)
        sums: Tensor = 4 * (x_CD.shape[1] + 4) * FP32_STEP * (size * self.norm + self.max_bias)
        sums += FLUSHED * (1 + size + self.norm)
        if x16_CD is None:
            return sums
        lost: Tensor = torch.linalg.vector_norm(x_CD - x16_CD, dim=1, keepdim=True)
        return 1.001 * (lost * self.norm + size * self.norm_lost) + BF16_STEP**2 * self.max_bias + sums


_CACHE: WeakKeyDictionary[EncoderWeights, Screen] = WeakKeyDictionary()


def _screen(encoder: EncoderWeights) -> Screen:
    if encoder not in _CACHE:
        w_fd = encoder.W_enc_DF.t().float().contiguous()
        w16_fd, padding = w_fd.bfloat16(), -len(w_fd) % GROUP
        high_f = encoder.b_enc_F.bfloat16()
        bias_f2 = torch.stack([high_f, (encoder.b_enc_F - high_f).bfloat16()], dim=1)
        nothing = torch.tensor([[0.0] * w_fd.shape[1] + [NEVER, 0.0]], dtype=torch.bfloat16).expand(
            padding, -1
        )
        pairs = zip(torch.split(w_fd, 4096), torch.split(w16_fd, 4096), strict=True)
        # Maxima that are not finite stay so, and then certify nothing.
        norm, lost, weight = torch.tensor(
            [(w.norm(dim=1).max(), (w - w16).norm(dim=1).max(), w.abs().max()) for w, w16 in pairs]
        ).amax(0)
        _CACHE[encoder] = Screen(
            w16_FD=torch.cat([torch.cat([w16_fd, bias_f2], dim=1), nothing]),
            w_DF=w_fd.t(),
            bias_F=encoder.b_enc_F,
            threshold=float(encoder.threshold_F[0]),
            norm=1.001 * float(norm),
            norm_lost=1.001 * float(lost),
            max_bias=float(encoder.b_enc_F.abs().max()),
            max_weight=float(weight),
        )
    return _CACHE[encoder]


def encode_screened(resid_ND: Tensor, encoder: EncoderWeights, *, k: int) -> TopK:
    """Encode and keep the k largest active features, on a CPU, in bounded memory.

    Arguments are those of `encode_topk`, already checked.

    Raises:
        ValueError: the encoder is not one that `takes` accepts (only when forced).
    """
    if not takes(encoder, k):
        raise ValueError(
            f"the screened path takes one-sided encoders with one threshold and at least {2 * GROUP} k "
            f"features, got d_sae {encoder.W_enc_DF.shape[1]} and k {k}; unset AUDITOR_KERNELS"
        )
    screen = _screen(encoder)
    kept = min(k, encoder.max_active or k)
    top_acts_NK = torch.zeros(len(resid_ND), k)
    top_idx_NK = torch.full((len(resid_ND), k), -1, dtype=torch.int32)
    rows = max(LEAST_ROWS, SCORE_BYTES // (2 * len(screen.w16_FD)))
    for start in range(0, len(resid_ND), rows):
        part = slice(start, start + rows)
        x_cd = resid_ND[part].float()
        # |pre| <= sum |x| max |W| + max |b|; the reference knows what to do where that is not finite.
        safe = x_cd.abs().sum(1) * screen.max_weight + screen.max_bias < 1e38
        acts, idx, left = _first(x_cd, screen, kept)
        top_acts_NK[part, :kept], top_idx_NK[part, :kept] = acts, idx
        again = (left & safe).nonzero().flatten()
        for few in torch.split(again, max(1, rows // 2)) if len(again) else ():
            top_acts_NK[start + few, :kept], top_idx_NK[start + few, :kept] = _again(x_cd[few], screen, kept)
        odd = start + (~safe).nonzero().flatten()
        if len(odd):
            top_acts_NK[odd], top_idx_NK[odd] = encode_topk_ref(resid_ND[odd], encoder, k=k)
    return TopK(top_acts_NK, top_idx_NK)


def _first(x_CD: Tensor, screen: Screen, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices [C, kept] by the bfloat16 screen, and which rows it leaves uncertified, [C]."""
    x16_cd = functional.pad(x_CD.bfloat16(), (0, 2), value=1.0)
    # Positive bfloat16 numbers are ordered as integers, which are compared several at a time.
    score_cf = functional.linear(x16_cd, screen.w16_FD).view(torch.int16)
    groups = score_cf.shape[1] // (INNER * OUTER)
    # Group g holds columns g, g + groups, ...: maxima are vertical, vectorised passes, 8 to 1, then 4 to 1.
    inner_cog = score_cf.view(-1, INNER, OUTER * groups).amax(1).view(-1, OUTER, groups)
    top = inner_cog.amax(1).topk(min(kept + SPARE_GROUPS, groups), dim=1)
    kth = top.values[:, kept - 1 : kept].contiguous().view(torch.bfloat16).float()
    error = screen.error(x_CD, x16_cd[:, :-2])
    # The k-th largest maximum bounds the k-th largest dot product from below; nothing less is among the k.
    # Rounding keeps order, so what is not less has a score of at least the bound, rounded down.
    cut = (kth * (1 - BF16_STEP) - error).clamp(min=screen.threshold) - error
    cut16 = (cut.view(torch.int32) >> 16).to(torch.int16)
    left = ~(cut > FLUSHED)  # as well if it is no number
    if top.values.shape[1] < groups:
        left |= top.values[:, -1:] >= cut16  # a group that is not searched might hold one
    cut16[left] = torch.iinfo(torch.int16).max
    hit = inner_cog.gather(2, top.indices[:, None, :].expand(-1, OUTER, -1)) >= cut16[:, :, None]
    row_z, outer_z, slot_z = hit.nonzero().unbind(1)
    stride, first_z = OUTER * groups, outer_z * groups + top.indices[row_z, slot_z]
    flat_zi = (row_z * score_cf.shape[1] + first_z)[:, None] + torch.arange(INNER) * stride
    found = score_cf.view(-1).take(flat_zi) >= cut16[row_z]
    hit_z, inner_z = found.nonzero().unbind(1)
    row_z, feature_z = row_z[hit_z], first_z[hit_z] + inner_z * stride
    count = row_z.bincount(minlength=len(x_CD))
    crowded = count > kept + SPARE_CANDIDATES
    if bool(crowded.any()):
        left |= crowded[:, None]
        fits = ~crowded[row_z]
        row_z, feature_z = row_z[fits], feature_z[fits]
    acts, idx = _rank(x_CD, row_z, feature_z, screen, kept)
    return acts, idx, left.squeeze(1)


def _again(x_CD: Tensor, screen: Screen, kept: int) -> tuple[Tensor, Tensor]:
    """Values and indices by the float32 screen, and by all dot products where even that leaves too much."""
    score_cf = torch.addmm(screen.bias_F, x_CD, screen.w_DF)
    num_features = score_cf.shape[1]
    values, feature = largest(score_cf, min(kept + SPARE_CANDIDATES, num_features))
    kth = values.topk(kept, dim=1).values[:, -1:]
    error = screen.error(x_CD, None)
    cut = (kth - error).clamp(min=screen.threshold) - error
    certain = values.amin(1) < cut.squeeze(1)
    row_z, slot_z = ((values >= cut) & certain[:, None]).nonzero().unbind(1)
    acts, idx = _rank(x_CD, row_z, feature[row_z, slot_z], screen, kept)
    every = torch.arange(num_features)
    for row in (~certain).nonzero().flatten().tolist():
        acts[row], idx[row] = _rank(x_CD[row : row + 1], torch.zeros_like(every), every, screen, kept)
    return acts, idx


def _rank(x_CD: Tensor, row_Z: Tensor, feature_Z: Tensor, screen: Screen, kept: int) -> tuple[Tensor, Tensor]:
    """Values and indices [C, kept] of the best candidates; `row_Z` is ascending."""
    count = row_Z.bincount(minlength=len(x_CD))
    ends = count.cumsum(0)
    value = dot_products(x_CD, ends, feature_Z, screen.w_DF) + screen.bias_F[feature_Z]
    # The bits of a positive value, then the feature, lowest last: ties go to the lowest index.
    key = (value.view(torch.int32).long() << 32) | (LAST_FEATURE - feature_Z)
    width = max(kept, int(count.max()))
    slot_z = torch.arange(len(row_Z)) - (ends - count)[row_Z]
    keys = row_Z.new_zeros(len(x_CD), width)
    keys[row_Z, slot_z] = key * (value > screen.threshold)
    best = keys.topk(kept, dim=1).values
    acts = (best >> 32).int().view(torch.float32)
    return acts, torch.where(best > 0, LAST_FEATURE - (best & LAST_FEATURE), -1).int()


def dot_products(x_CD: Tensor, ends_C: Tensor, feature_Z: Tensor, w_DF: Tensor) -> Tensor:
    """Dot products [Z] of token c with its features, `feature_Z[ends_C[c - 1] : ends_C[c]]`, in float32."""
    with warnings.catch_warnings():  # torch says once that its sparse tensors are in beta
        warnings.simplefilter("ignore")
        pattern = torch.sparse_csr_tensor(
            functional.pad(ends_C, (1, 0)),
            feature_Z,
            x_CD.new_zeros(len(feature_Z)),
            (len(x_CD), w_DF.shape[1]),
            check_invariants=False,
        )
    products: Tensor = torch.sparse.sampled_addmm(pattern, x_CD, w_DF, beta=0.0).values()
    return products
