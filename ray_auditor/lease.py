"""One sweep at a time in an output folder: who holds it, and how a dead holder's claim ends.

On one machine the claim is a lock of the kernel's, which ends with its process. Between machines, for locks
do not cross every shared filesystem, the claim is the file itself: a living holder touches it every BEAT_S,
and one that nobody touched for STALE_S is taken over. Times are the filesystem's own, so clocks may differ.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BEAT_S = 10.0
STALE_S = 120.0
WAIT_S = 10.0  # for a holder that only writes a report again
SETTLE_S = 2.0  # for another machine's takeover of the same stale claim to show
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LeaseHeld(Exception):
    """Somebody else has the folder; the text says who.

    Args:
        text: Who, and what to do.
        brief: Whether they only write a report again, or have not said yet what they do.
    """

    def __init__(self, text: str, *, brief: bool = False) -> None:
        super().__init__(text)
        self.brief = brief


class Lease:
    """The right to write into a folder, for the time of a `with` block.

    Args:
        folder: The output folder; made if it is not there.
        brief: Whether it is held for a moment only, so that others wait for it, WAIT_S at most.
        beat_s: Seconds between two signs of life.
        stale_s: Seconds without one after which another machine may take over.

    Raises:
        LeaseHeld: On entering, when somebody else holds it; nothing was touched.
        ValueError: On entering, when the folder cannot be written.
    """

    def __init__(
        self, folder: Path, *, brief: bool = False, beat_s: float = BEAT_S, stale_s: float = STALE_S
    ) -> None:
        self._path = folder / ".lease"
        self._beat_s, self._stale_s = beat_s, stale_s
        self._claim = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot_id": _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "",
            "nonce": uuid.uuid4().hex,
            "brief": brief,
        }
        self._descriptor = -1
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise ValueError(
                f"out_dir must be a folder that can be written, got {self._path.parent}: {error}; "
                "give another one, or a copy of it"
            ) from error
        try:
            self._wait_and_take()
        except BaseException:
            os.close(self._descriptor)
            raise
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._read().get("nonce") == self._claim["nonce"]:
            # Never unlinked: two locks on two files that had the same name exclude nobody.
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def check(self) -> None:
        """Make sure that the folder is still ours, before something is replaced in it.

        Raises:
            LeaseHeld: This machine was away for so long that another one took over.
        """
        if (holder := self._read()).get("nonce") != self._claim["nonce"]:
            raise LeaseHeld(f"{self._path.parent} was taken over by {_describe(holder)}")

    def _wait_and_take(self) -> None:
        end = time.monotonic() + WAIT_S
        while True:
            try:
                return self._take()
            except LeaseHeld as held:
                if not held.brief or time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def _take(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held(self._read()) from None
        holder = self._read()
        # Under the same kernel the lock would have told; a name alone says nothing, for pods share theirs.
        elsewhere = bool(holder) and holder.get("boot_id") != self._claim["boot_id"]
        if elsewhere:
            age_s = self._now() - os.fstat(self._descriptor).st_mtime
            if age_s < self._stale_s:
                raise self._held(holder, f", which gave a sign of life {max(0.0, age_s):.0f} s ago")
        data = json.dumps(self._claim).encode()
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))
        os.fsync(self._descriptor)
        if elsewhere:
            self._ended.wait(SETTLE_S)
            self.check()

    def _held(self, holder: dict[str, Any], more: str = "") -> LeaseHeld:
        brief = not holder or holder.get("brief") is True
        doing = "written" if brief else "swept"
        return LeaseHeld(
            f"{self._path.parent} is being {doing} by {_describe(holder)}{more}; wait for it, or stop it",
            brief=brief,
        )

    def _read(self) -> dict[str, Any]:
        """The claim on file; empty when there is none, or none that can be read."""
        with contextlib.suppress(OSError, ValueError):
            claim = json.loads(self._path.read_bytes())
            if isinstance(claim, dict):
                return claim
        return {}

    def _now(self) -> float:
        """The filesystem's time."""
        probe = self._path.with_name(f".lease.{self._claim['nonce']}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            if self._read().get("nonce") != self._claim["nonce"]:
                return
            with contextlib.suppress(OSError):
                os.utime(self._path)


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process that has just begun"
    host, pid = str(holder.get("host"))[:80], str(holder.get("pid"))[:20]
    return f"process {pid} on {host}"
