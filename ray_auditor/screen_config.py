"""Settings of the screen, typed and bounded."""

import math
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ScreenConfig:
    """Run everyone on some of the prompts first, and on all of them only who does not score low there.

    Off unless `share` is given. docs/method.md says what it misses.
    """

    share: float | None = None  # of every suite's prompts
    clear_below: float = 2.0  # a score on them that is lower ends a candidate's audit

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(
                f"screen.share must be > 0 and < 1, got {self.share}; leave it out to run every prompt"
            )
        if not 0 < self.clear_below < math.inf:
            raise ValueError(f"screen.clear_below must be > 0 and finite, got {self.clear_below}; 2 is usual")
