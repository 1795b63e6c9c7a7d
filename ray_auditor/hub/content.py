"""What identifies weights: a hash over the tensors the audit reads, and over nothing else."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import numpy as np

from ray_auditor.hub.candidate import CandidateError, TensorSpec, WeightFile
from ray_auditor.hub.folder import check_unchanged, read_exactly, reopen

CHUNK_BYTES = 8 << 20  # a multiple of every dtype's size
# dtype -> (unsigned view, bits of the exponent): a value whose exponent is all ones is NaN or infinite.
_EXPONENT = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


def hash_content(specs: Mapping[str, TensorSpec], settings: Iterable[object] = ()) -> str:
    """Hash tensors in name order, so that neither sharding nor a repository's name changes it.

    Args:
        specs: Tensors of a floating dtype.
        settings: Further JSON values that change the computation, such as an adapter's scalings.

    Returns:
        str: sha256 hex over (name, dtype, shape, bytes) of every tensor, then the settings.

    Raises:
        CandidateError: `rejected:nonfinite_weights`, or `rejected:changed`.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        fds: dict[WeightFile, int] = {}
        for name, spec in sorted(specs.items()):
            if spec.file not in fds:
                fds[spec.file] = stack.enter_context(reopen(spec.file))
            digest.update(json.dumps([name, spec.dtype, spec.shape]).encode() + b"\n")
            for start in range(spec.start, spec.end, CHUNK_BYTES):
                num_bytes = min(CHUNK_BYTES, spec.end - start)
                chunk = read_exactly(fds[spec.file], start, num_bytes, spec.file.path.name)
                digest.update(chunk)
                _check_finite(name, spec.dtype, chunk)
        for file, fd in fds.items():
            check_unchanged(fd, file)
    for setting in settings:
        digest.update(json.dumps(setting).encode() + b"\n")
    return digest.hexdigest()


def is_zero(spec: TensorSpec) -> bool:
    """Whether every value of a tensor is zero; reads no further than the first chunk that is not.

    Raises:
        CandidateError: `rejected:changed`.
    """
    with reopen(spec.file) as fd:
        return not any(
            any(read_exactly(fd, start, min(CHUNK_BYTES, spec.end - start), spec.file.path.name))
            for start in range(spec.start, spec.end, CHUNK_BYTES)
        )


def _check_finite(name: str, dtype: str, chunk: bytes) -> None:
    view, exponent = _EXPONENT[dtype]
    bits = np.frombuffer(chunk, dtype=view)
    num_bad = int(np.count_nonzero((bits & view(exponent)) == exponent))
    if num_bad:
        raise CandidateError(
            "rejected", "nonfinite_weights", f"{name} holds {num_bad} values that are NaN or infinite"
        )
