"""One allowance of requests for a whole sweep, kept in the server's own words."""

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MAX_WAIT_S = 600.0  # two of the hub's windows; who asks for more is asked again by the next sweep
_POLICY = re.compile(r'"(?P<resource>\w+)"\s*;\s*q\s*=\s*(?P<q>\d{1,9})\s*;\s*w\s*=\s*(?P<w>\d{1,9})')
_LIMIT = re.compile(r'"(?P<resource>\w+)"\s*;\s*r\s*=\s*(?P<r>\d{1,9})\s*;\s*t\s*=\s*(?P<t>\d{1,9})')


class RateLimited(Exception):
    """The server asks for a longer pause than this sweep waits, or never ends asking for one."""


@dataclass(frozen=True)
class Policy:
    """What a server says it allows of one resource."""

    quota: int  # requests a window
    window_s: int

    def seconds_for(self, num_requests: int) -> int:
        """Time that so many requests take at least, from the beginning of a window."""
        return (max(num_requests, 1) - 1) // max(self.quota, 1) * self.window_s


@dataclass
class _Window:
    remaining: int | None = None  # None: the server has not said
    ends: float = 0.0  # clock seconds


class RateLimit:
    """What each resource (`api`, `resolvers`) still allows; shared by every thread of a sweep.

    Nothing is limited until the server says so, in `RateLimit: "api";r=3;t=55` or with a 429.
    """

    def __init__(
        self,
        *,
        max_wait_s: float = MAX_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.max_wait_s = max_wait_s
        self.num_pauses = 0
        self.num_taken: Counter[str] = Counter()  # requests, by resource
        self.policies: dict[str, Policy] = {}  # by resource, where the server stated one
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}

    def take(self, resource: str) -> None:
        """Wait until `resource` allows one more request.

        Raises:
            RateLimited: That is further away than `max_wait_s`.
        """
        while True:
            with self._lock:
                window = self._windows.setdefault(resource, _Window())
                wait_s = window.ends - self._clock()
                if wait_s <= 0:
                    window.remaining = None
                if window.remaining is None or window.remaining > 0:
                    window.remaining = window.remaining and window.remaining - 1
                    self.num_taken[resource] += 1
                    return
            if wait_s > self.max_wait_s:
                raise RateLimited(f"the server allows no request for {resource} in the next {wait_s:.0f} s")
            # The jitter keeps those who wait from all coming back in the same instant.
            self._sleep(wait_s + random.uniform(0, min(1.0, 0.1 + wait_s / 10)))

    def count(self, resource: str, num_requests: int) -> None:
        """Requests that were made besides the one that was taken."""
        with self._lock:
            window = self._windows.setdefault(resource, _Window())
            if window.remaining is not None:
                window.remaining = max(0, window.remaining - num_requests)
            self.num_taken[resource] += num_requests

    def learn(self, headers: Mapping[str, str]) -> None:
        """Take note of `RateLimit` and `RateLimit-Policy` headers, for the resource that they name."""
        for said in _POLICY.finditer(headers.get("ratelimit-policy", "")):
            self.policies[said["resource"]] = Policy(int(said["q"]), int(said["w"]))
        if found := _LIMIT.search(headers.get("ratelimit", "")):
            ends = self._clock() + int(found["t"])
            with self._lock:
                window = self._windows.setdefault(found["resource"], _Window())
                if window.remaining == 0 and window.ends > ends:
                    return  # a pause that is running is not cut short by an answer that was under way
                window.remaining, window.ends = int(found["r"]), ends

    def pause(self, resource: str, headers: Mapping[str, str], *, fallback_s: float) -> None:
        """Stop `resource` after a 429: for as long as the headers say, or `fallback_s`."""
        limit = _LIMIT.search(headers.get("ratelimit", ""))
        if limit and int(limit["r"]) == 0:
            wait_s = float(limit["t"])
        else:
            wait_s = _retry_after_s(headers) or fallback_s
        with self._lock:
            window = self._windows.setdefault(resource, _Window())
            window.remaining, window.ends = 0, max(window.ends, self._clock() + wait_s)
            self.num_pauses += 1


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a `Retry-After`, in either of its forms; a date is held against the server's own clock."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except (ValueError, IndexError):
        return None
    try:
        now = parsedate_to_datetime(headers.get("date", ""))
    except (ValueError, IndexError):
        now = datetime.now(UTC)
    if until.tzinfo is None or now.tzinfo is None:
        return None
    return max(0.0, (until - now).total_seconds())
