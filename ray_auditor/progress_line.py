"""How far a long loop is, a line every few seconds; a short one says nothing."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console

INTERVAL_S = 10.0

T = TypeVar("T")


def say_how_far(
    items: Iterable[T],
    what: str,
    *,
    console: Console | None = None,
    interval_s: float = INTERVAL_S,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Pass items on, and say how many there were.

    Args:
        items: What is worked through.
        what: Comes after the number.
        console: Where to say it; standard error by default.
        interval_s: Seconds from one line to the next.
        clock: Monotonic seconds.
    """
    begun = said = clock()
    for number, item in enumerate(items):
        if (now := clock()) - said >= interval_s:
            said = now
            (console or Console(stderr=True)).print(
                f"{number:,} {what}, {now - begun:.0f} s", markup=False, highlight=False, soft_wrap=True
            )
        yield item
