"""How far residuals lie from the base's: against float64, against transformers, in any batching."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ray_auditor.engine.residuals as residuals
from ray_auditor.config import Dtype, EngineConfig
from ray_auditor.engine.live import Engine
from ray_auditor.engine.residuals import Comparison, Moves, Recording
from ray_auditor.hub import Candidate, admit, open_base
from tests.engine.test_parity import PROMPTS, SETTINGS, open_engine
from tests.tiny import hidden_states, make_adapter, make_finetune, make_model, make_sae

NUM_TOKENS = sum(map(len, PROMPTS))
SUITES = 2
SUITE_M = np.concatenate([np.where(np.arange(len(ids)) > 0, p % 2, SUITES) for p, ids in enumerate(PROMPTS)])


def oracle(base_MD: Tensor, cand_MD: Tensor, suite_M: np.ndarray, num_suites: int = SUITES) -> Moves:
    """The definitions in float64."""
    base, cand = base_MD.double().numpy(), cand_MD.double().numpy()
    norm_M = np.linalg.norm(base, axis=1)
    cosine_M = (base * cand).sum(1) / (norm_M * np.linalg.norm(cand, axis=1))
    change_M = np.linalg.norm(cand - base, axis=1) / norm_M
    means: list[float | None] = []
    for suite in range(num_suites):
        of = suite_M == suite
        mean = np.linalg.norm((cand - base)[of].mean(0)) / norm_M[of].mean() if of.any() else None
        means.append(mean)
    return Moves(cosine_M, change_M, means)


def assert_near(found: Moves, wanted: Moves, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(found.cosine_M, wanted.cosine_M, atol=tolerance)
    np.testing.assert_allclose(found.change_M, wanted.change_M, rtol=20 * tolerance, atol=tolerance)
    for mean, of_oracle in zip(found.mean_difference_S, wanted.mean_difference_S, strict=True):
        if of_oracle is None:
            assert mean is None
        else:
            assert mean == pytest.approx(of_oracle, rel=50 * tolerance, abs=tolerance)


def in_steps(comparison: Comparison, cand_MD: Tensor, order_M: Tensor, step: int) -> Moves:
    for rows_N in order_M.split(step):
        comparison.add(rows_N, cand_MD[rows_N])
    return comparison.finish()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 60),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 999),
    st.integers(1, 30),
    st.sampled_from([1, 3, 4096]),
)
def test_any_order_of_arrival_gives_the_definitions(
    num_tokens: int, dtype: torch.dtype, seed: int, step: int, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base_MD = (torch.randn(num_tokens, 24, generator=generator) * 3).to(dtype)
    cand_MD = (base_MD + 0.3 * torch.randn(num_tokens, 24, generator=generator)).to(dtype)
    cand_MD[::5] = base_MD[::5]
    suite_M = torch.randint(0, 4, (num_tokens,), generator=generator)
    comparison = Comparison(base_MD, suite_M, 3)
    usual, residuals.CHUNK_TOKENS = residuals.CHUNK_TOKENS, chunk
    try:
        found = [
            in_steps(comparison, cand_MD, order_M, step)
            for order_M in (torch.arange(num_tokens), torch.randperm(num_tokens, generator=generator))
        ]
    finally:
        residuals.CHUNK_TOKENS = usual
    for moves in found:
        assert_near(moves, oracle(base_MD, cand_MD, suite_M.numpy(), 3))
        assert (moves.cosine_M[::5] == 1).all()
        assert (moves.change_M[::5] == 0).all()
    assert np.array_equal(found[0].cosine_M, found[1].cosine_M)
    assert np.array_equal(found[0].change_M, found[1].change_M)


def test_a_run_leaves_nothing_to_the_next() -> None:
    base_MD, cand_MD = torch.randn(2, 30, 8)
    comparison = Comparison(base_MD, torch.zeros(30, dtype=torch.int64), 1)
    first = in_steps(comparison, cand_MD, torch.arange(30), 7)
    again = in_steps(comparison, base_MD, torch.arange(30), 7)
    assert again.mean_difference_S == [0.0]
    assert (again.change_M == 0).all()
    assert in_steps(comparison, cand_MD, torch.arange(30), 7).mean_difference_S == first.mean_difference_S


def test_residuals_of_nothing_stay_finite() -> None:
    base_MD = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    cand_MD = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    moves = in_steps(Comparison(base_MD, torch.zeros(3, dtype=torch.int64), 1), cand_MD, torch.arange(3), 3)
    assert moves.cosine_M.tolist() == [1, 0, 0]
    assert moves.change_M[[0, 2]].tolist() == [0, 1]
    assert np.isfinite(moves.change_M).all()


def record(engine: Engine) -> tuple[Comparison, Recording]:
    recording = engine.record(NUM_TOKENS, SUITES)
    engine.encode(PROMPTS, watch=recording)
    assert recording.finish().cosine_M.tolist() == [1] * NUM_TOKENS
    return engine.compare(recording.to_bytes(), SUITE_M, SUITES), recording


def run(engine: Engine, comparison: Comparison, *, reverse: bool = False) -> Moves:
    engine.encode(PROMPTS, reverse=reverse, watch=comparison)
    return comparison.finish()


def test_full_weights_and_adapters_lie_as_far_from_the_base_as_transformers_says(tmp_path: Path) -> None:
    """In both orders of the prompts, which are two batchings; and the base is where it was."""
    hook = "blocks.2.hook_resid_post"
    path = make_model(tmp_path / "base")
    other = make_finetune(tmp_path / "other", path, seed=1)
    adapter = make_adapter(tmp_path / "adapter", path, seed=2, rank=8, scale=0.05)
    base = open_base(path)
    base_MD = torch.cat(hidden_states(path, PROMPTS, hook))
    with open_engine(path, make_sae(), k=8) as engine:
        comparison, recording = record(engine)
        torch.testing.assert_close(recording.resid_MD, base_MD, rtol=1e-4, atol=1e-4)
        for folder, kind in ((other, "full"), (adapter, "adapter"), (other, "full")):
            found = Candidate(folder.name, folder, kind, 0)  # type: ignore[arg-type]
            engine.load(admit(found, base, num_layers=3, max_lora_rank=8))
            states = hidden_states(folder, PROMPTS, hook) if kind == "full" else None
            states = states or hidden_states(path, PROMPTS, hook, adapter=folder)
            wanted = oracle(base_MD, torch.cat(states), SUITE_M)
            assert wanted.change_M.min() > 1e-3
            for reverse in (False, True):
                assert_near(run(engine, comparison, reverse=reverse), wanted, tolerance=1e-5)
        engine.load(None)
        moves = run(engine, comparison)
        assert (moves.cosine_M == 1).all()
        assert (moves.change_M == 0).all()
        assert moves.mean_difference_S == [0.0, 0.0]


def test_half_precision_is_held_to_its_own_residuals(tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    other = make_finetune(tmp_path / "other", path, seed=1)
    settings = EngineConfig(
        dtype=Dtype.bfloat16, max_step_tokens=64, kv_cache_bytes=16 << 20, max_lora_rank=0
    )
    with open_engine(path, make_sae(), k=8, settings=settings) as engine:
        comparison, recording = record(engine)
        assert recording.to_bytes().nbytes == NUM_TOKENS * 64 * 2
        moves = run(engine, comparison)
        assert (moves.cosine_M == 1).all()
        assert (moves.change_M == 0).all()
        found = Candidate("other", other, "full", 0)
        engine.load(admit(found, open_base(path), num_layers=3, max_lora_rank=0))
        moves, again = run(engine, comparison), engine.record(NUM_TOKENS, SUITES)
        engine.encode(PROMPTS, watch=again)
        assert_near(moves, oracle(recording.resid_MD, again.resid_MD, SUITE_M))


def test_the_replay_runs_the_prompts_in_another_order_and_returns_them_in_theirs(tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    with open_engine(path, make_sae(), k=8, settings=SETTINGS) as engine:
        asked: list[int] = []
        encode = engine._llm.encode

        def watched(prompts: list[dict[str, list[int]]], *args: object, **kwargs: object) -> object:
            asked.append(len(prompts[0]["prompt_token_ids"]))
            return encode(prompts, *args, **kwargs)

        engine._llm.encode = watched
        plain, reverse = engine.encode(PROMPTS), engine.encode(PROMPTS, reverse=True)
        assert asked == [len(PROMPTS[0]), len(PROMPTS[-1])]
        np.testing.assert_allclose(plain.sq_norm_M, reverse.sq_norm_M, rtol=1e-5)
