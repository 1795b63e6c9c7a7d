"""Admitted tensors as torch tensors, read by byte range from the very files that were admitted."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import preadv

import torch
from torch import Tensor

from ray_auditor.hub.candidate import CandidateError, MergedTensor, TensorSource, TensorSpec, WeightFile
from ray_auditor.hub.folder import check_unchanged, reopen
from ray_auditor.hub.header import read_header

# Shape suffixes: O rows (out), I columns (in), R rank.

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def iter_tensors(
    specs: Mapping[str, TensorSource], names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Read tensors one after the other into fresh CPU memory.

    Plain reads, not a memory map: a file that shrinks while it is mapped would kill the process.

    Args:
        specs: As `Admitted.tensors` or `BaseModel.tensors` has them.
        names: Which of them, in this order; None: all, in the order of their bytes.

    Yields:
        tuple: name, and the tensor in the file's dtype and shape; in fp32 where it is computed from several.

    Raises:
        CandidateError: `rejected:changed` when a file is not the one that was admitted,
            `rejected:nonfinite_weights` when what is computed is not finite.
    """
    if names is None:
        names = sorted(specs, key=lambda name: _place_of(specs[name]))
    with ExitStack() as stack:
        fds: dict[WeightFile, int] = {}

        def read(spec: TensorSpec) -> Tensor:
            if spec.file not in fds:
                fds[spec.file] = stack.enter_context(reopen(spec.file))
            tensor = _read(fds[spec.file], spec)
            check_unchanged(fds[spec.file], spec.file)
            return tensor

        for name in names:
            source = specs[name]
            if isinstance(source, TensorSpec):
                yield name, read(source)
                continue
            merged = merge(
                source,
                read(source.base).float(),
                read(source.added).float(),
                None if source.lora_A is None else read(source.lora_A).float(),
                None if source.magnitude is None else read(source.magnitude).float(),
            )
            if not merged.isfinite().all():
                raise CandidateError(
                    "rejected",
                    "nonfinite_weights",
                    f"{name} is not finite once the adapter is merged into it",
                )
            yield name, merged


@contextmanager
def open_tensor(spec: TensorSpec) -> Iterator[Callable[[int, Tensor], None]]:
    """Read a tensor piece by piece into memory of the caller's; nothing read counts before this ends.

    Yields:
        function: fills contiguous CPU memory with the tensor's bytes from an offset (of bytes) on.

    Raises:
        CandidateError: `rejected:changed` when the file is not, or is no longer, the one that was admitted.
    """
    with reopen(spec.file) as fd:
        yield lambda offset, memory: _fill(fd, spec, spec.start + offset, memory)
        check_unchanged(fd, spec.file)


def merge(
    how: MergedTensor, base_OI: Tensor, added_OR: Tensor, lora_A_RI: Tensor | None, magnitude_O: Tensor | None
) -> Tensor:
    """One weight as its adapter changes it, in fp32.

    Args:
        how: What to do with them.
        base_OI: The base's weight or bias.
        added_OR: lora_B; what is added to a bias.
        lora_A_RI: lora_A; None for a bias.
        magnitude_O: DoRA's; None without.

    Source: Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353; PiSSA: Meng et al.
        2024, arXiv:2404.02948; OLoRA: Buyukakyuz 2024, arXiv:2406.01775.
    """
    if lora_A_RI is None:
        return base_OI + how.scaling * added_OR
    rank = len(lora_A_RI)
    if how.start == "pissa":
        base_OI = base_OI - principal_part(base_OI, rank)
    elif how.start == "olora":
        q_OI, r_II = torch.linalg.qr(base_OI)
        base_OI = base_OI - how.scaling * (q_OI[:, :rank] @ r_II[:rank])
    merged_OI = base_OI + how.scaling * (added_OR @ lora_A_RI)
    if magnitude_O is None:
        return merged_OI
    factor_O: Tensor = magnitude_O / torch.linalg.vector_norm(merged_OI, dim=1)
    return factor_O[:, None] * merged_OI


def principal_part(weight_OI: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank, in fp32: what PiSSA moves out of a weight into its first A and B.

    From the eigenvectors of the smaller Gram matrix, in fp64: their squared spectrum costs no digit of fp32.
    """
    wide_OI = weight_OI.double()
    if wide_OI.shape[0] < wide_OI.shape[1]:
        return principal_part(wide_OI.T, rank).T
    vectors_IR: Tensor = torch.linalg.eigh(wide_OI.T @ wide_OI).eigenvectors[:, -rank:]
    return ((wide_OI @ vectors_IR) @ vectors_IR.T).float()


def _place_of(source: TensorSource) -> tuple[str, int]:
    spec = source if isinstance(source, TensorSpec) else source.added
    return str(spec.file.path), spec.start


def _read(fd: int, spec: TensorSpec) -> Tensor:
    tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    _fill(fd, spec, spec.start, tensor)
    return tensor


def _fill(fd: int, spec: TensorSpec, start: int, memory: Tensor) -> None:
    """Read from byte `start` of the file until the memory is full."""
    view = memory.view(-1).view(torch.uint8).numpy().data
    num_read = 0
    while num_read < len(view):
        num_bytes = preadv(fd, [view[num_read:]], start + num_read)
        if not num_bytes:
            raise CandidateError(
                "rejected", "changed", f"{spec.file.path.name} became shorter while it was read"
            )
        num_read += num_bytes


__all__ = ["iter_tensors", "open_tensor", "read_header"]
