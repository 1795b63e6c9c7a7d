"""The arithmetic of the int8 filter, modelled in torch over 10^5 rows: nothing is missed without a flag.

The kernels themselves run in Triton's interpreter (`test_triton_logic.py`, case `int8`), on few rows; here
the same rounding, bound and certificate meet many. Integers are multiplied as float32, exact below 2^24.
"""

import math

import pytest
import torch
from auditor_kernels import EncoderWeights
from auditor_kernels.designs import hint_capacity
from kernel_oracle import make_encoder
from torch import Tensor

D, F, K, OUTLIERS = 48, 2048, 16, 2
LARGEST, FAILURE = 126.0, 1e-6
ROWS, CHUNK = 20480, 2048


def round_at_random(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    step = rows.abs().amax(1, keepdim=True) / LARGEST
    scaled = torch.where(step > 0, rows / step, 0.0)
    q = (scaled + torch.rand(rows.shape, generator=generator)).floor().clamp(-127, 127)
    return q, step


class Model:
    """What `int8_screen` does to one encoder, without Triton."""

    def __init__(self, encoder: EncoderWeights, seed: int, coins_share: float = 1.0) -> None:
        self.encoder, self.coins_share = encoder, coins_share
        self.coins = torch.Generator().manual_seed(seed)
        self.w_fd = encoder.W_enc_DF.t().float()
        self.q_fd, step = round_at_random(self.w_fd, torch.Generator().manual_seed(seed + 10**6))
        self.step_f, self.norm_f = step.T, self.w_fd.norm(dim=1)[None]

    def scores(self, x_td: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [T, F] and their bound."""
        outliers = x_td.abs().amax(0).topk(OUTLIERS).indices
        rest_td = x_td.clone()
        rest_td[:, outliers] = 0
        q_td, step_t = round_at_random(rest_td, self.coins)
        side = x_td[:, outliers] @ self.w_fd[:, outliers].T
        score = (q_td @ self.q_fd.T) * step_t * self.step_f + self.encoder.b_enc_F + side
        by_x = step_t * (self.norm_f + self.step_f * math.sqrt(D))
        by_w = self.step_f * rest_td.norm(dim=1, keepdim=True)
        coins = math.sqrt(math.log(CHUNK * K / FAILURE) / 2) * self.coins_share
        sums = 64 * 2.0**-23 * (x_td.norm(dim=1, keepdim=True) * self.norm_f + self.encoder.b_enc_F.abs())
        return score, coins * (by_x.square() + by_w.square()).sqrt() + sums

    def audit(self, x_td: Tensor, hint_t: Tensor, exact_tf: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows are flagged, and which of them all would miss one of the k largest, [T] each."""
        score, error = self.scores(x_td)
        floor = torch.where(hint_t > 0, 0.95 * hint_t, 0.0)[:, None]
        listed = ~((score + error < floor) | (score + error < 0))
        reached = (listed & (exact_tf > 0) & (exact_tf >= floor)).sum(1)
        few = (reached < K) & ~(0.95 * hint_t <= 0)
        safe = x_td.abs().sum(1) < 1e30
        flagged = few | (listed.sum(1) > hint_capacity(K, F)) | ~safe
        # Equal scores may stand for each other: a miss is a value among the k largest that the list lacks.
        top = exact_tf.topk(K, dim=1).values.clamp(min=0)
        kept = torch.where(listed & (exact_tf >= floor), exact_tf, 0.0).topk(K, dim=1).values.clamp(min=0)
        return flagged, ~(kept == top).all(1)


def make_rows(kind: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(CHUNK, D, generator=generator)
    if kind == "outlier":
        x[:, 7] *= 1e3
        x[::5, 11] *= 1e4
    elif kind == "heavy":
        x = x * torch.randn(CHUNK, D, generator=generator).exp()
    elif kind == "hostile":
        x[0::6] = 0
        x[1::6] = 1
        x[2::6, 3] = torch.nan
        x[3::6, 4] = torch.inf
        x[4::6] = x[4]
    return x


@pytest.mark.parametrize("kind", ["gauss", "outlier", "heavy", "hostile", "duplicates"])
def test_no_row_is_wrong_unless_flagged(kind):
    """20,480 rows a kind, 102,400 in all, each chunk with fresh coins."""
    encoder = make_encoder(D, F)
    if kind == "duplicates":
        encoder.W_enc_DF[:, F // 2 :] = encoder.W_enc_DF[:, : F // 2].clone()
        encoder.b_enc_F[F // 2 :] = encoder.b_enc_F[: F // 2]
    generator = torch.Generator().manual_seed(5)
    flagged = wrong = 0
    for chunk in range(ROWS // CHUNK):
        x = make_rows(kind, generator)
        exact = x.double() @ encoder.W_enc_DF.double() + encoder.b_enc_F
        hint = exact.topk(K, dim=1).values[:, -1] * (1 + 0.02 * torch.randn(CHUNK, generator=generator))
        flags, misses = Model(encoder, seed=chunk).audit(x, hint, exact)
        flagged += int(flags.sum())
        wrong += int((misses & ~flags).sum())
        if kind == "hostile":
            assert flags[2::6].all()
            assert flags[3::6].all()
    assert wrong == 0
    assert flagged < (0.6 if kind == "hostile" else 0.3) * ROWS


def test_the_bound_is_what_protects():
    """Without the bound rows go wrong unflagged, so the test above can fail; no pair exceeds the bound."""
    encoder, generator = make_encoder(D, F), torch.Generator().manual_seed(5)
    x = make_rows("gauss", generator)
    exact = x.double() @ encoder.W_enc_DF.double() + encoder.b_enc_F
    hint = exact.topk(K, dim=1).values[:, -1] * 0.99 / 0.95
    flags, misses = Model(encoder, seed=1, coins_share=0.0).audit(x, hint, exact)
    assert (misses & ~flags).any()
    score, error = Model(encoder, seed=1).scores(x)
    off = ((score - exact).abs() / error).max()
    assert 0.3 < off < 1
