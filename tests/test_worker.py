"""The worker between engine and store: which positions count, what it refuses."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_auditor.config import AuditConfig, EngineConfig
from ray_auditor.engine_class import engine_class
from ray_auditor.hub import CandidateError
from ray_auditor.worker import Worker


def features(num_tokens: int, sq_norm: float = 1.0) -> Any:
    return SimpleNamespace(
        top_acts_TK=np.ones((num_tokens, 2), np.float32),
        top_idx_TK=np.tile(np.array([1, 0], np.int32), (num_tokens, 1)),
        fvu_error_T=np.zeros(num_tokens, np.float32),
        fvu_total_T=np.ones(num_tokens, np.float32),
        sq_norm_T=np.full(num_tokens, sq_norm, np.float32),
    )


def make_worker(lengths: list[list[int]]) -> Worker:
    """A worker over suites of prompts of these lengths; a prompt's first token id is its number from 1."""
    worker = Worker.__new__(Worker)
    number = iter(range(1, 100))
    suites = []
    for suite in lengths:
        prompts = []
        for length in suite:
            ids = np.full(length, next(number), np.int32)
            prompts.append(SimpleNamespace(token_ids=ids, content=np.arange(length) > 0))
        suites.append(SimpleNamespace(prompts=prompts))
    worker._spec = SimpleNamespace(suites=SimpleNamespace(suites=suites))  # type: ignore[assignment]
    worker._prompts = [
        (s, p, prompt) for s, suite in enumerate(suites) for p, prompt in enumerate(suite.prompts)
    ]
    return worker


def test_positions_far_above_their_suites_median_norm_are_not_scored() -> None:
    worker = make_worker([[4, 4], [4]])
    norms = [np.ones(4, np.float32) for _ in range(3)]
    norms[0][2] = 10.1**2  # a sink inside the content
    norms[1][2] = 9.9**2
    norms[2][:] = 50.0**2  # a suite of large norms has a large median
    masks = worker._mask_sinks(norms)
    assert masks[0, 0].tolist() == [False, True, False, True]
    assert masks[0, 1].tolist() == [False, True, True, True]
    assert masks[1, 0].tolist() == [False, True, True, True]


@pytest.mark.parametrize("where", ["acts", "norm"])
def test_a_model_that_overflows_is_refused_wherever_it_does(where: str) -> None:
    rows = [features(3), features(3)]
    if where == "acts":
        rows[1].top_acts_TK[2] = np.nan
    else:
        rows[1].sq_norm_T[0] = np.inf
    with pytest.raises(CandidateError, match="rejected:nonfinite_activations"):
        Worker._check_finite(rows, SimpleNamespace(candidate=object()))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the base has activations that are not finite"):
        Worker._check_finite(rows, SimpleNamespace(candidate=None))  # type: ignore[arg-type]
    Worker._check_finite(rows[:1], SimpleNamespace(candidate=object()))  # type: ignore[arg-type]


def test_every_engine_setting_that_can_change_a_number_changes_the_class() -> None:
    plain = engine_class(AuditConfig())
    without_effect = {"read_ahead_bytes"}
    changed = {
        "dtype": "bfloat16",
        "max_step_tokens": 4096,
        "max_step_prompts": 7,
        "kv_cache_bytes": 1 << 21,
        "max_lora_rank": 8,
        "eager": False,
    }
    assert changed.keys() | without_effect == set(EngineConfig.__slots__)
    for name, value in changed.items():
        config = AuditConfig()
        setattr(config.engine, name, SimpleNamespace(value=value) if name == "dtype" else value)
        assert engine_class(config) != plain, name
    config = AuditConfig()
    config.cluster.gpus_per_worker = 1
    assert engine_class(config) != plain
