"""The byte ranges of a remote safetensors file that an audit reads, brought into a file of the same length.

What lies above the hook stays a hole: every offset is that of the whole file, so admission reads the result
as it reads any other and never looks into a hole. While a file is on its way a cursor behind its last byte
says how much has come; it moves only after what it counts is on the disk, for no hash will tell.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray_auditor.hub.candidate import CandidateError, WeightFile
from ray_auditor.hub.header import MAX_HEADER_BYTES, parse_header
from ray_auditor.hub.weights import lies_below_hook

HEAD_BYTES = 1 << 16  # the first request: most headers fit
MAX_GAP_BYTES = 1 << 20  # two ranges so near are one request: the gap costs less than a round trip
SYNC_BYTES = 64 << 20  # at most so much comes again after a kill
CURSOR_BYTES = 8

Outcome = dict[str, Any]
Read = Callable[[int, int], Iterator[bytes | Outcome]]


class RangedFile:
    """A file on its way, range by range, in an order that its own header decides.

    Args:
        descriptor: Open for reading and writing; what an earlier attempt brought is kept.
        num_bytes: Of the whole file.
        read: Yields the bytes from a start to a stop, or one outcome other than done.
        alive: Called with every chunk.
    """

    def __init__(self, descriptor: int, num_bytes: int, read: Read, alive: Callable[[int], None]) -> None:
        self._descriptor, self._num_bytes = descriptor, num_bytes
        self._read, self._alive = read, alive
        self._passed = 0  # bytes of the ranges asked for so far
        self._cursor = 0  # of those, how many are on the disk
        self.num_moved = 0
        if os.fstat(descriptor).st_size == num_bytes + CURSOR_BYTES:
            self._cursor = int.from_bytes(os.pread(descriptor, CURSOR_BYTES, num_bytes), "little")
        else:
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, num_bytes + CURSOR_BYTES)

    def fetch(self, num_layers: int) -> Outcome:
        """Bring the header and every tensor at or below the hook; `done`, or what `read` said instead.

        A header that cannot be read ends it too: admission finds the same one and says what is wrong with it.
        """
        head = min(HEAD_BYTES, self._num_bytes)
        if (refusal := self._bring(0, head)) is not None:
            return refusal
        num_header_bytes = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        end = 8 + num_header_bytes
        if num_header_bytes > MAX_HEADER_BYTES or end > self._num_bytes:
            return self._finish()
        if end > head and (refusal := self._bring(head, end)) is not None:
            return refusal
        file = WeightFile(Path("a remote file"), self._num_bytes, 0, 0)
        try:
            specs = parse_header(os.pread(self._descriptor, num_header_bytes, 8), file)
        except CandidateError:
            return self._finish()
        wanted = [(spec.start, spec.end) for name, spec in specs.items() if lies_below_hook(name, num_layers)]
        for start, stop in join_ranges(wanted, after=max(head, end)):
            if (refusal := self._bring(start, stop)) is not None:
                return refusal
        return self._finish()

    def _bring(self, start: int, stop: int) -> Outcome | None:
        """Read a range, or what is missing of it; None when all of it is there."""
        skipped = min(max(0, self._cursor - self._passed), stop - start)
        self._passed += skipped
        position, unsynced = start + skipped, 0
        if position < stop:
            for chunk in self._read(position, stop):
                if isinstance(chunk, dict):
                    self._sync()
                    return chunk
                kept = chunk[: stop - position]
                os.pwrite(self._descriptor, kept, position)
                position += len(kept)
                self._passed += len(kept)
                self.num_moved += len(kept)
                unsynced += len(kept)
                self._alive(position)
                if unsynced >= SYNC_BYTES:
                    self._sync()
                    unsynced = 0
            self._sync()
        if position < stop:
            return {"outcome": "network", "text": f"a range ended {stop - position} bytes early"}
        return None

    def _sync(self) -> None:
        os.fdatasync(self._descriptor)
        self._cursor = self._passed
        os.pwrite(self._descriptor, self._cursor.to_bytes(CURSOR_BYTES, "little"), self._num_bytes)

    def _finish(self) -> Outcome:
        os.ftruncate(self._descriptor, self._num_bytes)
        return {"outcome": "done", "num_moved": self.num_moved}


def join_ranges(ranges: list[tuple[int, int]], *, after: int) -> list[tuple[int, int]]:
    """Ranges in order, those nearer than MAX_GAP_BYTES joined, without what lies before `after`."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(
        (max(start, after), stop) for start, stop in ranges if stop > max(start, after)
    ):
        if joined and start - joined[-1][1] <= MAX_GAP_BYTES:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined
