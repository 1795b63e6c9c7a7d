"""Where a sweep's time went: by worker, in all, and for what."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ran:
    """What a worker says when a unit is committed.

    Attributes:
        worker: Its host and process.
        num_tokens: Tokens run.
        num_bytes: Bytes of weights that the unit is made of, as they lie in their files.
        seconds: By part, on the worker's clock: `start` of the engine, `wait` for the unit, `stage` (waiting
            for its bytes), `swap`, `prove`, `adapter`, `forward`, `encode`, `rows`, `weights`, `write`.
    """

    worker: str
    num_tokens: int
    num_bytes: int
    seconds: Mapping[str, float]


@dataclass
class Spent:
    """Sums over units."""

    num_units: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, ran: Ran) -> None:
        """Count one unit."""
        self.num_units += 1
        self.num_tokens += ran.num_tokens
        self.num_bytes += ran.num_bytes
        for part, seconds in ran.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def describe(self, wall_s: float) -> dict[str, Any]:
        """The sums, and rates over `wall_s`."""
        return {
            "num_units": self.num_units,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "seconds": {part: round(seconds, 4) for part, seconds in sorted(self.seconds.items())},
            "tokens_per_s": round(self.num_tokens / wall_s, 1) if wall_s else None,
            "bytes_per_s": round(self.num_bytes / wall_s) if wall_s else None,
        }


@dataclass
class Work:
    """The units that this sweep ran itself; what earlier ones committed is not in it.

    Attributes:
        fetch_s: Seconds of downloads, summed over those that ran side by side.
        fetched_bytes: What they brought.
        waited_s: Seconds for which nothing ran because nothing had arrived.
    """

    fetch_s: float = 0.0
    fetched_bytes: int = 0
    waited_s: float = 0.0
    _begun: float = field(default_factory=time.monotonic)
    _total: Spent = field(default_factory=Spent)
    _by_worker: dict[str, Spent] = field(default_factory=dict)

    def add(self, ran: Ran) -> None:
        """Count one unit."""
        self._total.add(ran)
        self._by_worker.setdefault(ran.worker, Spent()).add(ran)

    def describe(self) -> dict[str, Any] | None:
        """What the summary says; None when nothing ran."""
        if not self._total.num_units:
            return None
        wall_s = time.monotonic() - self._begun
        return {
            "wall_s": round(wall_s, 3),
            "waited_s": round(self.waited_s, 3),
            "fetch": {"seconds": round(self.fetch_s, 3), "num_bytes": self.fetched_bytes},
            "total": self._total.describe(wall_s),
            "workers": {name: one.describe(wall_s) for name, one in sorted(self._by_worker.items())},
        }
