"""Residuals out of the engine against transformers' hidden states, family by family."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from auditor_kernels import EncoderWeights, TopK, encode_topk

from ray_auditor.config import Dtype, EngineConfig
from ray_auditor.engine.live import Engine
from ray_auditor.hub import Candidate, admit, open_base
from ray_auditor.sae import Normalisation, Sae
from tests.tiny import (
    D_IN,
    MODEL_TYPES,
    hidden_states,
    make_adapter,
    make_finetune,
    make_model,
    make_sae,
    mirror_sae,
    unmirror,
)

PROMPTS = [
    [1 + (7 * p + t * t) % 255 for t in range(n)] for p, n in enumerate((5, 100, 33, 130, 17, 64, 1, 90))
]
SETTINGS = EngineConfig(max_step_tokens=64, max_step_prompts=4, kv_cache_bytes=16 << 20, max_lora_rank=8)


@contextmanager
def open_engine(path: Path, sae: Sae, *, k: int, settings: EngineConfig = SETTINGS) -> Iterator[Engine]:
    engine = Engine(open_base(path), sae, k=k, max_tokens=132, config=settings)
    try:
        yield engine
    finally:
        engine.close()


def residuals(engine: Engine) -> list[torch.Tensor]:
    rows = engine.encode(PROMPTS)
    resid = unmirror(torch.from_numpy(rows.top_acts_MK), torch.from_numpy(rows.top_idx_MK))
    return list(resid.split([len(ids) for ids in PROMPTS]))


def relative_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_residuals_equal_transformers(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model(tmp_path / "base", model_type)
    for hook_layer, hook_point in ((2, "resid_post"), (2, "resid_pre")):
        with open_engine(path, mirror_sae(hook_layer, hook_point), k=D_IN) as engine:
            wanted = hidden_states(path, PROMPTS, f"blocks.{hook_layer}.hook_{hook_point}")
            found = residuals(engine)
            assert relative_error(found, wanted) < 1e-5
            with monkeypatch.context() as patch:  # from now on nothing is asked of vLLM
                patch.setattr(engine, "_run", None)
                assert all(map(torch.equal, residuals(engine), found))


def test_a_prompt_in_chunks_and_alone_gives_the_same_rows(tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    with open_engine(path, make_sae(), k=16) as engine:
        together = engine.encode(PROMPTS)
        alone = [engine.encode([ids]) for ids in PROMPTS]
        assert (np.concatenate([one.top_idx_MK for one in alone]) == together.top_idx_MK).mean() > 0.999
        acts = np.concatenate([one.top_acts_MK for one in alone])
        np.testing.assert_allclose(acts, together.top_acts_MK, rtol=1e-4, atol=1e-5)


def test_nothing_is_learned_from_the_tokens_that_vllm_makes_up_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder's screen fits the first tokens that it meets (`int8_rounding.py`): real ones."""
    met: list[EncoderWeights] = []

    def note(resid_ND: torch.Tensor, encoder: EncoderWeights, *, k: int) -> TopK:
        met.append(encoder)
        return encode_topk(resid_ND, encoder, k=k)

    monkeypatch.setattr("ray_auditor.engine.model.encode_topk", note)
    with open_engine(make_model(tmp_path / "base", "llama"), make_sae(), k=4) as engine:
        # what vLLM does by itself at start, on a GPU
        engine._llm.collective_rpc(lambda worker: worker.model_runner._dummy_pooler_run(torch.randn(8, D_IN)))
        made_up = {id(encoder) for encoder in met}
        assert made_up
        num_made_up = len(met)
        engine.encode(PROMPTS)
        real = {id(encoder) for encoder in met[num_made_up:]}
        assert len(real) == 1
        assert not real & made_up


def test_swapped_weights_and_adapters_equal_transformers_and_leave_no_trace(tmp_path: Path) -> None:
    """A -> full B -> adapter on A -> another adapter -> A: every state is what a fresh model would be."""
    hook, sae = "blocks.2.hook_resid_post", mirror_sae(2, "resid_post")
    path = make_model(tmp_path / "base")
    other = make_finetune(tmp_path / "other", path, seed=1)
    adapters = [make_adapter(tmp_path / f"adapter{r}", path, seed=r, rank=r) for r in (2, 8)]
    merged = make_adapter(
        tmp_path / "merged", path, seed=3, use_dora=True, modules_to_save=["input_layernorm"]
    )
    base = open_base(path)

    def admitted(folder: Path, kind: str) -> object:
        found = Candidate(folder.name, folder, kind, 0)  # type: ignore[arg-type]
        return admit(found, base, num_layers=3, max_lora_rank=8)

    with open_engine(path, sae, k=D_IN) as engine:
        first = residuals(engine)
        for folder, kind in (
            (other, "full"),
            (adapters[0], "adapter"),
            (other, "full"),
            (merged, "adapter"),
            (adapters[1], "adapter"),
        ):
            engine.load(admitted(folder, kind))  # type: ignore[arg-type]
            if kind == "full":
                wanted = hidden_states(folder, PROMPTS, hook)
            else:
                wanted = hidden_states(path, PROMPTS, hook, adapter=folder)
            assert relative_error(residuals(engine), wanted) < 1e-5
            assert relative_error(wanted, first) > 0.1
        engine.load(None)
        for again, before in zip(residuals(engine), first, strict=True):
            assert torch.equal(again, before)


def test_half_precision_stays_near_transformers(tmp_path: Path) -> None:
    path = make_model(tmp_path / "base", "gemma2")
    settings = EngineConfig(
        dtype=Dtype.bfloat16, max_step_tokens=64, kv_cache_bytes=16 << 20, max_lora_rank=0
    )
    with open_engine(path, mirror_sae(2, "resid_post"), k=D_IN, settings=settings) as engine:
        wanted = hidden_states(path, PROMPTS, "blocks.2.hook_resid_post")
        assert relative_error(residuals(engine), wanted) < 0.1


def test_a_normalised_sae_encodes_what_transformers_and_the_reference_say(tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    sae = replace(make_sae(), normalisation=Normalisation.LAYER_NORM)
    with open_engine(path, sae, k=16) as engine:
        resid_MD = torch.cat(hidden_states(path, PROMPTS, "blocks.2.hook_resid_post"))
        centred_MD = resid_MD - resid_MD.mean(-1, keepdim=True)
        normal_MD = centred_MD / (centred_MD.std(-1, keepdim=True) + 1e-5)
        wanted = (normal_MD @ sae.encoder.W_enc_DF + sae.encoder.b_enc_F).relu().topk(16).values
        found = torch.from_numpy(engine.encode(PROMPTS).top_acts_MK).sort(descending=True).values
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
