"""The header of a safetensors file, read by a parser of our own and by the Rust one, which must agree.

Layout: 8 bytes little-endian length, then that many bytes of JSON
`{"name": {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": {str: str}}`, then the bytes.
The Rust parser alone lets tensor names such as `../x`, 100 MB headers and shapes like [0, 2^62] through.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from ray_auditor.hub.candidate import CandidateError, TensorSpec, WeightFile
from ray_auditor.hub.config_json import parse_object
from ray_auditor.hub.folder import open_file, read_exactly

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 50_000
MAX_DIM = 1 << 32
MAX_RANK = 8
# Items of the JSON: 3 fields, a shape and two offsets per tensor, and some metadata.
MAX_HEADER_ITEMS = 12 * MAX_TENSORS + 100_000
# Quotes a tensor takes, and those left for metadata: strings are what a parsed header's memory goes to.
TENSOR_QUOTES, MAX_OTHER_QUOTES = 10, 250_000

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
    "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip

_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Tensors of a safetensors file, by name; none of their bytes is read.

    Raises:
        CandidateError: `deferred:lfs_pointer`, or `rejected:` with `safetensors:*`, `header_limits`,
            `tensor_name`, `duplicate_name`, and the codes of `folder.open_file`.
    """
    name = path.name
    with open_file(path.parent, name) as (fd, file):
        check_not_lfs_pointer(os.pread(fd, len(_LFS_POINTER), 0), name)
        if file.num_bytes < 8:
            _refuse("too_short", f"{name} has {file.num_bytes} bytes, a header needs 8")
        num_header_bytes = int.from_bytes(os.pread(fd, 8, 0), "little")
        if num_header_bytes > MAX_HEADER_BYTES:
            raise CandidateError(
                "rejected", "header_limits", f"{name}: the header must be at most {MAX_HEADER_BYTES} bytes, "
                f"got {num_header_bytes}"
            )  # fmt: skip
        if 8 + num_header_bytes > file.num_bytes:
            _refuse("too_short", f"{name} has {file.num_bytes} bytes, its header claims {num_header_bytes}")
        specs = parse_header(read_exactly(fd, 8, num_header_bytes, name), file)
        _check_second_opinion(fd, specs)
    return specs


def check_not_lfs_pointer(head: bytes, name: str) -> None:
    """Raise `deferred:lfs_pointer` for a file that Git LFS has not replaced by its content yet."""
    if head.startswith(_LFS_POINTER):
        raise CandidateError(
            "deferred", "lfs_pointer", f"{name} is a Git LFS pointer; fetch its content with `git lfs pull`"
        )


def parse_header(raw: bytes, file: WeightFile) -> dict[str, TensorSpec]:
    """Validate the JSON of a header against the size of its file.

    Args:
        raw: The header, without its 8 bytes of length.
        file: Whose header it is; every byte after the header must belong to exactly one tensor.

    Raises:
        CandidateError: as `read_header`.
    """
    label = file.path.name
    if not raw.startswith(b"{"):
        _refuse("json", f"{label}: the header must start with '{{'")
    if (num_tensors := raw.count(b'"data_offsets"')) > MAX_TENSORS:
        raise CandidateError("rejected", "header_limits", f"{label}: more than {MAX_TENSORS} tensors")
    if raw.count(b'"') > TENSOR_QUOTES * num_tensors + MAX_OTHER_QUOTES:
        raise CandidateError("rejected", "header_limits", f"{label}: more metadata than any model has")
    header = parse_object(raw, label, max_items=MAX_HEADER_ITEMS, code="safetensors:json")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse("metadata", f"{label}: __metadata__ must map strings to strings")
    data_start = 8 + len(raw)
    specs = {name: _parse_tensor(name, entry, file, data_start) for name, entry in header.items()}
    if len({name.lower() for name in specs}) != len(specs):
        raise CandidateError("rejected", "duplicate_name", f"{label}: two tensor names differ in case only")

    cursor = data_start
    for name, spec in sorted(specs.items(), key=lambda item: (item[1].start, item[1].end)):
        if spec.start != cursor:
            kind = "overlap" if spec.start < cursor else "hole"
            _refuse(kind, f"{label}: {name} starts at byte {spec.start}, expected {cursor}")
        cursor = spec.end
    if cursor != file.num_bytes:
        _refuse("length", f"{label}: the tensors end at byte {cursor} of {file.num_bytes}")
    return specs


def _parse_tensor(name: str, entry: Any, file: WeightFile, data_start: int) -> TensorSpec:
    if not _TENSOR_NAME.fullmatch(name):
        raise CandidateError(
            "rejected", "tensor_name", f"{name[:80]!r} must be of [A-Za-z0-9_.-], 256 at most"
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse("fields", f"{name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse("dtype", f"{name}: unknown dtype {dtype!r}")
    if not _are_counts(shape) or len(shape) > MAX_RANK or any(dim > MAX_DIM for dim in shape):
        _refuse(
            "shape", f"{name}: the shape must be at most {MAX_RANK} integers in [0, {MAX_DIM}], got {shape!r}"
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse("offsets", f"{name}: data_offsets must be [start, end], got {offsets!r}")
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]  # exact: Python's integers do not overflow
    if num_bits != 8 * (offsets[1] - offsets[0]):
        _refuse("size", f"{name}: {dtype}{shape} takes {num_bits} bits, its offsets span {offsets}")
    return TensorSpec(dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_second_opinion(fd: int, specs: dict[str, TensorSpec]) -> None:
    """Hold our reading against the Rust parser's, which every other loader uses."""
    ours = {name: (spec.dtype, spec.shape) for name, spec in specs.items()}
    try:
        # /dev/fd: the very file that was parsed, whatever its name points to by now.
        with safe_open(f"/dev/fd/{fd}", framework="numpy") as rust:
            slices = {name: rust.get_slice(name) for name in rust.keys()}  # noqa: SIM118
            theirs = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        _refuse("disagreement", f"the Rust parser refuses what ours accepts: {error}")
    if ours != theirs:
        names = sorted({name for name, _ in ours.items() ^ theirs.items()})
        _refuse("disagreement", f"the Rust parser reads other tensors: {names[:3]}")


def _refuse(code: str, text: str) -> NoReturn:
    raise CandidateError("rejected", f"safetensors:{code}", text)
