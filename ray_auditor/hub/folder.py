"""Opening files of an untrusted folder without ever leaving it."""

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_auditor.hub.candidate import CandidateError, WeightFile

MAX_FILES = 10_000  # the largest hub repositories of one model hold a few hundred

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
# O_NONBLOCK: opening a FIFO must not wait for its writer.
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def list_names(folder: Path) -> list[str]:
    """Names of the folder's entries, sorted; at most MAX_FILES.

    Raises:
        CandidateError: more entries than that, two names that some disks take for one, or no permission
            to look.
    """
    names: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > MAX_FILES:
                    raise CandidateError(
                        "rejected", "too_many_files", f"more than {MAX_FILES} files in a folder"
                    )
    except NotADirectoryError as error:
        raise CandidateError("rejected", "not_a_folder", "it is neither a folder nor a file") from error
    except OSError as error:
        raise CandidateError("deferred", "unreadable", f"the folder: {error.strerror}") from error
    alike: dict[str, str] = {}
    for name in names:
        if (other := alike.setdefault(unicodedata.normalize("NFC", name).casefold(), name)) != name:
            # Which of the two a disk that ignores case or composes letters would serve is not ours to guess.
            raise CandidateError(
                "rejected", "duplicate_name", f"{other!r} and {name!r} differ in case or composition only"
            )
    return sorted(names)


def locate(folder: Path, name: str) -> Path:
    """Path of the file behind `name`, links resolved.

    A link may point to a file of the same folder, or, in the layout of the Hugging Face cache
    (`REPO/snapshots/COMMIT/name`), to one of `REPO/blobs`.

    Raises:
        CandidateError: `name` is not a plain file name, or a link that leads elsewhere.
    """
    if not _FILE_NAME.fullmatch(name):
        raise CandidateError("rejected", "path_traversal", f"{name!r} must be the plain name of a file")
    path = folder / name
    if not path.is_symlink():
        return path
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if target.parent not in (home, blobs):
        raise CandidateError(
            "rejected", "symlink_escape", f"{name!r} is a link out of the candidate's folder"
        )
    return target


@contextmanager
def open_file(folder: Path, name: str) -> Iterator[tuple[int, WeightFile]]:
    """Open a regular file of `folder`; yields its descriptor and what identifies it."""
    path = locate(folder, name)
    fd = _open(path, name)
    try:
        yield fd, _identify(fd, path, name)
    finally:
        os.close(fd)


@contextmanager
def reopen(file: WeightFile) -> Iterator[int]:
    """Open a file that was admitted before.

    Raises:
        CandidateError: it is no longer the same file.
    """
    fd = _open(file.path, file.path.name)
    try:
        check_unchanged(fd, file)
        yield fd
    finally:
        os.close(fd)


def check_unchanged(fd: int, file: WeightFile) -> None:
    """Raise `rejected:changed` when the open file is not, or no longer, the one that was admitted."""
    now = _identify(fd, file.path, file.path.name)
    if now != file:
        raise CandidateError(
            "rejected",
            "changed",
            f"{file.path.name} was {file.num_bytes} bytes when admitted and is {now.num_bytes} bytes now; "
            "audit it again when nothing writes to it",
        )


def read_file(folder: Path, name: str, *, max_bytes: int) -> bytes:
    """Whole content of a small file of `folder`.

    Raises:
        CandidateError: missing, not a regular file, or larger than `max_bytes`.
    """
    with open_file(folder, name) as (fd, file):
        if file.num_bytes > max_bytes:
            raise CandidateError(
                "rejected", "file_bounds", f"{name} must be at most {max_bytes} bytes, got {file.num_bytes}"
            )
        return read_exactly(fd, 0, file.num_bytes, name)


def read_exactly(fd: int, start: int, num_bytes: int, name: str) -> bytes:
    """`num_bytes` of an open file from `start`; a shorter file is `rejected:changed`."""
    parts = bytearray()
    while len(parts) < num_bytes:
        part = os.pread(fd, num_bytes - len(parts), start + len(parts))
        if not part:
            raise CandidateError("rejected", "changed", f"{name} became shorter while it was read")
        parts += part
    return bytes(parts)


def _open(path: Path, name: str) -> int:
    try:
        return os.open(path, _OPEN_FLAGS)
    except FileNotFoundError as error:
        raise CandidateError("rejected", "missing_file", f"{name} does not exist") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CandidateError("rejected", "symlink_escape", f"{name} became a link") from error
        raise CandidateError("deferred", "unreadable", f"{name}: {error.strerror}") from error


def _identify(fd: int, path: Path, name: str) -> WeightFile:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CandidateError("rejected", "not_a_file", f"{name} is not a regular file")
    return WeightFile(path, status.st_size, status.st_ino, status.st_mtime_ns)
