"""Where candidates come from: a folder that holds one sub-folder per finetune."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray_auditor.hub.candidate import Candidate, CandidateError, Kind, Refused, printable
from ray_auditor.hub.folder import list_names, open_file
from ray_auditor.hub.header import check_not_lfs_pointer

ADAPTER_NAME = "adapter_model.safetensors"
MAX_ID_CHARS = 128
MAX_POINTER_BYTES = 1024  # Git LFS pointers are about 130 bytes

NO_CANDIDATES = frozenset({".git", ".cache", ".huggingface"})  # what a clone or a download leaves behind

_ID = re.compile(rf"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_ID_CHARS - 1}}}")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")


def list_folder(path: str | Path) -> Iterator[Candidate | Refused]:
    """Every finetune in a folder, sorted by id; each sub-folder becomes one row.

    Files beside the sub-folders are no candidates. Nothing is read except files too small to be weights,
    which may be Git LFS pointers.

    Args:
        path: The user's own folder; what lies in it is not trusted.

    Raises:
        ValueError: there is no such folder, or it is itself a finetune.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        is_what = "is a file" if root.exists() else "is not there"
        raise ValueError(
            f"candidates.path must be a folder with one sub-folder per finetune, got {str(path)!r}, which "
            f"{is_what}"
        )
    root = root.resolve()
    with os.scandir(root) as entries:
        found = [(entry.name, entry.is_symlink(), entry.is_file()) for entry in entries]
    # A link that leads nowhere is no file: it gets its row, with the reason.
    folders = sorted(
        (name, is_link) for name, is_link, is_file in found if not is_file and name not in NO_CANDIDATES
    )
    if not folders and any(name.endswith(".safetensors") for name, _, _ in found):
        raise ValueError(f"candidates.path {str(path)!r} is a finetune itself; give the folder that holds it")
    return _examine_all(root, folders)


def _examine_all(root: Path, folders: list[tuple[str, bool]]) -> Iterator[Candidate | Refused]:
    num_alike: dict[str, int] = {}
    for name, _ in folders:
        num_alike[name.lower()] = num_alike.get(name.lower(), 0) + 1
    for name, is_link in folders:
        try:
            _check_id(name, num_alike[name.lower()])
            if is_link and (root / name).resolve().parent != root:
                raise CandidateError(
                    "rejected", "symlink_escape", "the folder is a link out of candidates.path"
                )
            yield examine(name, root / name)
        except CandidateError as error:
            yield Refused(distinct_id(name), error.status, error.reason)


def distinct_id(name: str) -> str:
    """A printable id; one that had to be cut or escaped ends in a hash, so that no two folders share it."""
    shown = printable(name, MAX_ID_CHARS)
    if shown == name:
        return name
    tag = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return f"{printable(name, MAX_ID_CHARS - len(tag) - 1)}~{tag}"


def _check_id(name: str, num_alike: int) -> None:
    if not _ID.fullmatch(name):
        bound = f"1 to {MAX_ID_CHARS} of [A-Za-z0-9._-], without '..'"
        raise CandidateError("rejected", "id", f"the folder's name must be {bound}, got {name[:80]!r}")
    if num_alike > 1:
        raise CandidateError(
            "rejected", "duplicate_name", f"{num_alike} folders differ from {name!r} in case only"
        )


def examine(candidate_id: str, folder: Path) -> Candidate:
    """Decide by file names what a folder holds.

    Raises:
        CandidateError: `skipped:` with `pickle_only`, `quantized` or `no_weights`, `deferred:lfs_pointer`,
            `rejected:ambiguous_weights`, or the errors of opening a file.
    """
    kind, weights = classify(list_names(folder))
    num_bytes = 0
    for name in weights:
        with open_file(folder, name) as (fd, file):
            if file.num_bytes < MAX_POINTER_BYTES:
                check_not_lfs_pointer(os.pread(fd, MAX_POINTER_BYTES, 0), name)
            num_bytes += file.num_bytes
    return Candidate(candidate_id, folder, kind, num_bytes)


def classify(names: Sequence[str]) -> tuple[Kind, list[str]]:
    """What file names say: the kind of a candidate, and which of its files are weights.

    Raises:
        CandidateError: `skipped:` with `pickle_only`, `quantized` or `no_weights`, or
            `rejected:ambiguous_weights`.
    """
    weights = [name for name in names if name.endswith(".safetensors")]
    full = [name for name in weights if not name.startswith("adapter_")]
    if ADAPTER_NAME in weights:
        if full and "config.json" in names:
            raise CandidateError(
                "rejected", "ambiguous_weights", "the folder holds an adapter and full weights"
            )
        return "adapter", [ADAPTER_NAME]
    if not full:
        raise _no_weights(names)
    return "full", full


def _no_weights(names: Sequence[str]) -> CandidateError:
    def of(*endings: str) -> list[str]:
        return [name for name in names if name.lower().endswith(endings)]

    if gguf := of(".gguf"):
        return CandidateError("skipped", "quantized", f"{gguf[0]} is GGUF; only safetensors are audited")
    if pickles := of(*_PICKLES):
        return CandidateError(
            "skipped",
            "pickle_only",
            f"{pickles[0]} is a pickle, which is never opened; convert it to safetensors",
        )
    return CandidateError("skipped", "no_weights", f"no safetensors among {len(names)} files")
