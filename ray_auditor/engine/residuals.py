"""Residuals at the hook: the base's, kept token by token, and how far a candidate's lie from them.

Both classes are shown every step of a run on the device. Rows are matched by token, so neither the order in
which prompts run nor the step that a token falls into matters.
"""

# Shape suffixes: M tokens of all prompts, in their order, N tokens of one step, D = d_in, S suites.

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_TOKENS = 4096  # compared at a time: bounds the fp32 copies


class Moves(NamedTuple):
    """How far a run's residuals lie from the base's."""

    cosine_M: NDArray[np.float32]  # in [-1, 1]; exactly 1 where they are equal
    change_M: NDArray[np.float32]  # norm of the difference over the base's norm; exactly 0 where equal
    mean_difference_S: list[float | None]  # None for a suite without a scored token


class Recording:
    """Keeps the base's residuals on the device."""

    def __init__(self, num_tokens: int, d_in: int, num_suites: int, dtype: torch.dtype, device: torch.device):
        self.resid_MD = torch.empty(num_tokens, d_in, dtype=dtype, device=device)
        self._num_suites = num_suites

    def add(self, rows_N: Tensor, resid_ND: Tensor) -> None:
        """Keep one step; `rows_N` are its tokens' numbers, on the device."""
        self.resid_MD[rows_N] = resid_ND.to(self.resid_MD.dtype)

    def finish(self) -> Moves:
        """What the base is to itself."""
        num_tokens = len(self.resid_MD)
        ones_M, zeros_M = np.ones(num_tokens, np.float32), np.zeros(num_tokens, np.float32)
        return Moves(ones_M, zeros_M, [0.0] * self._num_suites)

    def to_bytes(self) -> NDArray[np.uint8]:
        """All residuals on the host, row by row, as they lie in memory; no copy on a CPU."""
        flat: NDArray[np.uint8] = self.resid_MD.cpu().view(torch.uint8).numpy().reshape(-1)
        return flat


class Comparison:
    """Compares run after run with the base's residuals, in fp32, on the device."""

    def __init__(self, base_MD: Tensor, suite_M: Tensor, num_suites: int) -> None:
        """Hold the base.

        Args:
            base_MD: Its residuals, on the device.
            suite_M: Number of each token's suite, `num_suites` where it is not scored.
            num_suites: S.
        """
        self._base_MD = base_MD
        self._suite_M = suite_M.to(base_MD.device)
        self._suites_S1 = torch.arange(num_suites, device=base_MD.device)[:, None]
        self._begin()

    def _begin(self) -> None:
        (num_tokens, d_in), num_suites = self._base_MD.shape, len(self._suites_S1)
        device = self._base_MD.device
        self._moves_M2 = torch.full((num_tokens, 2), torch.nan, device=device)
        self._sum_SD = torch.zeros(num_suites, d_in, dtype=torch.float64, device=device)
        self._norms_S = torch.zeros(num_suites, dtype=torch.float64, device=device)

    def add(self, rows_N: Tensor, resid_ND: Tensor) -> None:
        """Compare one step; `rows_N` are its tokens' numbers, on the device. Nothing waits for the host."""
        tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
        for start in range(0, len(rows_N), CHUNK_TOKENS):
            at_N = rows_N[start : start + CHUNK_TOKENS]
            base_ND = self._base_MD[at_N].float()
            cand_ND = resid_ND[start : start + CHUNK_TOKENS].to(self._base_MD.dtype).float()
            difference_ND = cand_ND - base_ND
            distance_N = difference_ND.square().sum(-1).sqrt()
            base_norm_N = base_ND.square().sum(-1).sqrt()
            norms_N = cand_ND.square().sum(-1).sqrt() * base_norm_N
            cosine_N = ((cand_ND * base_ND).sum(-1) / norms_N.clamp_min(tiny)).clamp(-1, 1)
            self._moves_M2[at_N, 0] = torch.where(distance_N == 0, 1.0, cosine_N)
            self._moves_M2[at_N, 1] = (distance_N / base_norm_N.clamp_min(tiny)).clamp_max(largest)
            scored_SN = (self._suites_S1 == self._suite_M[at_N]).float()
            self._sum_SD += (scored_SN @ difference_ND).double()
            self._norms_S += (scored_SN @ base_norm_N).double()

    def finish(self) -> Moves:
        """The run's numbers, on the host; the next run begins afresh.

        `mean_difference` is the norm of the mean difference over the suite's scored tokens, over the mean
        norm of the base's residuals there.
        """
        moves_2M = self._moves_M2.T.cpu().contiguous().numpy()
        length_S, norms_S = torch.stack([self._sum_SD.norm(dim=-1), self._norms_S]).tolist()
        self._begin()
        means = [length / norm if norm else None for length, norm in zip(length_S, norms_S, strict=True)]
        return Moves(moves_2M[0], moves_2M[1], means)
