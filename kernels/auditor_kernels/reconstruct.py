"""The FVU parts on a GPU: a token's kept decoder rows are gathered and summed in registers, in one pass."""

# Shape suffixes: N packed tokens, D = d_in, F = d_sae, K = kept features.

# mypy: ignore-errors
# The kernel is compiled by Triton: its arguments are device values, not Python objects.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["k"])
def _parts(
    x_ptr, act_ptr, idx_ptr, w_ptr, b_dec_ptr, err_ptr, total_ptr, D, k, BK: tl.constexpr, BD: tl.constexpr
):
    """One token per program: `|x - x_hat|^2` and `|x - b_dec|^2`, BK decoder rows at a time."""
    row = tl.program_id(0).to(tl.int64)
    err = tl.zeros((BD,), dtype=tl.float32)
    total = tl.zeros((BD,), dtype=tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        live = d < D
        x = tl.load(x_ptr + row * D + d, mask=live, other=0.0).to(tl.float32)
        x -= tl.load(b_dec_ptr + d, mask=live, other=0.0)
        recon = tl.zeros((BD,), dtype=tl.float32)
        for k0 in range(0, k, BK):
            slot = k0 + tl.arange(0, BK)
            act = tl.load(act_ptr + row * k + slot, mask=slot < k, other=0.0)
            feature = tl.load(idx_ptr + row * k + slot, mask=slot < k, other=-1).to(tl.int64)
            at = w_ptr + feature[:, None] * D + d[None, :]
            w = tl.load(at, mask=(feature >= 0)[:, None] & live[None, :], other=0.0).to(tl.float32)
            # A row that is not finite has NaN activations and no features: 0 times NaN keeps it so.
            recon += tl.sum(act[:, None] * w, axis=0)
        recon = tl.where(live, x - recon, 0.0)
        err += recon * recon
        total += x * x
    err_sum = tl.sum(err, axis=0)
    # NaN in both parts, never an infinity that an average would carry on.
    total_sum = tl.where(err_sum == err_sum, tl.sum(total, axis=0), float("nan"))
    tl.store(err_ptr + row, err_sum)
    tl.store(total_ptr + row, total_sum)


def fvu_rows(
    resid_ND: Tensor, acts_NK: Tensor, idx_NK: Tensor, w_dec_FD: Tensor, b_dec_D: Tensor
) -> tuple[Tensor, Tensor]:
    """Both parts, float32 [N]; see `fvu_parts`, which has checked the arguments."""
    num_tokens, d_in = resid_ND.shape
    err_n = torch.empty(num_tokens, dtype=torch.float32, device=resid_ND.device)
    total_n = torch.empty_like(err_n)
    if num_tokens:
        _parts[(num_tokens,)](
            resid_ND.contiguous(),
            acts_NK.contiguous(),
            idx_NK.contiguous(),
            w_dec_FD.contiguous(),
            b_dec_D.contiguous(),
            err_n,
            total_n,
            d_in,
            idx_NK.shape[1],
            8,
            min(512, triton.next_power_of_2(d_in)),
        )
    return err_n, total_n
