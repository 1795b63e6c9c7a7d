"""How far a candidate's weights moved from the base's, from the two sets of files alone.

The cheapest rivals of the SAE score: no prompt runs. Only what lies at or below the hook counts.
"""

# Shape suffixes: M rows and N columns of a matrix, B rows read together, R rank, P directions found so far.

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, set_num_threads

from ray_auditor.hub import (
    Admitted,
    BaseModel,
    CandidateError,
    LoraModule,
    MergedTensor,
    TensorSource,
    TensorSpec,
)
from ray_auditor.hub.checkpoint import iter_tensors

BLOCK_ELEMENTS = 1 << 22  # read together: 16 MiB in fp32
CACHED_ELEMENTS = 1 << 18  # a pass multiplies by so many twice while they lie in a core's cache
NUM_PASSES = 16  # stopping when nothing grows stood still below the top of 1 in 150 matrices of noise, by 17%
STACK_ELEMENTS = 1 << 28  # measured together on a GPU: 1 GiB in fp32, and as much beside it at first
ROUNDING = 1e-4  # what fp32 leaves of a vector once it is made orthogonal to others that contain it
MAX_THREADS = 4  # each holds the differences of one tensor, and takes turns with who launches on a device
SEED = 0


@dataclass(frozen=True)
class WeightChange:
    """What moved, over the tensors at or below the hook that differ from the base's.

    Attributes:
        relative_change: Frobenius norm of the difference over that of the base, both over those tensors
            (for an adapter: the weights it adapts); 0 when none differs, None when it is no finite number.
        spectral_share: The largest squared singular value's share of all, averaged over the changed matrices
            by their energy: the sum of their largest squared singular values over the sum of all. 1 for
            changes of rank one; None when no matrix changed. Exact for adapters; for full weights found by
            passes over the difference, and never too high: see `largest_energies` for how much too low.
        num_changed: Tensors that differ, or modules that an adapter changes.
    """

    relative_change: float | None
    spectral_share: float | None
    num_changed: int


@dataclass(frozen=True)
class _Difference:
    """One tensor less the base's."""

    norm: float  # Frobenius
    top: float | None  # sigma_1^2 / norm^2; None for a vector


class BaseWeights:
    """The base's files, and the norms of its tensors once they have been read."""

    def __init__(self, base: BaseModel, num_threads: int = 1) -> None:
        """Take a base.

        Args:
            base: Its files are read as they are needed.
            num_threads: Tensors compared at once, up to `MAX_THREADS`, each by one thread: their loops are
                too small to share.
        """
        self._tensors = base.tensors
        self._norms: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(min(num_threads, MAX_THREADS), "weights", set_num_threads, (1,))

    def change_of(self, candidate: Admitted) -> WeightChange:
        """Compare a candidate's admitted tensors with the base's.

        A thread holds one difference in fp32 and two blocks of `BLOCK_ELEMENTS`. Values are those of the
        files, or what an adapter makes of them: neither side is rounded to the engine's dtype. The same
        files give the same numbers, whatever the number of threads.

        Raises:
            CandidateError: A file of the candidate is not the one that was admitted.
            RuntimeError: A file of the base is not.
        """
        jobs: dict[str, Callable[[], _Difference]]
        if candidate.lora is not None:
            measure = partial(_adapter_difference, candidate.tensors)
            modules = candidate.lora.modules.items()
            jobs = {f"{name}.weight": partial(measure, module) for name, module in modules}
        else:
            tensors = candidate.tensors.items()
            jobs = {name: partial(self._full_difference, name, spec) for name, spec in tensors}
        found = dict(zip(jobs, self._pool.map(self._measured, jobs, jobs.values()), strict=True))
        return _in_all(found, self._norms.__getitem__)

    def _measured(self, name: str, difference_of: Callable[[], _Difference]) -> _Difference:
        """A tensor's difference; where there is one, the base's norm is known from here on."""
        difference = difference_of()
        if difference.norm != 0 and name not in self._norms:
            spans = _spans(self._tensors[name])
            self._norms[name] = _norm_of([_row_norms(self._read(name, *span)) for span in spans])
        return difference

    def _full_difference(self, name: str, spec: TensorSource) -> _Difference:
        if spec == self._tensors[name]:  # the base's own bytes, which an adapter left alone
            return _Difference(0.0, None)
        if isinstance(spec, MergedTensor):
            ((_, merged),) = iter_tensors({name: spec})
            merged_MN = merged.reshape(_num_rows(spec), -1)
            for start, stop in _spans(spec):
                merged_MN[start:stop] -= self._read(name, start, stop).float()
            return _measure(merged_MN, is_matrix=len(spec.shape) > 1)
        difference_MN: Tensor | None = None
        for start, stop in _spans(spec):
            base_BN, block_BN = self._read(name, start, stop), _read(spec, start, stop)
            if block_BN.dtype == base_BN.dtype and torch.equal(block_BN, base_BN):
                continue
            if difference_MN is None:
                difference_MN = torch.zeros(_num_rows(spec), base_BN.shape[1])
            wide = torch.promote_types(torch.promote_types(block_BN.dtype, base_BN.dtype), torch.float32)
            difference_MN[start:stop] = block_BN.to(wide) - base_BN.to(wide)
        if difference_MN is None:
            return _Difference(0.0, None)
        return _measure(difference_MN, is_matrix=len(spec.shape) > 1)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        try:
            return _read(self._tensors[name], start, stop)
        except CandidateError as error:
            raise RuntimeError(f"base.model changed while the sweep ran: {error.text}") from error


@torch.no_grad()
def change_between(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> WeightChange:
    """As `BaseWeights.change_of`, of tensors that lie on a device in the files' dtype.

    Args:
        pairs: Each of a full candidate's tensors and the base's, of one shape.
    """
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, (tensor, _) in pairs.items():
        alike.setdefault(tuple(tensor.shape), []).append(name)
    found: dict[str, _Difference] = {}
    norms: dict[str, float] = {}
    for shape, names in alike.items():
        step = max(1, STACK_ELEMENTS // max(1, math.prod(shape)))
        for start in range(0, len(names), step):
            some = names[start : start + step]
            base_BMN = _as_one([pairs[name][1] for name in some]).view(len(some), -1, shape[-1])
            stack_BMN = _as_one([pairs[name][0] for name in some]).view_as(base_BMN)
            stack_BMN = stack_BMN.to(torch.float32, copy=len(some) == 1)
            stack_BMN -= base_BMN  # in fp32, whatever the files hold
            norms |= dict(zip(some, _norms_of(base_BMN).tolist(), strict=True))
            del base_BMN
            scale_B = torch.maximum(-stack_BMN.amin((1, 2)), stack_BMN.amax((1, 2)))
            stack_BMN /= scale_B.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
            norm_B = _norms_of(stack_BMN)
            tops = largest_energies(stack_BMN) if len(shape) > 1 else [None] * len(some)
            rows = zip(some, scale_B.tolist(), norm_B.tolist(), tops, strict=True)
            for name, scale, norm, top in rows:
                found[name] = _Difference(scale * norm, top / norm**2 if top is not None and norm else None)
    return _in_all(found, norms.__getitem__)


def _as_one(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape, stacked; one alone stays where it is, for it may be a whole vocabulary's."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _in_all(found: Mapping[str, _Difference], norm_of: Callable[[str], float]) -> WeightChange:
    changed = {name: one for name, one in found.items() if one.norm != 0}
    moved = math.hypot(*(one.norm for one in changed.values()))
    stayed = math.hypot(*(norm_of(name) for name in changed))
    matrices = [(one.norm / moved, one.top) for one in changed.values() if one.top is not None]
    energy = sum(norm**2 for norm, _ in matrices)
    return WeightChange(
        _finite(moved / stayed if stayed else math.inf) if changed else 0.0,
        sum(norm**2 * top for norm, top in matrices) / energy if energy else None,
        len(changed),
    )


def _norms_of(stack_BMN: Tensor) -> Tensor:
    norms_BM = torch.linalg.vector_norm(stack_BMN, dim=2, dtype=torch.float32)
    norms_B: Tensor = torch.linalg.vector_norm(norms_BM.double(), dim=1)
    return norms_B


def largest_energies(stack_BMN: Tensor) -> list[float]:
    """The largest squared singular value of each matrix, by Lanczos' iteration on its Gram matrix.

    Every matrix starts from the same fixed vector.

    Args:
        stack_BMN: fp32, finite, of a scale whose squares are.

    Returns:
        At most the true values, up to rounding. 5% less at a value at the edge of noise, 2% for Gaussian
        noise, 1e-5 for spectra that decay; a value alone above a bulk with a hard edge may be missed for the
        edge, which is up to 20% less.
    """
    num_matrices, _, num_columns = stack_BMN.shape
    start_N = torch.randn(num_columns, generator=torch.Generator().manual_seed(SEED)).to(stack_BMN.device)
    direction_BN1 = start_N.expand(num_matrices, -1)[:, :, None]
    # on a host a pass multiplies by a few rows twice while they lie in a cache
    num_rows = stack_BMN.shape[1] if stack_BMN.is_cuda else max(1, CACHED_ELEMENTS // num_columns)
    directions_BNP = images_BNP = stack_BMN.new_empty(num_matrices, num_columns, 0)
    for _ in range(min(NUM_PASSES, num_columns)):
        found_B11 = direction_BN1.norm(dim=1, keepdim=True)
        for _ in range(2):  # once leaves rounding that is not orthogonal
            direction_BN1 = direction_BN1 - directions_BNP @ (directions_BNP.mT @ direction_BN1)
        left_B11 = direction_BN1.norm(dim=1, keepdim=True)
        is_new_B11 = left_B11 > ROUNDING * found_B11  # else every direction that matters is there already
        direction_BN1 = torch.where(is_new_B11, direction_BN1 / left_B11, 0.0)
        image_BN1 = torch.zeros_like(direction_BN1)
        for rows_BRN in torch.split(stack_BMN, num_rows, dim=1):
            image_BN1 += rows_BRN.mT @ (rows_BRN @ direction_BN1)
        directions_BNP = torch.cat([directions_BNP, direction_BN1], 2)
        images_BNP = torch.cat([images_BNP, image_BN1], 2)
        direction_BN1 = image_BN1
    projected_BPP = (directions_BNP.mT @ images_BNP).cpu().double()
    largest: list[float] = torch.linalg.eigvalsh((projected_BPP + projected_BPP.mT) / 2)[:, -1].tolist()
    return largest


def _measure(difference_MN: Tensor, *, is_matrix: bool) -> _Difference:
    low, high = (float(bound) for bound in difference_MN.aminmax())
    scale = max(-low, high)
    if scale == 0 or not math.isfinite(scale):  # a float64 file can hold more than fp32
        return _Difference(scale, None)
    difference_MN /= scale  # squares of very small and of very large values stay in range
    norm = _norm_of([_row_norms(difference_MN)])
    return _Difference(
        scale * norm, largest_energies(difference_MN[None])[0] / norm**2 if is_matrix else None
    )


def _adapter_difference(specs: dict[str, TensorSource], lora: LoraModule) -> _Difference:
    """Singular values of `scaling B A` from an R x R core: B = Q R_B and A^T = P R_A make it Q (core) P^T."""
    state = dict(iter_tensors(specs, [lora.lora_A, lora.lora_B]))
    r_A_RR = torch.linalg.qr(state[lora.lora_A].double().T, mode="r").R
    r_B_RR = torch.linalg.qr(state[lora.lora_B].double(), mode="r").R
    core_RR = lora.scaling * r_B_RR @ r_A_RR.T
    norm = float(torch.linalg.matrix_norm(core_RR))
    if norm == 0 or not math.isfinite(norm):
        return _Difference(norm, None)
    return _Difference(norm, float(torch.linalg.svdvals(core_RR / norm)[0]) ** 2)


def _num_rows(spec: TensorSource) -> int:
    return spec.shape[0] if spec.shape else 1


def _spans(spec: TensorSource) -> Iterator[tuple[int, int]]:
    """First row and end of every block; a vector is a matrix of one column."""
    num_rows = _num_rows(spec)
    step = max(1, BLOCK_ELEMENTS // max(1, math.prod(spec.shape[1:])))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _read(spec: TensorSpec, start: int, stop: int) -> Tensor:
    row_bytes = (spec.end - spec.start) // _num_rows(spec)
    begin, end = spec.start + start * row_bytes, spec.start + stop * row_bytes
    rows = TensorSpec(spec.dtype, (stop - start, math.prod(spec.shape[1:])), spec.file, begin, end)
    ((_, block_BN),) = iter_tensors({"rows": rows})
    return block_BN


def _row_norms(block_BN: Tensor) -> Tensor:
    wide = torch.promote_types(block_BN.dtype, torch.float32)
    norms_B: Tensor = torch.linalg.vector_norm(block_BN.to(wide), dim=1)
    return norms_B.double()


def _norm_of(row_norms: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat(row_norms)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
