"""The worker between engine and store: which positions count, what it refuses."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ray_auditor.config import AuditConfig, EngineConfig
from ray_auditor.engine.parameters import SwapError
from ray_auditor.engine_class import engine_class
from ray_auditor.hub import Candidate, CandidateError, admit, open_base
from ray_auditor.store import Store, Unit
from ray_auditor.suites import Prompt, Suite, Suites
from ray_auditor.worker import Assignment, EngineInDoubt, Worker, WorkerSpec
from tests.tiny import make_adapter, make_finetune, make_model, make_sae


def features(num_tokens: int) -> Any:
    return SimpleNamespace(
        top_acts_MK=np.ones((num_tokens, 2), np.float32), sq_norm_M=np.ones(num_tokens, np.float32)
    )


@pytest.mark.parametrize("where", ["acts", "norm"])
def test_a_model_that_overflows_is_refused_wherever_it_does(where: str) -> None:
    rows = features(6)
    if where == "acts":
        rows.top_acts_MK[5] = np.nan
    else:
        rows.sq_norm_M[3] = np.inf
    with pytest.raises(CandidateError, match="rejected:nonfinite_activations"):
        Worker._check_finite(rows, SimpleNamespace(candidate=object()))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the base has activations that are not finite"):
        Worker._check_finite(rows, SimpleNamespace(candidate=None))  # type: ignore[arg-type]
    Worker._check_finite(features(3), SimpleNamespace(candidate=object()))  # type: ignore[arg-type]


def test_every_engine_setting_that_can_change_a_number_changes_the_class() -> None:
    plain = engine_class(AuditConfig())
    without_effect = {"read_ahead_bytes", "max_lora_rank"}
    changed = {
        "dtype": "bfloat16",
        "max_step_tokens": 4096,
        "max_step_prompts": 7,
        "kv_cache_bytes": 1 << 21,
    }
    assert changed.keys() | without_effect == set(EngineConfig.__slots__)
    for name, value in changed.items():
        config = AuditConfig()
        setattr(config.engine, name, SimpleNamespace(value=value) if name == "dtype" else value)
        assert engine_class(config) != plain, name
    config = AuditConfig()
    config.cluster.gpus_per_worker = 1
    assert engine_class(config) != plain


class Rig:
    """A real worker on a tiny base, its store, and candidates to give it."""

    def __init__(self, root: Path) -> None:
        base_path = make_model(root / "base")
        make_finetune(root / "full", base_path, seed=1)
        make_adapter(root / "adapter", base_path, seed=2)
        make_adapter(root / "merged", base_path, seed=3, use_dora=True)
        self.root, self.base, sae = root, open_base(base_path, num_layers=3), make_sae()
        ids = np.arange(3, 23, dtype=np.int32)
        prompt = Prompt("", ids, (), np.arange(len(ids)) > 0)
        suites = Suites(tuple(Suite(name, (prompt, prompt), 0) for name in ("general", "other")))
        self.unit = Unit("", self.base.key, sae.key, sae.hook_name, suites.key, 8, sae.d_sae, "test")
        config = EngineConfig(max_step_tokens=64, kv_cache_bytes=16 << 20, max_lora_rank=8)
        base_unit = replace(self.unit, candidate_key=self.base.content_sha256)
        spec = WorkerSpec(self.base, base_unit, sae, suites, 8, config, root / "store", 1)
        self.worker, self.store = Worker(spec), Store(root / "store")
        self.worker.audit(Assignment(base_unit, None))

    def task(self, name: str) -> Assignment:
        kind = "full" if name == "full" else "adapter"
        found = Candidate(name, self.root / name, kind, 0)  # type: ignore[arg-type]
        admitted = admit(found, self.base, num_layers=3, max_lora_rank=8)
        return Assignment(replace(self.unit, candidate_key=admitted.content_sha256), admitted)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("worker"))
    yield rig
    rig.worker._engine.close()


def flip(places: Any) -> None:
    rows = places.rows("model.layers.1.mlp.up_proj.weight").view(torch.int32)
    rows[3, 5] ^= 1


@pytest.mark.parametrize("name", ["full", "merged", "adapter"])
@pytest.mark.parametrize("fault", ["a bit flips", "nothing is written"])
def test_a_swap_with_a_fault_commits_nothing(
    rig: Rig, name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_auditor.engine import live
    from ray_auditor.engine.staging import Staging

    task = rig.task(name)
    swap, put = Staging.swap, live.put_adapter

    def broken_swap(self: Staging, key: str, specs: Any) -> Any:
        before = {slot: self._places.rows(slot).clone() for slot in self._places.slots}
        expected = swap(self, key, specs)
        if fault == "a bit flips":
            flip(self._places)
        else:
            for slot, rows in before.items():
                self._places.rows(slot).copy_(rows)
        return expected

    def broken_put(model: Any, places: Any, tensors: Any) -> None:
        changed = {module: (a.clone(), b.clone()) for module, (a, b) in tensors.items()}
        _, lora_b = next(iter(changed.values()))
        lora_b.view(torch.int32)[0, 0] ^= 1
        put(model, places, changed if fault == "a bit flips" else {})

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "swap", broken_swap)
        patch.setattr(live, "put_adapter", broken_put)
        with pytest.raises(SwapError):
            rig.worker.audit(task)
    rig.worker._is_in_doubt = False  # what the fault left is written anew
    assert not rig.store.has(task.unit.key)


def test_what_waits_behind_a_unit_that_fails_is_not_begun(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the engine's cache nor the sums of residuals are what they were."""
    bad, good = rig.task("full"), rig.task("adapter")
    begun, compute = Event(), rig.worker._compute

    def overflow(assignment: Assignment) -> Any:
        if assignment is good:
            return compute(assignment)
        begun.set()
        time.sleep(1.0)  # meanwhile the other is queued behind
        raise CandidateError("rejected", "nonfinite_activations", "1 value")

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(rig.worker, "_compute", overflow)
        first = pool.submit(rig.worker.audit, bad)
        begun.wait(20)
        second = pool.submit(rig.worker.audit, good)
        assert isinstance(first.exception(), CandidateError)
        assert isinstance(second.exception(), EngineInDoubt)
    assert not rig.store.has(bad.unit.key)
    assert not rig.store.has(good.unit.key)
    rig.worker._is_in_doubt = False


@pytest.mark.parametrize("name", ["full", "merged", "adapter"])
def test_without_a_fault_the_same_candidate_is_committed(rig: Rig, name: str) -> None:
    task = rig.task(name)
    ran = rig.worker.audit(task)
    record = rig.store.read_record(task.unit.key)
    assert record["proof"]
    assert ran.num_tokens == record["num_tokens_run"] == 80
    assert ran.num_bytes == record["num_weight_bytes"] > 0
    assert ran.seconds["encode"] > 0
    assert ran.seconds["forward"] > 0
