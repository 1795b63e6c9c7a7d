"""Bring a candidate's files into the cache: what is asked of the child that downloads, and how often."""

import contextlib
import json
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from ray_auditor.hub.cache import Cache
from ray_auditor.hub.candidate import CandidateError, printable
from ray_auditor.hub.download import Outcome
from ray_auditor.hub.endpoint import RETRIED, StatusError, refuse
from ray_auditor.hub.rate_limit import RateLimit, RateLimited
from ray_auditor.hub.remote import Pinned, RemoteFile
from ray_auditor.hub.secret import drop_secrets

MAX_BACKOFF_S = 30.0


@dataclass(frozen=True)
class Origin:
    """Where the bytes of a sweep come from: a hub, or a store whose keys `secrets` holds.

    Neither the token nor the keys are in any text this object becomes.
    """

    url: str
    is_store: bool = False
    token: str | None = field(default=None, repr=False)
    secrets: dict[str, str] = field(default_factory=dict, repr=False)

    def locate(self, pinned: Pinned, file: RemoteFile) -> dict[str, str]:
        """The part of a job that says where a file is."""
        if self.is_store:
            return {"store": self.url, "name": f"{pinned.repo}/{file.name}"}
        url = f"{self.url}/{pinned.repo}/resolve/{pinned.commit}/{quote(file.name)}"
        return {"url": url, "commit": pinned.commit}


class Fetcher:
    """Fetches candidates; each thread that calls it has a child process of its own.

    Args:
        origin: Where from.
        cache: Where to.
        limit: One for the whole sweep.
        stall_s: A child that brings no byte for so long is killed.
        max_attempts: How often a file is tried.
        backoff_s: Pause before the second attempt; it doubles from there.
        ask_to_move: Asked before every attempt at a file, and again with what it needs when that is more;
            gives the bytes that it may move, or raises CandidateError to stop it.
        settle: Told how many bytes more, or fewer, an attempt moved; nothing where it ends without a word.
    """

    def __init__(
        self,
        origin: Origin,
        cache: Cache,
        limit: RateLimit,
        *,
        stall_s: float,
        max_attempts: int,
        backoff_s: float = 1.0,
        ask_to_move: Callable[[RemoteFile, int | None], int] = lambda file, _: file.num_bytes,
        settle: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.cache = cache
        self.num_bytes, self.seconds = 0, 0.0  # moved so far, and what that took, side by side or not
        self._origin, self._limit = origin, limit
        self._stall_s, self._max_attempts, self._backoff_s = stall_s, max_attempts, backoff_s
        self._ask_to_move, self._settle = ask_to_move, settle
        self._lock = threading.Lock()
        self._busy: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        self._stopping = threading.Event()

    def fetch(self, pinned: Pinned) -> Path:
        """The candidate's folder, verified. The caller holds its pin.

        Raises:
            CandidateError: It cannot be had, or is not what the source said.
            ValueError: The token is not accepted.
        """
        with self.cache.room(pinned):
            for _ in range(self._max_attempts):
                for file in self.cache.missing(pinned):
                    with self._lock:
                        busy = self._busy[file.blob]
                    with busy:  # another candidate may have the same bytes
                        if not self.cache.blob(file.blob).is_file():
                            self._fetch_file(pinned, file)
                try:
                    return self.cache.stage(pinned)
                except FileNotFoundError:
                    continue  # another process that shares the cache evicted a blob in between
        raise CandidateError("deferred", "disk", "others empty the cache faster than it fills")

    def close(self) -> None:
        """Kill every child; threads that wait for one stop with `deferred:interrupted`."""
        self._stopping.set()
        with self._lock:
            for child in self._children:
                child.end()

    def _fetch_file(self, pinned: Pinned, file: RemoteFile) -> None:
        job: Outcome = {
            **self._origin.locate(pinned, file),
            "path": str(self.cache.partial(file.blob)),
            "target": str(self.cache.blob(file.blob)),
            "num_bytes": file.num_bytes,
            "oid": file.oid,
        }
        if file.num_layers is not None:
            job["num_layers"] = file.num_layers
        num_corrupt = 0
        said = ""
        for attempt in range(self._max_attempts):
            if attempt:
                self._wait(attempt)
            outcome = self._attempt(file, job)
            kind, said = outcome["outcome"], f"{file.name}: {outcome.get('text', '')}"
            if kind == "done":
                self._limit.learn(outcome["headers"])
                return
            if kind == "corrupt":
                num_corrupt += 1
                if num_corrupt == 2:
                    raise CandidateError("failed", "corrupt", said)
            elif kind == "size":
                raise CandidateError("rejected", "size_mismatch", said)
            elif kind == "stale":
                raise CandidateError("deferred", "stale_commit", said)
            elif kind == "no_ranges":
                raise CandidateError("deferred", "no_ranges", f"{said}; set download.read=verified")
            elif kind == "disk":
                raise CandidateError("deferred", "disk", said)
            elif kind == "offline":
                raise CandidateError("skipped", "offline", said)
            elif kind == "status":
                self._judge(outcome, attempt, pinned)
                said = f"{file.name}: HTTP {outcome['status']}"
        code = "stall" if said.endswith(_STALLED) else "unreachable"
        raise CandidateError("deferred", code, f"{said}, {self._max_attempts} attempts")

    def _attempt(self, file: RemoteFile, job: Outcome) -> Outcome:
        """Try once, and ask for more when what is missing turns out to be more than was granted."""
        needed: int | None = None
        while True:
            granted = self._ask_to_move(file, needed)
            begun = time.monotonic()
            try:
                outcome = self._run(job | {"granted": granted})
            except CandidateError:  # nothing was asked for
                self._settle(-granted)
                raise
            num_moved = outcome.get("num_moved")  # unknown when the child had to be killed: then all of it
            self._settle(0 if num_moved is None else num_moved - granted)
            with self._lock:
                self.seconds += time.monotonic() - begun
                self.num_bytes += num_moved or 0
            self._limit.count("resolvers", outcome.get("num_requests", 1) - 1)
            if outcome["outcome"] != "more" or outcome["num_bytes"] <= granted:
                return outcome
            needed = outcome["num_bytes"]

    def _judge(self, outcome: Outcome, attempt: int, pinned: Pinned) -> None:
        """Return when it is worth another attempt."""
        status, headers = outcome["status"], outcome["headers"]
        self._limit.learn(headers)
        if status == 429:
            self._limit.pause("resolvers", headers, fallback_s=self._backoff_s * 2 ** (attempt + 1))
        elif status not in RETRIED:
            error = StatusError(status, printable(headers.get("x-error-code", ""), 40))
            refuse(error, self._origin.url, pinned.repo)

    def _wait(self, attempt: int) -> None:
        pause_s = min(MAX_BACKOFF_S, self._backoff_s * 2 ** (attempt - 1))
        if self._stopping.wait(pause_s * random.uniform(0.5, 1.0)):
            raise CandidateError("deferred", "interrupted", "the sweep ended first")

    def _run(self, job: Outcome) -> Outcome:
        try:
            self._limit.take("resolvers")
        except RateLimited as error:
            raise CandidateError("deferred", "ratelimit", str(error)) from error
        with self._child() as child:
            return child.run(job, self._stall_s)

    @contextmanager
    def _child(self) -> Iterator["_Child"]:
        with self._lock:
            child = self._idle.pop() if self._idle else None
        if child is None:
            child = _Child(self._origin)
            with self._lock:
                self._children.add(child)
        try:
            yield child
        finally:
            with self._lock:
                if child.is_alive() and not self._stopping.is_set():
                    self._idle.append(child)
                else:
                    self._children.discard(child)
                    child.end()


_STALLED = "no byte came"


class _Child:
    """One process of `hub.download`. The token goes through its pipe: never into arguments or environment."""

    def __init__(self, origin: Origin) -> None:
        environ = dict(os.environ)
        drop_secrets(environ)
        environ.update(origin.secrets)
        environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ray_auditor.hub.download"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a library says there may quote a request
            env=environ,
            bufsize=0,
            start_new_session=True,  # an interrupt from the keyboard is the parent's to handle
        )
        self._tail = b""
        self._send({"token": origin.token})

    def is_alive(self) -> bool:
        """Whether it can be given a job."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()

    def run(self, job: Outcome, stall_s: float) -> Outcome:
        """Give it a job and listen; silence for `stall_s` kills it."""
        try:
            self._send(job)
        except BrokenPipeError:
            return {"outcome": "network", "text": "the process that downloads ended"}
        while (line := self._read_line(time.monotonic() + stall_s)) is not None:
            message: Outcome = json.loads(line)
            if "outcome" in message:
                return message
        stalled = self.is_alive()
        self.end()
        text = f"for {stall_s:g} s {_STALLED}" if stalled else "the process that downloads died"
        return {"outcome": "network", "text": text}

    def _send(self, message: Outcome) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def _read_line(self, deadline: float) -> bytes | None:
        """A line, or None when none came before `deadline` or ever will."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._tail:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            data = os.read(descriptor, 65536)
            if not data:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=5)
                return None
            self._tail += data
        line, _, self._tail = self._tail.partition(b"\n")
        return line
