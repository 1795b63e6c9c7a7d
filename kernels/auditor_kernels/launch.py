"""The Triton kernels, launched over one chunk of tokens at a time."""

# Shape suffixes: T tokens of a chunk, N all tokens, D = d_in, F = d_sae, K = kept features.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from auditor_kernels.groups import group_gemm, ranked_key
from auditor_kernels.prepared import Prepared
from auditor_kernels.rank import rank_candidates, rank_slices, recompute_slices

# Longer lists than these many are not ranked: their tokens are recomputed.
MAX_LOG_WIDE = 11


@dataclass(frozen=True)
class Tiles:
    """Block sizes of the GEMM; the defaults are those of a Hopper GPU in 16-bit types."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    raster: int = 16
    programs: int = 132


def choose_tiles(x_ND: Tensor) -> Tiles:
    """Blocks that fit the device's shared memory and the number of tokens."""
    if not x_ND.is_cuda:
        return Tiles(rows=16, depth=32, programs=2, raster=2)
    properties = torch.cuda.get_device_properties(x_ND.device)
    programs = properties.multi_processor_count
    rows = 64 if x_ND.shape[0] <= 64 or x_ND.dtype == torch.float32 else 128
    depth = 32 if x_ND.dtype == torch.float32 else 64
    # Three stages of the 16-bit tile take 148 KB: A100, Hopper and data-centre Blackwell have it.
    stages = 3 if (properties.major, properties.minor) in ((8, 0), (9, 0), (10, 0), (10, 3)) else 1
    return Tiles(rows=rows, depth=depth, stages=stages, programs=programs)


class Launcher:
    """One call's inputs, outputs and launches over one chunk of tokens at a time."""

    def __init__(
        self, prepared: Prepared, x_ND: Tensor, k: int, kept: int, cap: int, tiles: Tiles | None = None
    ) -> None:
        self.prepared, self.x_ND, self.k, self.kept = prepared, x_ND, k, kept
        self.d_sae, self.width = prepared.w_FD.shape
        self.tiles = tiles or choose_tiles(x_ND)
        self.cap = cap
        self.val_NK = x_ND.new_empty(x_ND.shape[0], k, dtype=torch.float32)
        self.listed: Tensor | None = None
        self.idx_NK = x_ND.new_empty(x_ND.shape[0], k, dtype=torch.int32)

    def num_recomputed(self) -> int:
        """Tokens that did not certify and were recomputed (asks the device, hence waits for it)."""
        return 0 if self.listed is None else int(self.listed)

    def gemm(self, part: slice, m: int, floor: Tensor, count: Tensor, cand: Tensor) -> None:
        """The filter over one chunk, into `count` and `cand`."""
        self._gemm(part, 1, m, floor, count, cand, None)

    def sampled_floor(self, part: slice, stride: int, rank: int) -> Tensor:
        """About the `rank`-th largest score of every `stride`-th feature: float32 [T], 0 if not active."""
        x_td = self.x_ND[part]
        groups = -(-len(self.prepared.w_FD[::stride]) // self.tiles.columns) * (self.tiles.columns // 64)
        # A group may hold more of the largest than it keeps; then the floor is a little lower, which is safe.
        m = next(m for m in range(1, rank + 1) if 20 * math.comb(rank, m + 1) <= groups**m)
        keys = x_td.new_empty(len(x_td), m, groups, dtype=torch.int32)
        floor = x_td.new_empty(len(x_td), dtype=torch.float32)
        self._gemm(part, stride, m, floor, floor, floor, keys)
        width = triton.next_power_of_2(m * groups)
        ranked_key[(len(x_td),)](keys, floor, m * groups, rank, width, num_warps=1 if width <= 512 else 4)
        return floor

    def _gemm(
        self,
        part: slice,
        stride: int,
        m: int,
        floor: Tensor,
        count: Tensor,
        cand: Tensor,
        keys: Tensor | None,
    ) -> None:
        """Every `stride`-th feature; into `keys` if given, else the filter into `count` and `cand`."""
        prepared, tiles = self.prepared, self.tiles
        x_td, w_fd = self.x_ND[part], prepared.w_FD[::stride]
        group_gemm[(tiles.programs,)](
            TensorDescriptor.from_tensor(x_td, [tiles.rows, tiles.depth]),
            TensorDescriptor.from_tensor(w_fd, [tiles.columns, tiles.depth]),
            prepared.bias_F[::stride].contiguous(),
            prepared.threshold_F[::stride].contiguous(),
            floor,
            count if keys is None else keys,
            count,
            cand,
            x_td.shape[0],
            w_fd.shape[0],
            self.width,
            self.cap,
            m,
            keys is None,
            x_td.dtype == torch.float32,
            prepared.has_threshold,
            prepared.two_sided,
            "tf32x3" if x_td.dtype == torch.float32 else "ieee",
            tiles.rows,
            tiles.columns,
            tiles.depth,
            tiles.raster,
            tiles.programs,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )

    def rank(self, part: slice, floor: Tensor, count: Tensor, cand: Tensor, listed: Tensor) -> None:
        """Certify and rank a chunk; what does not certify goes on the list."""
        log_wide = min(max(self.cap - 1, 127).bit_length(), MAX_LOG_WIDE)
        rank_candidates[(count.shape[0],)](
            self.x_ND,
            floor,
            count,
            cand,
            self.val_NK,
            self.idx_NK,
            listed,
            part.start,
            self.width,
            self.k,
            self.kept,
            self.cap,
            self.prepared.overflow_bound,
            log_wide,
            num_warps=1 if log_wide <= 10 else 2,
        )

    def recompute(self, listed: Tensor, space: Tensor) -> None:
        """Recompute the listed tokens, with `space` (int64) for their partial lists."""
        prepared, programs = self.prepared, 2 * self.tiles.programs
        self.listed = listed[:1]
        is_fp32 = self.x_ND.dtype == torch.float32
        recompute_slices[(programs,)](
            self.x_ND,
            TensorDescriptor.from_tensor(prepared.w_FD, [128, 32 if is_fp32 else 64]),
            prepared.bias_F,
            prepared.threshold_F,
            listed,
            space,
            self.d_sae,
            self.width,
            self.k,
            space.numel(),
            prepared.two_sided,
            "tf32x3" if is_fp32 else "ieee",
            4,
            32 if is_fp32 else 64,
            programs,
            num_warps=8,
            num_stages=4,
        )
        rank_slices[(programs,)](
            listed,
            space,
            self.val_NK,
            self.idx_NK,
            self.d_sae,
            self.k,
            self.kept,
            space.numel(),
            programs,
            num_warps=1,
        )
