"""Fetched files by their content, in a folder with a bound, and never taken away from under a reader.

    blobs/OID            whole and verified
    partial/OID          on its way; locked by who writes it, kept for the next attempt
    folders/KEY/NAME     hard links to blobs: what a candidate's folder would be
    pins/KEY             locked while somebody reads the folder; its time is that of the last use

A lock is the kernel's, so it goes with its process, however that ends. A blob's link count says how many
folders have it, so there is no book to keep that a kill could leave wrong.
"""

import fcntl
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_auditor.hub.candidate import CandidateError
from ray_auditor.hub.remote import Pinned, RemoteFile


class Cache:
    """One cache on disk; any number of processes may use it.

    Args:
        root: Its folder, made here.
        max_bytes: What it may hold. Least recently used folders make room for new ones.
        min_free_bytes: What stays free on its disk.

    Raises:
        ValueError: The folder cannot be written.
    """

    def __init__(self, root: Path, *, max_bytes: int, min_free_bytes: int) -> None:
        self.root = root
        self.max_bytes, self.min_free_bytes = max_bytes, min_free_bytes
        try:
            for name in ("blobs", "partial", "folders", "pins"):
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"download.cache_dir must be a folder that can be written: {error}") from error
        self._room = threading.Condition()
        self._wanted: Counter[str] = Counter()  # oids of candidates being fetched: in no folder yet
        self._reserved = 0  # bytes
        self._num_pins = 0
        self._num_waiting = 0

    def blob(self, oid: str) -> Path:
        """Where a file's bytes lie once they are verified."""
        return self.root / "blobs" / oid

    def partial(self, oid: str) -> Path:
        """Where they arrive."""
        return self.root / "partial" / oid

    def missing(self, pinned: Pinned) -> list[RemoteFile]:
        """Files that must be fetched."""
        distinct = {file.blob: file for file in pinned.files}
        return [file for file in distinct.values() if not self.blob(file.blob).is_file()]

    @contextmanager
    def pin(self, key: str) -> Iterator[Path]:
        """Keep a candidate's folder, whether it is there yet or not, until the block ends."""
        pin = self.root / "pins" / key
        while True:
            descriptor = os.open(pin, os.O_CREAT | os.O_RDWR, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:  # 0: evicted between open and lock
                break
            os.close(descriptor)
        os.utime(descriptor)
        with self._room:
            self._num_pins += 1
        try:
            yield self.root / "folders" / key
        finally:
            os.close(descriptor)
            with self._room:
                self._num_pins -= 1
                self._room.notify_all()

    def stage(self, pinned: Pinned) -> Path:
        """Lay out a candidate's folder from blobs that are all there.

        The caller holds its pin. Built beside and renamed, so it is whole or not there.
        """
        folder = self.root / "folders" / pinned.key
        if folder.is_dir():
            return folder
        building = self.root / "partial" / f"{pinned.key}.{os.getpid()}.{threading.get_ident()}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for file in pinned.files:
            os.link(self.blob(file.blob), building / file.name)
        try:
            os.rename(building, folder)
        except OSError:
            shutil.rmtree(building)  # somebody else staged the same bytes first
            if not folder.is_dir():
                raise
        return folder

    @contextmanager
    def room(self, pinned: Pinned) -> Iterator[None]:
        """Room for what is missing of a candidate, before any byte of it is asked for.

        Waits while others that are being fetched or read could make room later.

        Raises:
            CandidateError: `skipped:too_large` for the whole cache, or `deferred:disk`.
        """
        if pinned.num_bytes > self.max_bytes:
            raise CandidateError(
                "skipped",
                "too_large",
                f"{pinned.num_bytes} bytes, and download.max_cache_bytes is {self.max_bytes}",
            )
        oids = [file.blob for file in pinned.files]
        with self._room:
            self._wanted.update(oids)  # from here on nothing of it is evicted, neither blobs nor parts
            missing = self.missing(pinned)
            num_bytes = sum(file.num_bytes - _size(self.partial(file.blob)) for file in missing)
            self._num_waiting += 1
            try:
                while not self._fits(num_bytes):
                    # Every pin is a candidate being read, being fetched, or waiting like this one.
                    if self._num_pins <= self._num_waiting and not self._reserved:
                        self._wanted.subtract(oids)
                        raise CandidateError(
                            "deferred",
                            "disk",
                            f"{num_bytes} bytes do not fit under download.max_cache_bytes {self.max_bytes} "
                            f"and download.min_free_bytes {self.min_free_bytes}",
                        )
                    self._room.wait(timeout=1.0)
            finally:
                self._num_waiting -= 1
            self._reserved += num_bytes
        try:
            yield
        finally:
            with self._room:
                self._wanted.subtract(oids)
                self._reserved -= num_bytes
                self._room.notify_all()

    def _fits(self, num_bytes: int) -> bool:
        """Make room by evicting; whether there is enough."""
        while True:
            used = sum(_size(path) for name in ("blobs", "partial") for path in (self.root / name).iterdir())
            free = shutil.disk_usage(self.root).free
            if (
                used + self._reserved + num_bytes <= self.max_bytes
                and free - self._reserved - num_bytes >= self.min_free_bytes
            ):
                return True
            if not self._sweep() and not self._evict_one():
                return False

    def _evict_one(self) -> bool:
        """Remove the folder used longest ago that nobody reads."""
        pins = {pin: pin.stat().st_mtime_ns for pin in (self.root / "pins").iterdir()}
        for pin in sorted(pins, key=pins.__getitem__):
            with _if_free(pin) as is_free:
                if is_free:
                    shutil.rmtree(self.root / "folders" / pin.name, ignore_errors=True)
                    pin.unlink()
                    return True
        return False

    def _sweep(self) -> bool:
        """Remove blobs that are in no folder and parts that nobody writes; whether there were any."""
        removed = False
        for path in [*(self.root / "blobs").iterdir(), *(self.root / "partial").iterdir()]:
            if self._wanted[path.name] or not path.is_file() or path.stat().st_nlink > 1:
                continue
            with _if_free(path) as is_free:
                if is_free:
                    path.unlink()
                    removed = True
        return removed


def bytes_to_move(root: Path, file: RemoteFile, range_share: float = 1.0) -> int:
    """How much of a file a cache at `root` lacks; looks, and makes nothing.

    Args:
        root: The cache's folder.
        file: The file.
        range_share: The share of a file that is expected to be wanted when it is read in ranges.
    """
    if (root / "blobs" / file.blob).is_file():
        return 0
    if file.num_layers is not None:
        return round(file.num_bytes * range_share)
    return file.num_bytes - _size(root / "partial" / file.blob)


@contextmanager
def _if_free(path: Path) -> Iterator[bool]:
    """Lock a file against everyone; False when somebody has it, or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = True
    except BlockingIOError:
        is_free = False
    try:
        yield is_free
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    """What a file takes of the disk: its holes are free."""
    try:
        status = path.stat()
        return min(status.st_size, 512 * status.st_blocks) if path.is_file() else 0
    except FileNotFoundError:
        return 0
