"""What a running sweep says: a live table on a terminal, one JSON line an interval anywhere else."""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ray_auditor.report.candidate import STATUSES
from ray_auditor.report.number import duration
from ray_auditor.report.printable import printable

RATE_WINDOW_S = 60.0
NAME_CHARS = 60


class SweepProgress:
    """Live state of a sweep, to be used in a `with` block.

    On a terminal a small table is redrawn in place; elsewhere, a dumb terminal included, a JSON object is
    written every `interval_s` and once at the end. `NO_COLOR` is respected by the console.

    Args:
        total: Units of this sweep (a candidate each, and the base's own), finished ones included.
        console: Where to show; standard output by default.
        interval_s: Least time between two JSON lines, seconds.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        console: Console | None = None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.console = console or Console()
        self.interval_s = interval_s
        self.clock = clock
        self.counts: dict[str, int] = {}
        self.tokens = 0
        self.in_flight: list[str | None] = []
        self.started = self.written = clock()
        self.done_before: int | None = None
        self.recent: deque[tuple[float, int]] = deque()
        self.live: Live | None = None

    def __enter__(self) -> Self:
        self.started = self.written = self.clock()
        self.recent.append((self.started, 0))
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.in_flight = []
        if self.live is not None:
            self.live.stop()
        else:
            self._write_line()

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
        self.counts = dict(state_counts)
        self.tokens = tokens_done
        self.in_flight = list(in_flight)
        if self.done_before is None:
            self.done_before = self.done
        now = self.clock()
        self.recent.append((now, tokens_done))
        while len(self.recent) > 2 and now - self.recent[1][0] >= RATE_WINDOW_S:
            self.recent.popleft()
        if self.live is None and now - self.written >= self.interval_s:
            self._write_line()

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

    def snapshot(self) -> dict[str, Any]:
        """The state as the JSON line carries it."""
        left = self.time_left_s
        return {
            "event": "progress",
            "elapsed_s": round(self.clock() - self.started, 1),
            "done": self.done,
            "total": self.total,
            "states": self.counts,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "time_left_s": None if left is None else round(left, 1),
            "in_flight": self.in_flight,
        }

    def _write_line(self) -> None:
        self.written = self.clock()
        self.console.file.write(json.dumps(self.snapshot()) + "\n")
        self.console.file.flush()

    def _draw(self) -> RenderableType:
        elapsed, left = self.clock() - self.started, self.time_left_s
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"{self.done:,}/{self.total:,} units"),
            ProgressBar(total=max(self.total, 1), completed=self.done, width=30),
            Text(f"{self.tokens_per_s:,.0f} tokens/s"),
            Text(f"{duration(elapsed)} elapsed"),
            Text("time left not known yet" if left is None else f"about {duration(left)} left"),
        )
        states = "  ".join(f"{printable(state)} {count:,}" for state, count in self.counts.items() if count)
        lines: list[RenderableType] = [head, Text(states or "starting", style="bold")]
        for worker, candidate in enumerate(self.in_flight):
            lines.append(
                Text(f"  worker {worker}: {printable(candidate, NAME_CHARS) if candidate else 'idle'}")
            )
        return Group(*lines)
