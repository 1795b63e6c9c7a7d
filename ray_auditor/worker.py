"""The Ray actor: one candidate in, one committed shard out."""

# Shape suffixes: M tokens of all prompts, K = kept features.

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import set_num_threads

from ray_auditor.config import EngineConfig
from ray_auditor.hub import Admitted, BaseModel, CandidateError
from ray_auditor.hub.secret import go_offline
from ray_auditor.layout import Layout
from ray_auditor.sae import Sae
from ray_auditor.store import Store, TokenRows, Unit
from ray_auditor.suites import Suites
from ray_auditor.weight_change import BaseWeights, WeightChange, change_between
from ray_auditor.work import Ran

if TYPE_CHECKING:
    from ray_auditor.engine.live import Features
    from ray_auditor.engine.residuals import Comparison, Moves

# Of what a row is (kernel, adapters, mask, casts, FVU, cosine): raise it when a change can alter a number.
ROWS_VERSION = 5
IN_FLIGHT = 2  # calls of `Worker.audit`: one on the device, the other being read, or committed


@dataclass(frozen=True)
class WorkerSpec:
    """All a worker needs; equal for every worker of a sweep."""

    base: BaseModel
    base_unit: Unit
    sae: Sae
    suites: Suites
    k: int
    engine: EngineConfig
    store_path: Path
    num_threads: int


@dataclass(frozen=True)
class Assignment:
    """One unit to compute. `candidate` None is the base; `reverse` runs the prompts in another batching."""

    unit: Unit
    candidate: Admitted | None
    reverse: bool = False

    @property
    def name(self) -> str:
        """What progress calls it."""
        if self.candidate is not None:
            return self.candidate.candidate.id
        return "base (noise floor)" if self.reverse else "base"

    @property
    def num_bytes(self) -> int:
        """What the queue is ordered by."""
        return self.candidate.candidate.num_bytes if self.candidate else 0

    @property
    def num_weight_bytes(self) -> int:
        """Bytes, in their files, that the candidate's weights up to the hook are made of; 0 for the base."""
        sources = self.candidate.tensors.values() if self.candidate else ()
        return sum(source.num_bytes for source in sources)


class _Computed(NamedTuple):
    features: "Features"
    moves: "Moves"
    record: dict[str, Any]  # the note kept beside the rows
    residuals: NDArray[np.uint8] | None  # if it is the base


class EngineInDoubt(RuntimeError):
    """An earlier unit failed on this engine, so nothing more was computed on it."""


class Worker:
    """Owns one live engine. After any exception its state is unknown and the driver discards the actor."""

    def __init__(self, spec: WorkerSpec, asked_at: float | None = None) -> None:
        """Start the engine on the base.

        Args:
            spec: What it needs.
            asked_at: When the driver asked for this worker, in seconds of the epoch: from then on its device
                is held. None: now.
        """
        asked_at = asked_at or time.time()
        go_offline()
        from ray_auditor.engine.live import Engine

        self._spec = spec
        self._host = ThreadPoolExecutor(1, "weighing")
        self._weights = BaseWeights(spec.base, spec.num_threads)
        self._store = Store(spec.store_path)
        self._layout = Layout(spec.suites)
        self._staging = Lock()
        self._is_in_doubt = False
        # vLLM and OpenMP keep settings by thread: all that computes runs in one.
        self._device = ThreadPoolExecutor(1, "device", set_num_threads, (spec.num_threads,))
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        max_tokens = max(map(len, self._layout.token_ids))
        self._engine = self._device.submit(
            Engine, spec.base, spec.sae, k=spec.k, max_tokens=max_tokens, config=spec.engine
        ).result()
        self._free_since = time.perf_counter()
        self._start_s: float | None = max(0.0, time.time() - asked_at)

    def audit(self, assignment: Assignment) -> Ran:
        """Load, prove, stream, commit.

        Two calls may be under way: while one holds the device, the other reads ahead, or sorts out its rows
        and commits them.

        Args:
            assignment: The unit to compute.

        Returns:
            What it took.

        Raises:
            CandidateError: The candidate's files are not what was admitted, or its activations overflow.
            RuntimeError: The base's activations overflow.
            SwapError: The engine does not hold the candidate, or no longer does.
            EngineInDoubt: Another unit failed first; this one was not begun.
        """
        with self._staging:
            self._engine.read_ahead(assignment.candidate)
        features, moves, record, residuals = self._device.submit(self._compute_if_sound, assignment).result()
        begun = time.perf_counter()
        is_base = residuals is not None
        scored_M = self._layout.mask_sinks(features.sq_norm_M) if is_base else self._scored_M
        rows = self._rows(features, moves, scored_M)
        sorted_out = time.perf_counter()
        record["seconds"]["rows"] = round(sorted_out - begun, 4)
        self._store.commit(assignment.unit, rows, record, residuals)
        seconds = record["seconds"] | {"write": time.perf_counter() - sorted_out}
        seconds |= {"wait": record["wait_s"], "start": record["start_s"] or 0.0}
        return Ran(self._name, record["num_tokens_run"], assignment.num_weight_bytes, seconds)

    def _compute_if_sound(self, assignment: Assignment) -> "_Computed":
        """`_compute`, unless an earlier unit failed: it may have left NaNs in the KV cache or half a swap."""
        if self._is_in_doubt:
            raise EngineInDoubt(f"{assignment.name} was not begun")
        try:
            return self._compute(assignment)
        except BaseException:
            self._is_in_doubt = True
            raise

    def _compute(self, assignment: Assignment) -> "_Computed":
        """All that needs the device."""
        wait_s, start_s = time.perf_counter() - self._free_since, self._start_s
        with self._staging:
            loaded = self._engine.load(assignment.candidate)
        started = time.perf_counter()
        weighing = self._host.submit(self._weigh, assignment.candidate)  # while the device works
        if self._engine.computes_on_host:  # on the same cores they would only take turns
            wait([weighing])
        begun = time.perf_counter()
        suites = self._spec.suites.suites
        recording = None
        if assignment.unit == self._spec.base_unit:
            recording = self._engine.record(self._spec.suites.num_tokens, len(suites))
        watch = recording or self._comparison
        features = self._engine.encode(self._layout.token_ids, reverse=assignment.reverse, watch=watch)
        self._check_finite(features, assignment)
        moves = watch.finish()
        residuals = recording.to_bytes() if recording is not None else None
        encoded = time.perf_counter()
        weights = weighing.result()
        weighed = time.perf_counter()
        seconds = loaded.seconds | {
            "forward": encoded - begun - self._engine.encode_s,
            "encode": self._engine.encode_s,
            "weights": begun - started + weighed - encoded,
        }
        means = zip(suites, moves.mean_difference_S, strict=True)
        record = {
            "name": assignment.name,
            "proof": loaded.proof,
            "worker": self._name,
            "num_tokens_run": self._spec.suites.num_tokens,
            "num_weight_bytes": assignment.num_weight_bytes,
            "num_bytes": assignment.num_bytes,
            "mean_difference": {suite.name: _six_digits(mean) for suite, mean in means},
            "weights": {name: _six_digits(value) for name, value in weights.items()},
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "wait_s": round(wait_s, 4),
            "start_s": start_s and round(start_s, 4),
        }
        self._free_since, self._start_s = weighed, None
        return _Computed(features, moves, record, residuals)

    def _weigh(self, candidate: Admitted | None) -> dict[str, float | None]:
        """How far the weights moved, and the seconds that finding it took."""
        begun = time.perf_counter()
        if candidate is None:
            change = WeightChange(0.0, None, 0)
        elif candidate.lora is None and (pairs := self._engine.weights_beside_base(candidate)):
            with self._engine.beside_the_run():
                change = change_between(pairs)
        else:
            change = self._weights.change_of(candidate)
        return asdict(change) | {"seconds": time.perf_counter() - begun}

    @staticmethod
    def _check_finite(features: "Features", assignment: Assignment) -> None:
        """Refuse a model that overflows: its numbers mean nothing, and they stay behind in the KV cache.

        Masked positions of a later prompt are multiplied by zero, and zero times NaN is NaN, so the engine
        must be discarded too: raising does that.
        """
        num_bad = int(np.isnan(features.top_acts_MK[:, 0]).sum() + (~np.isfinite(features.sq_norm_M)).sum())
        if num_bad and assignment.candidate is None:
            raise RuntimeError(
                f"the base has activations that are not finite ({num_bad}); use another engine.dtype"
            )
        if num_bad:
            raise CandidateError(
                "rejected", "nonfinite_activations", f"{num_bad} values are not finite at the hook"
            )

    def _rows(self, features: "Features", moves: "Moves", scored_M: NDArray[np.bool_]) -> TokenRows:
        """The scored tokens' rows: prompts come in the order of their numbers, features in that of theirs."""
        layout = self._layout
        return TokenRows(
            layout.suite_M[scored_M],
            layout.prompt_M[scored_M],
            layout.position_M[scored_M],
            features.top_idx_MK[scored_M],
            features.top_acts_MK[scored_M],
            features.fvu_error_M[scored_M],
            features.fvu_total_M[scored_M],
            moves.cosine_M[scored_M],
            moves.change_M[scored_M],
        )

    @cached_property
    def _comparison(self) -> "Comparison":
        """The base's residuals, from the store: another worker, or another process, may have run it."""
        suite_M = np.where(self._scored_M, self._layout.suite_M, self._layout.num_suites).astype(np.int64)
        residuals = self._store.read_residuals(self._spec.base_unit.key)
        return self._engine.compare(residuals, suite_M, self._layout.num_suites)

    @cached_property
    def _scored_M(self) -> NDArray[np.bool_]:
        """The tokens the base's unit scored: the same for every candidate."""
        return self._layout.find(self._store.read_rows(self._spec.base_unit.key))


def _six_digits(value: float | None) -> float | None:
    """What a record keeps: the digits behind depend on how sums were split among threads."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
