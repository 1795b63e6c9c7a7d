"""The byte ranges of a remote safetensors file that an audit reads, brought into a file of the same length.

What lies above the hook stays a hole: every offset is that of the whole file, so admission reads the result
as it reads any other and never looks into a hole. While a file is on its way a cursor behind its last byte
says how much has come; it moves only after what it counts is on the disk, for no hash will tell.
"""

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from ray_auditor.hub.candidate import CandidateError, WeightFile
from ray_auditor.hub.header import MAX_HEADER_BYTES, parse_header
from ray_auditor.hub.weights import lies_below_hook

HEAD_BYTES = 1 << 16  # the first request: most headers fit
MAX_RANGES = 64  # requests for the tensors of one file
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
        granted: Bytes that may be asked for.
    """

    def __init__(
        self, descriptor: int, num_bytes: int, read: Read, alive: Callable[[int], None], granted: int
    ) -> None:
        self._descriptor, self._num_bytes = descriptor, num_bytes
        self._read, self._alive, self._granted = read, alive, granted
        self._passed = 0  # bytes of the ranges asked for so far
        self._cursor = 0  # of those, how many are on the disk
        if os.fstat(descriptor).st_size == num_bytes + CURSOR_BYTES:
            self._cursor = int.from_bytes(os.pread(descriptor, CURSOR_BYTES, num_bytes), "little")
        else:
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, num_bytes + CURSOR_BYTES)

    def fetch(self, num_layers: int) -> Outcome:
        """Bring the header and every tensor at or below the hook.

        `done`, or what `read` said instead, or `more`: `num_bytes` are missing, and fewer were granted.
        A header that cannot be read ends it too: admission finds the same one and says what is wrong with it.
        """
        head = min(HEAD_BYTES, self._num_bytes)
        if (refusal := self._bring([(0, head)])) is not None:
            return refusal
        num_header_bytes = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        end = 8 + num_header_bytes
        if num_header_bytes > MAX_HEADER_BYTES or end > self._num_bytes:
            return self._finish()
        if end > head and (refusal := self._bring([(head, end)])) is not None:
            return refusal
        file = WeightFile(Path("a remote file"), self._num_bytes, 0, 0)
        try:
            specs = parse_header(os.pread(self._descriptor, num_header_bytes, 8), file)
        except CandidateError:
            return self._finish()
        wanted = [(spec.start, spec.end) for name, spec in specs.items() if lies_below_hook(name, num_layers)]
        return self._bring(join_ranges(wanted, after=max(head, end))) or self._finish()

    def _bring(self, ranges: list[tuple[int, int]]) -> Outcome | None:
        """Read what is missing of some ranges, unless more than was granted is; None when all is there."""
        there = max(0, self._cursor - self._passed)
        missing = max(0, sum(stop - start for start, stop in ranges) - there)
        if missing > self._granted:
            return {"outcome": "more", "num_bytes": missing}
        self._granted -= missing
        for start, stop in ranges:
            if (refusal := self._bring_one(start, stop)) is not None:
                return refusal
        return None

    def _bring_one(self, start: int, stop: int) -> Outcome | None:
        skipped = min(max(0, self._cursor - self._passed), stop - start)
        self._passed += skipped
        position, unsynced = start + skipped, 0
        if position < stop:
            for chunk in self._read(position, stop):
                if isinstance(chunk, dict):
                    self._sync()
                    return chunk
                if position + len(chunk) > stop:
                    os.ftruncate(self._descriptor, 0)
                    return {"outcome": "size", "text": f"more than the {stop - start} bytes of a range came"}
                os.pwrite(self._descriptor, chunk, position)
                position += len(chunk)
                self._passed += len(chunk)
                unsynced += len(chunk)
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
        return {"outcome": "done"}


def join_ranges(
    ranges: list[tuple[int, int]], *, after: int, max_gap: int = MAX_GAP_BYTES
) -> list[tuple[int, int]]:
    """Ranges in order, those nearer than `max_gap` joined, without what lies before `after`.

    Where more than MAX_RANGES would be left, the smallest gaps between them are read as well.
    """
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(
        (max(start, after), stop) for start, stop in ranges if stop > max(start, after)
    ):
        if joined and start - joined[-1][1] <= max_gap:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    if len(joined) <= MAX_RANGES:
        return joined
    gaps = sorted(right[0] - left[1] for left, right in pairwise(joined))
    return join_ranges(joined, after=after, max_gap=gaps[len(joined) - MAX_RANGES - 1])
