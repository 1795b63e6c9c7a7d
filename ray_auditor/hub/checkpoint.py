"""Admitted tensors as torch tensors, read by byte range from the very files that were admitted."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from os import preadv

import torch

from ray_auditor.hub.candidate import CandidateError, TensorSpec, WeightFile
from ray_auditor.hub.folder import check_unchanged, reopen
from ray_auditor.hub.header import read_header

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def iter_tensors(
    specs: Mapping[str, TensorSpec], names: Iterable[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read tensors one after the other into fresh CPU memory.

    Plain reads, not a memory map: a file that shrinks while it is mapped would kill the process.

    Args:
        specs: As `Admitted.tensors` or `BaseModel.tensors` has them.
        names: Which of them, in this order; None: all, in the order of their bytes.

    Yields:
        tuple: name, and the tensor in the file's dtype and shape.

    Raises:
        CandidateError: `rejected:changed` when a file is not the one that was admitted.
    """
    if names is None:
        names = sorted(specs, key=lambda name: (str(specs[name].file.path), specs[name].start))
    with ExitStack() as stack:
        fds: dict[WeightFile, int] = {}
        for name in names:
            spec = specs[name]
            if spec.file not in fds:
                fds[spec.file] = stack.enter_context(reopen(spec.file))
            tensor = _read(fds[spec.file], spec)
            check_unchanged(fds[spec.file], spec.file)
            yield name, tensor


def _read(fd: int, spec: TensorSpec) -> torch.Tensor:
    buffer = torch.empty(spec.end - spec.start, dtype=torch.uint8)
    view = buffer.numpy().data
    num_read = 0
    while num_read < len(view):
        num_bytes = preadv(fd, [view[num_read:]], spec.start + num_read)
        if not num_bytes:
            raise CandidateError(
                "rejected", "changed", f"{spec.file.path.name} became shorter while it was read"
            )
        num_read += num_bytes
    return buffer.view(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)


__all__ = ["iter_tensors", "read_header"]
