"""The reference: the definition of a correct encode + top-k, and the path that runs on a CPU.

Tokens go through in chunks and features in blocks, so that no more than `CHUNK_BYTES` of pre-activations ever
exist. Selection is a cascade: the top m of F values lie in the m groups with the largest maxima, so a row is
reduced to its group maxima (one vectorised pass), m groups are chosen among those, and the search goes on
inside them. It looks for one more than asked: if that one equals the last kept, the row has a tie at its edge
and is sorted in full, stably, so that the lowest index wins.
"""

# Shape suffixes: N packed tokens, C tokens of a chunk, D = d_in, F = d_sae or a block of it, G groups,
# K = kept features, M = features selected (K + 1 where there are that many).

from __future__ import annotations

import torch
from torch import Tensor

from auditor_kernels.weights import EncoderWeights, TopK

CHUNK_BYTES = 32 << 20
BLOCK_FEATURES = 16384


def encode_topk_ref(resid_ND: Tensor, encoder: EncoderWeights, *, k: int) -> TopK:
    """Encode and keep the k largest active features, on any device, in bounded memory.

    Products are accumulated in float32; bfloat16 and float16 are widened first. Arguments are those of
    `encode_topk`, already checked.
    """
    num_tokens, d_sae = resid_ND.shape[0], encoder.W_enc_DF.shape[1]
    top_acts_NK = resid_ND.new_zeros(num_tokens, k, dtype=torch.float32)
    top_idx_NK = resid_ND.new_full((num_tokens, k), -1, dtype=torch.int32)
    if num_tokens == 0:
        return TopK(top_acts_NK, top_idx_NK)
    w_enc_df = encoder.W_enc_DF.float()
    block = min(d_sae, BLOCK_FEATURES)
    # Masking or |.| derive scores from the pre-activations: half of the chunk is theirs.
    derived = encoder.two_sided or _has_thresholds(encoder)
    rows = max(1, min(num_tokens, CHUNK_BYTES // (4 * block * (2 if derived else 1))))
    pre_buffer = resid_ND.new_empty(rows * block, dtype=torch.float32)
    score_buffer = torch.empty_like(pre_buffer) if derived else None
    kept = min(k, encoder.max_active or k)
    # |pre| <= sum |x| max |W| + max |b|: where that is small, nothing can overflow and no pass looks for it.
    largest = max(abs(float(end)) for end in torch.aminmax(w_enc_df.t()))
    offset = float(encoder.b_enc_F.abs().max())
    for start in range(0, num_tokens, rows):
        x_cd = resid_ND[start : start + rows].float()
        safe = float(x_cd.abs().sum(1).max()) * largest + offset < 1e38
        acts, idx = _encode_chunk(x_cd, w_enc_df, encoder, kept, block, pre_buffer, score_buffer, safe)
        top_acts_NK[start : start + rows, : acts.shape[1]] = acts
        top_idx_NK[start : start + rows, : idx.shape[1]] = idx
        if not safe:
            top_acts_NK[start : start + rows][acts[:, 0].isnan()] = torch.nan
    return TopK(top_acts_NK, top_idx_NK)


def _has_thresholds(encoder: EncoderWeights) -> bool:
    return bool((encoder.threshold_F > 0).any())


def _encode_chunk(
    x_CD: Tensor,
    w_enc_DF: Tensor,
    encoder: EncoderWeights,
    k: int,
    block: int,
    pre_buffer: Tensor,
    score_buffer: Tensor | None,
    safe: bool,
) -> tuple[Tensor, Tensor]:
    """Values and indices [C, K] of one chunk of tokens; rows that are not finite are all NaN and -1.

    `safe` says that x is finite and that no pre-activation can overflow.
    """
    rows, d_sae = x_CD.shape[0], w_enc_DF.shape[1]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    finite_C = _rows_finite(x_CD) if not safe else x_CD.new_ones(rows, dtype=torch.bool)
    for first in range(0, d_sae, block):
        last = min(first + block, d_sae)
        pre_CF = pre_buffer[: rows * (last - first)].view(rows, last - first)
        torch.addmm(encoder.b_enc_F[first:last], x_CD, w_enc_DF[:, first:last], out=pre_CF)
        if not safe:
            finite_C &= _rows_finite(pre_CF)
        score_CF = pre_CF
        if score_buffer is not None:
            score_CF = score_buffer[: rows * (last - first)].view(rows, last - first)
            magnitude_CF = pre_CF
            if encoder.two_sided:
                magnitude_CF = torch.abs(pre_CF)
            # A comparison written straight to float is vectorised; torch.where and masked_fill are not.
            torch.gt(magnitude_CF, encoder.threshold_F[first:last], out=score_CF)
            score_CF.mul_(magnitude_CF)
        score_CK, idx_CK = stable_topk(score_CF, min(k, last - first))
        acts_CK = pre_CF.gather(1, idx_CK) if encoder.two_sided else score_CK
        parts.append((score_CK, acts_CK, idx_CK + first))
    score_CK, acts_CK, idx_CK = parts[0] if len(parts) == 1 else _merge(parts, k)
    active_CK = score_CK > 0
    acts_CK = torch.where(active_CK, acts_CK, 0.0)
    if not safe:
        acts_CK[~finite_C] = torch.nan
    idx_CK = torch.where(active_CK & finite_C[:, None], idx_CK, -1)
    return acts_CK, idx_CK


def _rows_finite(pre_CF: Tensor) -> Tensor:
    """Whether every element of a row is finite; one reduction unless a row's sum says otherwise."""
    finite_C = pre_CF.sum(1).isfinite()
    if not bool(finite_C.all()):
        finite_C[~finite_C] = pre_CF[~finite_C].isfinite().all(1)
    return finite_C


def _merge(parts: list[tuple[Tensor, Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Join blocks of ascending features; a stable sort leaves ties in index order."""
    score_CM, acts_CM, idx_CM = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
    order_CK = torch.sort(score_CM, dim=1, descending=True, stable=True).indices[:, :k]
    return score_CM.gather(1, order_CK), acts_CM.gather(1, order_CK), idx_CM.gather(1, order_CK)


def stable_topk(score_CF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, ties by lowest index among positive scores.

    Scores that are not positive stand for inactive features: which of them fill a row is not defined.
    """
    values_CM, idx_CM = largest(score_CF, min(k + 1, score_CF.shape[1]))
    values_CM, order_CM = values_CM.sort(dim=1, descending=True)
    idx_CM = idx_CM.gather(1, order_CM)
    tied_C = ((values_CM[:, 1:] == values_CM[:, :-1]) & (values_CM[:, 1:] > 0)).any(1)
    values_CK, idx_CK = values_CM[:, :k], idx_CM[:, :k]
    if bool(tied_C.any()):
        values_CK, idx_CK = values_CK.clone(), idx_CK.clone()
        tied = tied_C.nonzero().flatten()
        for few in torch.split(tied, max(1, (CHUNK_BYTES // 64) // score_CF.shape[1])):
            values, idx = score_CF[few].sort(dim=1, descending=True, stable=True)
            values_CK[few], idx_CK[few] = values[:, :k], idx[:, :k]
    return values_CK, idx_CK


def largest(score_CF: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Values and indices of m largest elements per row, in no order, any of those that tie at the edge."""
    width = score_CF.shape[1]
    per_group = 32 if width > 128 * m else 8
    groups = width // per_group
    if groups < 2 * m or score_CF.is_cuda:
        top = score_CF.topk(m, dim=1, sorted=False)
        return top.values, top.indices
    # Group g holds columns g, g + groups, g + 2 * groups, ...: its maximum is a vertical, vectorised pass.
    grouped = score_CF[:, : groups * per_group].view(-1, per_group, groups)
    chosen_CM = largest(grouped.amax(1), m)[1]
    inside = grouped.gather(2, chosen_CM[:, None, :].expand(-1, per_group, -1)).flatten(1)
    if groups * per_group < width:
        inside = torch.cat([inside, score_CF[:, groups * per_group :]], dim=1)
    values_CM, at_CM = largest(inside, m)
    row_in_group, column = at_CM // m, at_CM % m
    idx_CM = row_in_group * groups + chosen_CM.gather(1, column)
    if groups * per_group < width:
        idx_CM = torch.where(at_CM < per_group * m, idx_CM, at_CM + (groups - m) * per_group)
    return values_CM, idx_CM
