"""What a sweep used of its budget, kept beside it until it ends: one that was killed goes on with the rest.

A run is what sweeps of one folder do until one of them draws its conclusion. Nothing tells a run that was
killed and is started again from the next night's but the time between: after RUN_GAP_S without a sign of life
another run begins, with all of its budget.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_auditor.durable_file import put_file

FILE_NAME = ".usage"
RUN_GAP_S = 12 * 3600.0  # half of the time from one night to the next
BEAT_S = 10.0  # the most a kill can lose


@dataclass(frozen=True)
class Usage:
    """Seconds of devices, and bytes that were asked for."""

    device_s: float = 0.0
    num_bytes: int = 0

    def describe(self) -> str:
        """In words."""
        return f"{self.device_s / 3600:.3g} GPU hours and {self.num_bytes:,} bytes"


NOTHING = Usage()


def read_usage(folder: Path, now: Callable[[], float] = time.time) -> Usage:
    """What the run that goes on in a folder has used so far; nothing when another one begins.

    Args:
        folder: The output folder.
        now: Seconds of the epoch.

    Raises:
        ValueError: What was kept cannot be read.
    """
    path = folder / FILE_NAME
    try:
        kept = json.loads(path.read_bytes())
        at, usage = float(kept.pop("at")), Usage(float(kept.pop("device_s")), int(kept.pop("num_bytes")))
        if not all(0 <= value < math.inf for value in (at, usage.device_s, usage.num_bytes)):
            raise ValueError(f"{at}, {usage.device_s} and {usage.num_bytes} must be finite and not negative")
    except FileNotFoundError:
        return NOTHING
    except (OSError, ValueError, OverflowError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"out_dir must hold what an earlier sweep used of its budget, got {path}: {error!r}; delete it: "
            "this sweep then has all of its budget"
        ) from error
    return usage if now() - at < RUN_GAP_S else NOTHING


@contextmanager
def kept_usage(folder: Path, usage: Callable[[], Usage], *, beat_s: float = BEAT_S) -> Iterator[None]:
    """Keep what a sweep used for as long as it has not ended; a block that raises has not.

    Args:
        folder: The output folder, which nobody else sweeps.
        usage: Says it; asked from another thread.
        beat_s: Seconds between two looks.
    """
    path, ended = folder / FILE_NAME, threading.Event()

    def keep() -> None:
        data = json.dumps({"at": time.time(), **asdict(usage())}).encode()
        with suppress(OSError, ValueError):  # a sweep does not end because its end would not be remembered
            put_file(path, data, replace=True)

    def beat() -> None:
        while not ended.wait(beat_s):
            keep()

    thread = threading.Thread(target=beat, name="usage", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        keep()
        raise
    ended.set()
    thread.join()
    with suppress(OSError):  # nor fail, once its conclusion is drawn
        path.unlink(missing_ok=True)
