"""Adapters that are merged: peft writes them, and peft's own merge says what they are."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ray_auditor.hub import (
    Admitted,
    Candidate,
    CandidateError,
    MergedTensor,
    admit,
    lies_below_hook,
    open_base,
)
from ray_auditor.hub.checkpoint import iter_tensors, principal_part
from ray_auditor.weight_change import BaseWeights
from tests.tiny import make_model

NUM_LAYERS = 3
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "base", "qwen2")  # q, k and v have biases


def train(folder: Path, base_path: Path, *, resize: int | None = None, **settings: object) -> Path:
    """An adapter as peft saves it, every trained tensor moved by noise."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    if resize is not None:
        model.resize_token_embeddings(resize)
    config = LoraConfig(**({"r": 4, "lora_alpha": 10, "target_modules": LINEAR} | settings))
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        if resize is not None:
            wrapped.get_input_embeddings().weight += 0.05
    wrapped.save_pretrained(folder)
    return folder


def admitted(folder: Path, base_path: Path) -> Admitted:
    base = open_base(base_path, num_layers=NUM_LAYERS)
    candidate = Candidate("a", folder, "adapter", 0)
    return admit(
        candidate, base, num_layers=NUM_LAYERS, max_lora_rank=2
    )  # the engine's bound is not merging's


def merged_by_peft(folder: Path, base_path: Path, *, resize: int | None = None) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    if resize is not None:
        model.resize_token_embeddings(resize)
    state = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return {name: tensor for name, tensor in state.items() if lies_below_hook(name, NUM_LAYERS)}


KINDS: dict[str, dict[str, object]] = {
    "dora": {"use_dora": True},
    "dora-patterns": {
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 8},
        "alpha_pattern": {"q_proj": 3},
    },
    "whole": {
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["embed_tokens", "lm_head", "input_layernorm", "down_proj"],
    },
    "block": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "bias-all": {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
    "bias-lora": {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa", "rank_pattern": {"o_proj": 7}},
    "olora": {"init_lora_weights": "olora"},
    "all-at-once": {
        "target_modules": ["q_proj", "k_proj", "gate_proj", "down_proj"],
        "use_dora": True,
        "bias": "all",
        "init_lora_weights": "pissa",
        "modules_to_save": ["o_proj"],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_merged_is_what_peft_merges(kind: str, base_path: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / kind, base_path, **KINDS[kind])
    found = admitted(folder, base_path)
    assert found.lora is None
    assert any(note.startswith("merged into the base's weights: ") for note in found.notes)
    wanted = merged_by_peft(folder, base_path)
    base = load_file(base_path / "model.safetensors")
    assert found.tensors.keys() == wanted.keys()
    num_changed = 0
    # peft finds PiSSA's subspace in fp32, where neighbouring singular values of these random weights blur
    atol = 5e-5 if KINDS[kind].get("init_lora_weights") == "pissa" else 2e-6
    for name, tensor in iter_tensors(found.tensors):
        torch.testing.assert_close(
            tensor, wanted[name], rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
        num_changed += not torch.equal(wanted[name], base[name])
        if isinstance(found.tensors[name], MergedTensor):
            assert not torch.allclose(wanted[name], base[name], rtol=1e-3)
    assert num_changed >= 4

    change = BaseWeights(open_base(base_path)).change_of(found)
    moved = {name: (wanted[name] - base[name]).double() for name in wanted}
    changed = [name for name in moved if moved[name].abs().max() > 1e-6]
    norms = [torch.cat([t[name].double().flatten() for name in changed]).norm() for t in (moved, base)]
    assert change.num_changed == len(changed)
    assert change.relative_change == pytest.approx(float(norms[0] / norms[1]), rel=1e-4)


def test_a_grown_vocabulary_is_cut_to_the_base_s(base_path: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "a", base_path, resize=330, target_modules=["q_proj"])
    found = admitted(folder, base_path)
    (embedding,) = (t for _, t in iter_tensors(found.tensors, ["model.embed_tokens.weight"]))
    assert torch.equal(
        embedding, merged_by_peft(folder, base_path, resize=330)["model.embed_tokens.weight"][:320]
    )
    assert "model.embed_tokens.weight has 330 rows; the base's 320 are read" in found.notes


def test_what_lies_above_the_hook_merges_nothing(base_path: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "a", base_path, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = admitted(folder, base_path)
    assert found.lora is not None
    assert len(found.lora.modules) == NUM_LAYERS


def test_the_same_tensors_under_another_formula_are_another_content(base_path: Path, tmp_path: Path) -> None:
    contents = set()
    folder = train(tmp_path / "a", base_path, r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    config = json.loads((folder / "adapter_config.json").read_text())
    for init, alpha in (("pissa", 10), ("olora", 10), (True, 10), ("pissa", 11)):
        changes = {"init_lora_weights": init, "lora_alpha": alpha}
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        contents.add(admitted(folder, base_path).content_sha256)
    assert len(contents) == 4


def spoil(folder: Path, rename: dict[str, str] | None = None, drop: str = "", **config: object) -> None:
    """Rename or drop tensors, and change the config."""
    path = folder / "adapter_model.safetensors"
    state = {name: tensor for name, tensor in load_file(path).items() if not drop or drop not in name}
    for old, new in (rename or {}).items():
        state = {name.replace(old, new): tensor.clone() for name, tensor in state.items()}
    save_file(state, path, metadata={"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))


@pytest.mark.parametrize(
    ("kind", "spoiled", "reason"),
    [
        ("dora", {"use_dora": False}, "rejected:adapter_config: .* has lora_magnitude_vector, and use_dora"),
        ("dora", {"drop": "1.mlp.up_proj.lora_mag"}, "rejected:adapter_config: .* lacks lora_magnitude_vec"),
        ("lora-bias", {"lora_bias": False}, "rejected:adapter_config: .* has lora_B.bias"),
        ("whole", {"modules_to_save": ["lm_head"]}, "rejected:adapter_config: .* whole and neither"),
        ("whole", {"rename": {"input_layernorm": "input_norm"}, "modules_to_save": ["input_norm", "mlp"]},
         "rejected:wrong_base: the base has no tensor"),
        ("whole", {"rename": {"down_proj": "up_proj"}, "modules_to_save": ["up_proj", "input_layernorm"]},
         "rejected:adapter_config: .* is adapted, and there whole"),
        ("bias-all", {"bias": "none"}, "rejected:adapter_config: .* whole and neither modules_to_save nor"),
        ("bias-all", {"rename": {".base_layer": ""}}, "skipped:adapter_type: .* releases of peft"),
        ("bias-all", {"rename": {"k_proj.bias": "k_proj.base_layer.bias"}}, "skipped:adapter_type: tensor"),
        ("pissa", {"init_lora_weights": "pissa_niter_4"}, "skipped:adapter_type: init_lora_weights"),
    ],
)  # fmt: skip
def test_what_peft_would_read_otherwise_is_refused(
    kind: str, spoiled: dict[str, object], reason: str, base_path: Path, tmp_path: Path
) -> None:
    folder = train(tmp_path / "a", base_path, **KINDS[kind])
    spoil(folder, **spoiled)  # type: ignore[arg-type]
    with pytest.raises(CandidateError, match=f"^{reason}"):
        admitted(folder, base_path)


def test_a_merge_that_overflows_is_refused_when_it_is_read(base_path: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "a", base_path, target_modules=["q_proj"], use_dora=True)
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    for name, tensor in state.items():
        if "layers.1.self_attn.q_proj.lora_" in name:
            tensor.fill_(1e30)
    save_file(state, path, metadata={"format": "pt"})
    found = admitted(folder, base_path)
    with pytest.raises(CandidateError, match=r"rejected:nonfinite_weights: .*layers.1.self_attn.q_proj"):
        list(iter_tensors(found.tensors))


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_the_principal_part_is_the_singular_values_own(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    wanted = (left[:, :5] * values[:5] @ right[:5]).float()
    torch.testing.assert_close(principal_part(weight, 5), wanted, rtol=1e-6, atol=1e-6)
