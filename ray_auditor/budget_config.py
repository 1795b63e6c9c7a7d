"""Settings of what a sweep may cost, typed and bounded."""

import math
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """Hard stops: what does not fit is deferred to the next sweep.

    A GPU hour is an hour in which a worker holds a GPU; without GPUs a worker counts as one.
    """

    max_gpu_hours: float | None = None
    max_download_bytes: int | None = None
    max_price: float | None = None
    prices: dict[str, float] = field(
        default_factory=dict
    )  # of a GPU hour, by device; in max_price's currency
    benchmark: str | None = None  # what units cost before any was measured: a result of bench_sweep.py

    def __post_init__(self) -> None:
        for name in ("max_gpu_hours", "max_download_bytes", "max_price"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(
                    f"budget.{name} must be >= 0 and finite, got {value}; leave it out for no limit"
                )
        for device, price in self.prices.items():
            if not 0 <= price < math.inf:
                raise ValueError(
                    f"budget.prices must be >= 0 and finite, got {price} for {device!r}; correct it"
                )
