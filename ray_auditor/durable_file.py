"""Files that are there whole or not at all, whenever their writer is killed."""

import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def put_file(target: Path, data: bytes | memoryview, *, temp: Path | None = None, replace: bool) -> bool:
    """Make `target` hold `data`, synced; False when it exists and `replace` is not set.

    Args:
        target: On the filesystem of `temp`.
        data: All of it.
        temp: Folder for the file while it is written, whose owner removes what killed writers left there.
            None: beside `target`, where the next to write that does.
        replace: Whether an earlier file makes way.

    Raises:
        ValueError: The filesystem has no hard links.
        OSError: The write failed; nothing is left of it.
    """
    prefix = "" if temp else f".{target.name}."
    if temp is None:
        for left in target.parent.glob(f"{prefix}{'[0-9a-f]' * 32}"):
            remove_if_stale(left)
    with _locked_temp(temp or target.parent, prefix) as (path, descriptor):
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
        try:
            if replace:
                os.replace(path, target)
            else:
                os.link(path, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP):
                raise ValueError(f"out_dir needs a filesystem with hard links, got {target}") from error
            raise
        sync_path(target.parent)
        return True


def append_lines(target: Path, lines: bytes) -> None:
    """Append whole lines to `target`, synced; what a killed writer left of a line goes first.

    Of several writers each appends in its turn. A reader must leave out a last line without its end.

    Args:
        target: Made when it is not there.
        lines: Each ending in a line feed.
    """
    descriptor = os.open(target, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with open(descriptor, "rb", closefd=False) as file:
            os.ftruncate(descriptor, file.read().rfind(b"\n") + 1)
        view = memoryview(lines)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_path(target.parent)


def remove_if_stale(temp: Path) -> None:
    """Remove what a killed writer left, if it can be; a living writer's file is locked and stays."""
    with suppress(OSError):
        descriptor = os.open(temp, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)  # NFS locks what can be written
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temp.unlink()
        finally:
            os.close(descriptor)


@contextmanager
def _locked_temp(folder: Path, prefix: str) -> Iterator[tuple[Path, int]]:
    """A new file whose lock says that its writer lives: the kernel drops the lock with the process."""
    while True:
        temp = folder / f"{prefix}{uuid.uuid4().hex}"
        descriptor = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # 0: removed as stale between open and lock
            break
        os.close(descriptor)
    try:
        yield temp, descriptor
    finally:
        temp.unlink(missing_ok=True)
        os.close(descriptor)


def sync_path(path: Path) -> None:
    """Wait until what was written to a file, or which names a folder holds, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
