"""What a running sweep says: a live table on a terminal, one JSON line an interval anywhere else."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import stdev
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from scipy.stats import t as student

from ray_auditor.report.candidate import STATUSES
from ray_auditor.report.number import duration
from ray_auditor.report.printable import printable

RATE_WINDOW_S = 60.0
CONFIDENCE = 0.95  # of the interval of the time left
MIN_PACES, MAX_PACES = 5, 200  # finished units that an interval needs, and looks back on
NAME_CHARS = 60


class SweepProgress:
    """Live state of a sweep, to be used in a `with` block.

    On a terminal a small table is redrawn in place; elsewhere, a dumb terminal included, a JSON object is
    written every `interval_s` and once at the end. `NO_COLOR` is respected by the console. As often, wherever
    it is shown, `tell` is given the same object.

    Args:
        total: Units of this sweep (a candidate each, and the base's own), finished ones included.
        console: Where to show; standard output by default.
        interval_s: Least time between two JSON lines, seconds.
        clock: Monotonic time in seconds.
        tell: Called with every snapshot, such as `Metrics.progress`.
    """

    def __init__(
        self,
        total: int,
        *,
        console: Console | None = None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.total = total
        self.tell = tell
        self.console = console or Console()
        self.interval_s = interval_s
        self.clock = clock
        self.counts: dict[str, int] = {}
        self.tokens = 0
        self.in_flight: list[str | None] = []
        self.started = self.written = clock()
        self.done_before: int | None = None
        self.recent: deque[tuple[float, int]] = deque()
        self.paces: deque[float] = deque(maxlen=MAX_PACES)  # seconds from one finished unit to the next
        self.finished_at = self.started
        self.live: Live | None = None

    def __enter__(self) -> Self:
        self.started = self.written = self.finished_at = self.clock()
        self.recent.append((self.started, 0))
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.in_flight = []
        self.counts = {state: 0 if state == "running" else num for state, num in self.counts.items()}
        self._say(event="ended")
        if self.live is not None:
            self.live.stop()

    def update(
        self, state_counts: Mapping[str, int], tokens_done: int, in_flight: Sequence[str | None] = ()
    ) -> None:
        """Tell the state of the sweep; cheap enough to be called on every event.

        The first call sets what was finished before this run, so that reuse does not flatter the time left.

        Args:
            state_counts: Units by state: final statuses, and any others such as `queued` or `running`.
            tokens_done: Tokens encoded so far in this run.
            in_flight: What each worker has in hand, None for an idle one.
        """
        before, now = self.done, self.clock()
        self.counts = dict(state_counts)
        self.tokens = tokens_done
        self.in_flight = list(in_flight)
        if self.done_before is None:
            self.done_before = self.done
        elif self.done > before:
            num = self.done - before
            self.paces.extend([(now - self.finished_at) / num] * num)
            self.finished_at = now
        self.recent.append((now, tokens_done))
        while len(self.recent) > 2 and now - self.recent[1][0] >= RATE_WINDOW_S:
            self.recent.popleft()
        if now - self.written >= self.interval_s:
            self._say()

    @property
    def done(self) -> int:
        """Units in a final status."""
        return sum(self.counts.get(status, 0) for status in STATUSES)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second over the last minute."""
        (start, before), (end, after) = self.recent[0], self.recent[-1]
        return (after - before) / (end - start) if end > start else 0.0

    @property
    def time_left_s(self) -> float | None:
        """Seconds left at this run's pace; None until a unit has finished in it."""
        finished = self.done - (self.done_before or 0)
        if finished <= 0:
            return None
        return (self.clock() - self.started) / finished * (self.total - self.done)

    @property
    def time_left_ends_s(self) -> tuple[float, float] | None:
        """Ends of the time left, each unit's pace drawn like those before; None until enough have finished.

        From r units at n paces of mean m and deviation s, which are taken to be independent: the rest takes
        r m, with a variance of r s^2 for its own units and r^2 s^2 / n for what m is off.
        """
        middle, num, left = self.time_left_s, len(self.paces), self.total - self.done
        if middle is None or num < MIN_PACES:
            return None
        half = float(student.ppf((1 + CONFIDENCE) / 2, num - 1)) * stdev(self.paces)
        half *= math.sqrt(left + left**2 / num)
        return max(0.0, middle - half), middle + half

    def snapshot(self, event: str = "progress") -> dict[str, Any]:
        """The state as the JSON line carries it."""
        left, ends = self.time_left_s, self.time_left_ends_s
        return {
            "event": event,
            "elapsed_s": round(self.clock() - self.started, 1),
            "done": self.done,
            "total": self.total,
            "states": self.counts,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "time_left_s": None if left is None else round(left, 1),
            "time_left_ends_s": None if ends is None else [round(end, 1) for end in ends],
            "in_flight": self.in_flight,
        }

    def _say(self, event: str = "progress") -> None:
        self.written = self.clock()
        snapshot = self.snapshot(event)
        if self.live is None:
            self.console.file.write(json.dumps(snapshot) + "\n")
            self.console.file.flush()
        if self.tell is not None:
            self.tell(snapshot)

    def _draw(self) -> RenderableType:
        elapsed, left, ends = self.clock() - self.started, self.time_left_s, self.time_left_ends_s
        between = "" if ends is None else f" ({duration(ends[0])} to {duration(ends[1])})"
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{self.done:,}/{self.total:,} units"),
            ProgressBar(total=max(self.total, 1), completed=self.done, width=30),
            Text(f"{self.tokens_per_s:,.0f} tokens/s"),
            Text(f"{duration(elapsed)} elapsed"),
            Text("time left not known yet" if left is None else f"about {duration(left)} left{between}"),
        )
        states = "  ".join(f"{printable(state)} {count:,}" for state, count in self.counts.items() if count)
        lines: list[RenderableType] = [head, Text(states or "starting", style="bold")]
        for worker, candidate in enumerate(self.in_flight):
            lines.append(
                Text(f"  worker {worker}: {printable(candidate, NAME_CHARS) if candidate else 'idle'}")
            )
        return Group(*lines)
