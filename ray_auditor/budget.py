"""Hard stops: what a sweep may use of devices and of the wire, decided in the plan and held while it runs.

What does not fit is `deferred`, and the next sweep goes on with it. The plan takes units in their order, each
as far as it still fits; what is too large for tonight's rest does not keep smaller ones behind it waiting.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from ray_auditor.budget_config import BudgetConfig
from ray_auditor.config import ClusterConfig
from ray_auditor.hub import CandidateError
from ray_auditor.usage import NOTHING, Usage


@dataclass(frozen=True)
class Limits:
    """What may be used; infinite where no setting says otherwise."""

    device_s: float = math.inf  # seconds of GPUs
    device_setting: str = "max_gpu_hours"  # the one that bounds them
    num_bytes: float = math.inf  # to move
    given: Mapping[str, float] = field(default_factory=dict)  # the settings as they were given

    def refusal(self, setting: str, why: str) -> CandidateError:
        """The status of what does not fit."""
        return CandidateError("deferred", setting, f"{why} budget.{setting}={self.given.get(setting):g}")


@dataclass(frozen=True)
class Job:
    """A unit to compute, and the files to move for it: done whole or not at all.

    `key` is that of the unit, or of the files while their unit is not known; `files` has bytes by hash.
    """

    key: str
    num_bytes: int  # of weights
    files: Mapping[str, int] = field(default_factory=dict)


def limits_of(budget: BudgetConfig, device: str) -> Limits:
    """What the settings allow.

    Args:
        budget: The settings.
        device: Name of what the workers compute on.

    Raises:
        ValueError: `max_price` is given, and no price of the device.
    """
    bounds = {"max_gpu_hours": math.inf if budget.max_gpu_hours is None else budget.max_gpu_hours * 3600}
    if budget.max_price is not None:
        price = budget.prices.get(device)
        if price is None:
            raise ValueError(
                f"budget.prices must have a price of {device!r} when budget.max_price is given, got "
                f"{dict(budget.prices)}; add '+budget.prices={{{device}: PRICE}}' to the command"
            )
        bounds["max_price"] = budget.max_price / price * 3600 if price else math.inf
    setting = min(bounds, key=bounds.__getitem__)
    settings = ("max_gpu_hours", "max_download_bytes", "max_price")
    return Limits(
        bounds[setting],
        setting,
        math.inf if budget.max_download_bytes is None else budget.max_download_bytes,
        {name: value for name in settings if (value := getattr(budget, name)) is not None},
    )


def num_devices(cluster: ClusterConfig) -> float:
    """GPUs that a sweep holds; a worker without one counts as one."""
    return cluster.num_workers * (cluster.gpus_per_worker or 1.0)


def defer_beyond(
    jobs: Sequence[Job],
    limits: Limits,
    *,
    used: Usage = NOTHING,
    seconds_of: Callable[[Job], float] | None = None,
) -> dict[str, CandidateError]:
    """Choose what fits, in order.

    Args:
        jobs: What there is to do.
        limits: What it may use.
        used: What goes before any of it.
        seconds_of: Expected seconds of devices of one; None: not known, so nothing is deferred for them.

    Returns:
        By key, why a job is deferred.
    """
    moved: set[str] = set()
    spent_s, num_bytes = used.device_s, used.num_bytes
    deferred: dict[str, CandidateError] = {}
    for job in jobs:
        bytes_more = sum(size for oid, size in job.files.items() if oid not in moved)
        seconds_more = seconds_of(job) if seconds_of else 0.0
        if num_bytes + bytes_more > limits.num_bytes:
            alone = sum(job.files.values()) > limits.num_bytes
            why = "alone it moves more bytes than" if alone else "other candidates use up"
            deferred[job.key] = limits.refusal("max_download_bytes", why)
        elif seconds_of and spent_s + seconds_more > limits.device_s:
            alone = seconds_more > limits.device_s
            why = "alone it is expected to exceed" if alone else "other candidates use up"
            deferred[job.key] = limits.refusal(limits.device_setting, why)
        else:
            moved |= job.files.keys()
            num_bytes += bytes_more
            spent_s += seconds_more
    return deferred


class Meter:
    """What a running sweep has used, whatever the plan expected. Any thread may ask.

    Args:
        limits: What it may use.
        devices: GPUs that it holds as long as it runs.
        used: What went before.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        limits: Limits,
        devices: float,
        *,
        used: Usage = NOTHING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._devices, self._clock = limits, devices, clock
        self._begun: float | None = None
        self._used_s = used.device_s / devices  # by the clock, in the stages before
        self._recent: deque[float] = deque(maxlen=32)
        self._num_bytes = used.num_bytes
        self._lock = threading.Lock()

    def start(self) -> None:
        """From here on devices are held."""
        self.end()
        self._begun = self._clock()

    def end(self) -> None:
        """They are given back; what they were held for stays used when another stage starts."""
        held_s = self._held_s
        self._begun = None
        self._used_s = held_s

    @property
    def usage(self) -> Usage:
        """What was used so far."""
        return Usage(self._held_s * self._devices, self._num_bytes)

    @property
    def time_left_s(self) -> float:
        """Seconds by the clock until the devices must be given back."""
        return self._limits.device_s / self._devices - self._held_s

    @property
    def _held_s(self) -> float:
        begun = self._begun
        return self._used_s + (0.0 if begun is None else self._clock() - begun)

    def landed(self, seconds: float) -> None:
        """A unit took so long by the clock."""
        self._recent.append(seconds)

    def refuse_unit(self) -> CandidateError | None:
        """Why no further unit may begin: it would not end in time, going by those before it."""
        usual_s = median(self._recent) if self._recent else 0.0
        if self.time_left_s > usual_s:
            return None
        return self._limits.refusal(self._limits.device_setting, "the time is used up that is left by")

    def move(self, num_bytes: int) -> None:
        """Ask before bytes are asked for.

        Raises:
            CandidateError: They would be more than `budget.max_download_bytes`.
        """
        with self._lock:
            if self._num_bytes + num_bytes > self._limits.num_bytes:
                raise self._limits.refusal("max_download_bytes", "downloads use up")
            self._num_bytes += num_bytes

    def settle(self, num_bytes: int) -> None:
        """So many bytes more were moved, or fewer when negative, than were asked for."""
        with self._lock:
            self._num_bytes += num_bytes
