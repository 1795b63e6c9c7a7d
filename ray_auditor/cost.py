"""What a unit costs, measured: seconds of a device, fitted to units that were computed before.

    seconds of a unit   = unit_s + token_s * tokens + byte_s * bytes of its weights
    seconds of a worker = start_s, once, and its units

Only units of the same base, SAE, hook, k and engine class count, for nothing else costs the same. Where there
are none a result of `benchmarks/bench_sweep.py` can stand in; where there is neither, nothing is claimed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ray_auditor.store import ShardError, Store, Unit

MAX_LOOKED_AT, MAX_UNITS = 2000, 500  # commits read, and units fitted: keys are hashes, so any will do
MIN_SPREAD = 5  # units below which two percentiles say nothing
# Parts of a record's `seconds` that grow with tokens; the others that hold the device grow with bytes.
BY_TOKENS = ("forward", "encode")
BESIDE = ("rows", "write")  # the next unit has the device meanwhile


@dataclass(frozen=True)
class Sample:
    """One unit that was computed: what it was, and the seconds a device was busy with it."""

    num_tokens: int
    num_bytes: int  # of its weights
    by_tokens_s: float
    other_s: float
    shard_bytes: int | None = None


@dataclass(frozen=True)
class CostModel:
    """Fitted seconds, and how far single units lay from them.

    Attributes:
        start_s: Of a worker.
        unit_s: Of a unit, whatever it is.
        token_s: Of a token.
        byte_s: Of a byte of weights.
        low: Actual over fitted seconds: a tenth of the units lie below; None for few units.
        high: The same: a tenth lie above.
        shard_bytes: That a unit's rows take a token on disk, on average; None when nobody measured it.
        num_units: Units that were fitted.
        source: Where they come from, in words.
    """

    start_s: float
    unit_s: float
    token_s: float
    byte_s: float
    low: float | None
    high: float | None
    shard_bytes: float | None
    num_units: int
    source: str

    def unit_seconds(self, num_tokens: int, num_bytes: int) -> float:
        """Expected seconds of a device for one unit."""
        return self.unit_s + self.token_s * num_tokens + self.byte_s * num_bytes


def fit(samples: Sequence[Sample], starts_s: Sequence[float], source: str) -> CostModel:
    """Fit a model: tokens by the ratio of sums, the rest by least squares with no negative part.

    Args:
        samples: At least one.
        starts_s: Seconds that workers took to start.
        source: Where they come from, in words.
    """
    num_tokens = sum(one.num_tokens for one in samples)
    on_disk = [one.shard_bytes for one in samples if one.shard_bytes is not None]
    token_s = sum(one.by_tokens_s for one in samples) / max(num_tokens, 1)
    num_bytes = np.array([one.num_bytes for one in samples], float)
    scale = max(num_bytes.max(), 1.0)  # bytes and ones of one magnitude
    (unit_s, scaled), _ = nnls(
        np.stack([np.ones(len(samples)), num_bytes / scale], axis=1),
        np.array([one.other_s for one in samples]),
    )
    model = CostModel(
        start_s=median(starts_s) if starts_s else 0.0,
        unit_s=float(unit_s),
        token_s=token_s,
        byte_s=float(scaled / scale),
        low=None,
        high=None,
        shard_bytes=sum(on_disk) / num_tokens if on_disk else None,
        num_units=len(samples),
        source=source,
    )
    ratios = [
        (one.by_tokens_s + one.other_s) / max(model.unit_seconds(one.num_tokens, one.num_bytes), 1e-9)
        for one in samples
    ]
    if len(ratios) < MIN_SPREAD:
        return model
    low, high = np.percentile(ratios, (10, 90))
    return CostModel(**asdict(model) | {"low": float(low), "high": float(high)})


def measured_cost(store: Store, base_unit: Unit) -> CostModel | None:
    """Fit the units of a store; None when it has none of this kind.

    Args:
        store: Where they are.
        base_unit: The base's; its suites may differ from theirs.
    """
    wanted = _kind(asdict(base_unit))
    found = []
    for key in islice(sorted(store.list_stamps()), MAX_LOOKED_AT):
        try:
            commit = store.read_commit(key)
        except (KeyError, ShardError):
            continue  # absent, or another release's
        if _kind(commit.unit) == wanted and "num_bytes" in commit.record:
            found.append((commit.num_bytes, commit.record))
        if len(found) == MAX_UNITS:
            break
    if not found:
        return None
    starts_s = [one["start_s"] for _, one in found if one["start_s"] is not None]
    samples = [
        _sample(
            one["num_tokens_run"], one["num_bytes"], one["seconds"] | {"wait": one["wait_s"]}, shard_bytes
        )
        for shard_bytes, one in found
    ]
    return fit(samples, starts_s, f"{len(found)} units of these settings in {store.root}")


def benchmark_cost(path: str) -> CostModel:
    """Fit a result of `benchmarks/bench_sweep.py`.

    Raises:
        ValueError: It is none.
    """
    try:
        result: dict[str, Any] = json.loads(Path(path).expanduser().read_bytes())
        sizes = {"full": int(result["bytes_per_candidate"]), "adapter": 0}
        samples = [
            _sample(
                int(result["num_tokens"]),
                sizes[kind],
                {name: float(s) for name, s in run.items() if name != "total"},
            )
            for kind in sizes
            for run in result["runs"][kind]
        ]
        what = f"{result['shape']}, {result['dtype']}, of {result['date'][:10]}"
        return fit(samples, [float(result["start_s"])], f"the benchmark {Path(path).name} ({what})")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"budget.benchmark must be a result of benchmarks/bench_sweep.py, got {path!r}: {error!r}"
        ) from error


def _kind(unit: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two units to cost the same by token and byte."""
    return {name: value for name, value in unit.items() if name not in ("candidate_key", "suites_key")}


def _sample(
    num_tokens: int, num_bytes: int, seconds: dict[str, float], shard_bytes: int | None = None
) -> Sample:
    by_tokens_s = sum(seconds.get(name, 0.0) for name in BY_TOKENS)
    other_s = sum(s for name, s in seconds.items() if name not in BY_TOKENS + BESIDE)
    return Sample(num_tokens, num_bytes, by_tokens_s, other_s, shard_bytes)
