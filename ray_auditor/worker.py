"""The Ray actor: one candidate in, one committed shard out."""

# Shape suffixes: T tokens of one prompt, N scored tokens, K = kept features.

import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ray_auditor.config import EngineConfig
from ray_auditor.hub import Admitted, BaseModel, CandidateError
from ray_auditor.hub.secret import go_offline
from ray_auditor.sae import Sae
from ray_auditor.store import Store, TokenRows, Unit
from ray_auditor.suites import Suites
from ray_auditor.weight_change import BaseWeights, WeightChange
from ray_auditor.work import Ran

if TYPE_CHECKING:
    from ray_auditor.engine.live import PromptFeatures
    from ray_auditor.engine.residuals import Comparison, Moves

SINK_NORM_RATIO = 10.0  # a position whose residual is so many times the suite's median norm is a sink
ROWS_VERSION = (
    3  # of what a row is: kernel, mask, casts, FVU, cosine; raise it when a change can alter a number
)


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
        torch.set_num_threads(spec.num_threads)
        from ray_auditor.engine.live import Engine

        self._spec = spec
        self._host = ThreadPoolExecutor(1, "weights")
        self._weights = BaseWeights(spec.base)
        self._store = Store(spec.store_path)
        self._prompts = [
            (suite_id, number, prompt)
            for suite_id, suite in enumerate(spec.suites.suites)
            for number, prompt in enumerate(suite.prompts)
        ]
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        max_tokens = max(len(prompt.token_ids) for _, _, prompt in self._prompts)
        self._engine = Engine(spec.base, spec.sae, k=spec.k, max_tokens=max_tokens, config=spec.engine)
        self._free_since = time.perf_counter()
        self._start_s: float | None = max(0.0, time.time() - asked_at)

    def audit(self, assignment: Assignment, upcoming: Assignment | None = None) -> Ran:
        """Load, prove, stream, commit.

        Args:
            assignment: The unit to compute.
            upcoming: What this worker is likely to be given next; read while this one computes.

        Returns:
            What it took.

        Raises:
            CandidateError: The candidate's files are not what was admitted, or its activations overflow.
            RuntimeError: The base's activations overflow.
            SwapError: The engine does not hold the candidate, or no longer does.
        """
        wait_s, start_s = time.perf_counter() - self._free_since, self._start_s
        loaded = self._engine.load(assignment.candidate)
        if upcoming is not None:
            self._engine.read_ahead(upcoming.candidate)
        started = time.perf_counter()
        weighing = self._host.submit(self._weigh, assignment.candidate)  # while the device works
        if self._engine.computes_on_host:  # two teams of threads on the same cores would only take turns
            wait([weighing])
        begun = time.perf_counter()
        suites = self._spec.suites.suites
        recording = None
        if assignment.unit == self._spec.base_unit:
            recording = self._engine.record(self._spec.suites.num_tokens, len(suites))
        watch = recording or self._comparison
        ids = [prompt.token_ids.tolist() for _, _, prompt in self._prompts]
        features = self._engine.encode(ids, reverse=assignment.reverse, watch=watch)
        self._check_finite(features, assignment)
        moves = watch.finish()
        encoded = time.perf_counter()
        rows = self._score(features, moves, is_base=recording is not None)
        scored = time.perf_counter()
        weights = weighing.result()
        weighed = time.perf_counter()
        seconds = loaded.seconds | {
            "forward": encoded - begun - self._engine.encode_s,
            "encode": self._engine.encode_s,
            "rows": scored - encoded,
            "weights": begun - started + weighed - scored,
        }
        means = zip(suites, moves.mean_difference_S, strict=True)
        num_tokens = self._spec.suites.num_tokens
        record = {
            "name": assignment.name,
            "proof": loaded.proof,
            "worker": self._name,
            "num_tokens_run": num_tokens,
            "num_weight_bytes": assignment.num_weight_bytes,
            "num_bytes": assignment.num_bytes,
            "mean_difference": {suite.name: _six_digits(mean) for suite, mean in means},
            "weights": {name: _six_digits(value) for name, value in weights.items()},
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "wait_s": round(wait_s, 4),
            "start_s": start_s and round(start_s, 4),
        }
        residuals = recording.to_bytes() if recording is not None else None
        self._store.commit(assignment.unit, rows, record, residuals)
        self._free_since, self._start_s = time.perf_counter(), None
        seconds |= {"write": self._free_since - weighed, "wait": wait_s, "start": start_s or 0.0}
        return Ran(self._name, num_tokens, assignment.num_weight_bytes, seconds)

    def _weigh(self, candidate: Admitted | None) -> dict[str, float | None]:
        """How far the weights moved, and the seconds that finding it took."""
        begun = time.perf_counter()
        change = WeightChange(0.0, None, 0) if candidate is None else self._weights.change_of(candidate)
        return asdict(change) | {"seconds": time.perf_counter() - begun}

    @staticmethod
    def _check_finite(features: Sequence["PromptFeatures"], assignment: Assignment) -> None:
        """Refuse a model that overflows: its numbers mean nothing, and they stay behind in the KV cache.

        Masked positions of a later prompt are multiplied by zero, and zero times NaN is NaN, so the engine
        must be discarded too: raising does that.
        """
        num_bad = sum(int(np.isnan(row.top_acts_TK[:, 0]).sum()) for row in features)
        num_bad += sum(int((~np.isfinite(row.sq_norm_T)).sum()) for row in features)
        if num_bad and assignment.candidate is None:
            raise RuntimeError(
                f"the base has activations that are not finite ({num_bad}); use another engine.dtype"
            )
        if num_bad:
            raise CandidateError(
                "rejected", "nonfinite_activations", f"{num_bad} values are not finite at the hook"
            )

    def _score(self, features: Sequence["PromptFeatures"], moves: "Moves", *, is_base: bool) -> TokenRows:
        masks = self._mask_sinks([row.sq_norm_T for row in features]) if is_base else self._base_masks
        picked = [
            (suite_id, number, np.flatnonzero(masks[suite_id, number]), row)
            for (suite_id, number, _), row in zip(self._prompts, features, strict=True)
        ]
        counts = [len(positions) for _, _, positions, _ in picked]
        scored_M = np.concatenate([masks[suite_id, number] for suite_id, number, _ in self._prompts])
        return TokenRows(  # prompts come in the order of their numbers, and features in that of their indices
            np.repeat(np.array([suite_id for suite_id, *_ in picked], np.int16), counts),
            np.repeat(np.array([number for _, number, *_ in picked], np.int32), counts),
            np.concatenate([positions for _, _, positions, _ in picked]).astype(np.int32),
            np.concatenate([row.top_idx_TK[positions] for *_, positions, row in picked]),
            np.concatenate([row.top_acts_TK[positions] for *_, positions, row in picked]),
            np.concatenate([row.fvu_error_T[positions] for *_, positions, row in picked]),
            np.concatenate([row.fvu_total_T[positions] for *_, positions, row in picked]),
            moves.cosine_M[scored_M],
            moves.change_M[scored_M],
        )

    def _mask_sinks(
        self, sq_norms: Sequence[NDArray[np.float32]]
    ) -> dict[tuple[int, int], NDArray[np.bool_]]:
        """Content positions of the base that are not attention sinks, by (suite, prompt)."""
        masks = {}
        for suite_id in range(len(self._spec.suites.suites)):
            of_suite = [
                (number, prompt.content, norms)
                for (owner, number, prompt), norms in zip(self._prompts, sq_norms, strict=True)
                if owner == suite_id
            ]
            median = np.median(np.concatenate([norms[content] for _, content, norms in of_suite]))
            for number, content, norms in of_suite:
                masks[suite_id, number] = content & ~(norms > SINK_NORM_RATIO**2 * median)
        return masks

    @cached_property
    def _comparison(self) -> "Comparison":
        """The base's residuals, from the store: another worker, or another process, may have run it."""
        num_suites = len(self._spec.suites.suites)
        masks, prompts = self._base_masks, self._prompts
        suite_M = np.concatenate([np.where(masks[s, n], s, num_suites) for s, n, _ in prompts])
        residuals = self._store.read_residuals(self._spec.base_unit.key)
        return self._engine.compare(residuals, suite_M, num_suites)

    @cached_property
    def _base_masks(self) -> dict[tuple[int, int], NDArray[np.bool_]]:
        """The positions the base's unit scored: the same for every candidate."""
        rows = self._store.read_rows(self._spec.base_unit.key)
        masks = {}
        for suite_id, number, prompt in self._prompts:
            masks[suite_id, number] = np.zeros(len(prompt.token_ids), dtype=bool)
        owner_N = np.stack([rows.suite_N, rows.prompt_N], axis=1)
        starts = np.flatnonzero(np.diff(owner_N, axis=0, prepend=-1).any(1))
        for (suite_id, number), positions in zip(
            owner_N[starts].tolist(), np.split(rows.position_N, starts[1:]), strict=True
        ):
            masks[suite_id, number][positions] = True
        return masks


def _six_digits(value: float | None) -> float | None:
    """What a record keeps: the digits behind depend on how sums were split among threads."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
