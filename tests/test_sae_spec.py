"""A configuration that is not honoured exactly is refused by name, and so is a damaged SAE."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ray_auditor.sae import load_sae
from ray_auditor.sae_spec import parse_hook

D_IN, D_SAE = 6, 20
METADATA = {
    "sae_lens_version": "6.54.12",
    "hook_name": "blocks.3.hook_resid_post",
    "hook_head_index": None,
    "model_name": "tiny",
}
CFG: dict[str, Any] = {
    "architecture": "standard",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": METADATA,
}
TOPK = {**CFG, "architecture": "topk", "k": 4}
OLD = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "hook_point": "blocks.3.hook_resid_post",
    "hook_point_head_index": None,
    "normalize_activations": "none",
}


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    named = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value for name, value in {**named, **changes}.items() if value is not None}


def write(folder: Path, cfg: object, weights: dict[str, Tensor] | None = None) -> Path:
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors() if weights is None else weights, folder / "sae_weights.safetensors")
    return folder


def about(**changes: object) -> dict[str, Any]:
    return {**CFG, "metadata": {**METADATA, **changes}}


def test_the_unchanged_configurations_load(tmp_path: Path) -> None:
    assert load_sae(write(tmp_path, CFG)).architecture == "standard"
    assert load_sae(write(tmp_path, TOPK)).encoder.max_active == 4
    assert load_sae(write(tmp_path, OLD)).hook_name == "blocks.3.hook_resid_post"
    old_topk = {**OLD, "architecture": "topk", "k": 4, "activation_fn_kwargs": {}, "sae_lens_version": None}
    assert load_sae(write(tmp_path, old_topk)).encoder.max_active == 4
    assert load_sae(str(tmp_path)).key == load_sae(tmp_path).key


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            {**CFG, "architecture": "transcoder"},
            "architecture must be one of .* got 'transcoder'; choose an SAE",
        ),
        ({**CFG, "architecture": "matching_pursuit"}, "architecture .* got 'matching_pursuit'"),
        ({**CFG, "architecture": "batchtopk"}, "got 'batchtopk'; .* save_inference_model"),
        ({**CFG, "architecture": ["topk"]}, r"architecture .* got \['topk'\]"),
        ({**CFG, "architecture": None}, "architecture must be given"),
        ({**CFG, "d_in": 0}, r"d_in must be an integer in \[1, inf\], got 0"),
        ({**CFG, "d_in": True}, "d_in must be an integer"),
        ({**CFG, "d_sae": "20"}, "d_sae must be an integer .* got '20'"),
        ({**CFG, "d_sae": 19}, r"the shape of W_enc must be \(6, 19\), .* d_sae 19, got \(6, 20\)"),
        ({**CFG, "d_in": 7}, r"the shape of W_enc must be \(7, 20\)"),
        ({**CFG, "apply_b_dec_to_input": 1}, "apply_b_dec_to_input must be true or false, got 1"),
        (
            {**TOPK, "rescale_acts_by_decoder_norm": "no"},
            "rescale_acts_by_decoder_norm must be true or false",
        ),
        ({**CFG, "normalize_activations": "covariance_whitening"}, "normalize_activations .* fold it into"),
        ({**CFG, "normalize_activations": "expected_average_only_in"}, "where no scale is known"),
        ({**CFG, "normalize_activations": None}, "normalize_activations must be one of .* got None"),
        ({**CFG, "reshape_activations": "hook_z"}, "reshape_activations must be none, got 'hook_z'"),
        ({**CFG, "d_out": 6}, "d_out must be absent, got 6"),
        ({**CFG, "metadata": [1]}, "metadata must be an object"),
        (about(hook_name_out="blocks.3.hook_mlp_out"), "hook_name_out must be absent"),
        (about(hook_head_index=2), "hook_head_index must be null, got 2"),
        (about(hook_name="blocks.3.hook_resid_mid"), "hook_name must be .* got 'blocks.3.hook_resid_mid'"),
        (about(hook_name="blocks.3.attn.hook_z"), "choose an SAE of the residual stream"),
        (about(hook_name=3), "hook_name must be .* got 3"),
        (about(hook_name=None), "hook_name must be given, got None; set sae.hook_name"),
        (about(model_name=5), "model_name must be text or null"),
        (about(sae_lens_version="new"), "sae_lens_version must be a version such as 6.54.12, got 'new'"),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(cfg: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"SAE .*{message}"):
        load_sae(write(tmp_path, cfg))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        pytest.param({**TOPK, "k": None}, "k must be given once, got None", id="sae-lens takes k = 100"),
        pytest.param({**TOPK, "k": 21}, r"k must be an integer in \[1, 20\], got 21", id="k > d_sae"),
        pytest.param({**TOPK, "k": 0}, r"k must be an integer in \[1, 20\], got 0", id="k = 0"),
        pytest.param(
            {**CFG, "activation_fn": "topk", "k": 4}, "architecture must be topk", id="sae-lens takes ReLU"
        ),
        pytest.param({**CFG, "k": 4}, "architecture must be topk where k is given", id="k without topk"),
        pytest.param(
            {**OLD, "activation_fn_str": "topk"}, "k must be given once", id="old, no k: ReLU in sae-lens"
        ),
        pytest.param(
            {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {}, "k": 4},
            "architecture must be topk",
            id="old, k at the top level: ReLU in sae-lens",
        ),
        pytest.param(
            {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "k": 5},
            r"k must be given once, got \[5, 4\]",
            id="two k",
        ),
        pytest.param(
            {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4, "signed": True}},
            "activation_fn_kwargs must be k alone, got {'signed': True}; .* abstopk",
            id="the sign is lost in sae-lens",
        ),
        pytest.param(
            {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "architecture": "gated"},
            "activation_fn must be relu where architecture is gated",
            id="contradiction",
        ),
        pytest.param(
            {**OLD, "activation_fn_str": "TopK"}, "activation_fn must be relu or topk", id="spelling"
        ),
        pytest.param(
            {**OLD, "activation_fn": "tanh-relu"}, "activation_fn must be relu or topk", id="tanh-relu"
        ),
        pytest.param(
            {**OLD, "activation_fn_kwargs": 4}, "activation_fn_kwargs must be an object", id="kwargs"
        ),
        pytest.param({**OLD, "architecture": "topk"}, "k must be given once", id="old topk without k"),
        pytest.param({**OLD, "hook_point": 3}, "cfg.json is not a configuration of sae-lens", id="damaged"),
        pytest.param({**OLD, "hook_point": "blocks.3.attn.hook_z"}, "reshape_activations", id="heads"),
        pytest.param(
            {**OLD, "normalize_activations": True}, "where no scale is known", id="the old flag of scaling"
        ),
    ],
)
def test_no_topk_loads_as_something_else(cfg: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"SAE .*{message}"):
        load_sae(write(tmp_path, cfg))


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), "1", True, None])
def test_a_scale_must_be_a_positive_number(scale: object, tmp_path: Path) -> None:
    write(tmp_path, {**CFG, "normalize_activations": "expected_average_only_in"})
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    with pytest.raises(ValueError, match="where no scale is known"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            tensors(b_enc=None),
            r"the tensors must be W_dec, W_enc, b_dec, b_enc .* got \['W_dec', 'W_enc', 'b_dec'\]",
        ),
        (tensors(threshold=torch.ones(D_SAE)), "the tensors must be .* where architecture is standard"),
        (tensors(scaling_factor=torch.full((D_SAE,), 2.0)), "the tensors must be"),
        (tensors(b_enc=torch.zeros(D_SAE + 1)), r"the shape of b_enc must be \(20,\)"),
        (tensors(W_dec=torch.zeros(D_IN, D_SAE)), r"the shape of W_dec must be \(20, 6\)"),
        (
            tensors(W_enc=torch.full((D_IN, D_SAE), torch.nan)),
            "W_enc must be finite, got '120 NaN or infinite values'",
        ),
        (tensors(b_dec=torch.full((D_IN,), torch.inf)), "b_dec must be finite, got '6 NaN"),
        (
            tensors(b_enc=torch.zeros(D_SAE, dtype=torch.int8)),
            "the dtype of b_enc must be .* got 'torch.int8'",
        ),
        (
            tensors(b_dec=torch.full((D_IN,), 1e300, dtype=torch.float64)),
            "the folded b_.* must be within fp32",
        ),
    ],
)
def test_damaged_weights_are_refused_before_use(
    weights: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"SAE .*{message}"):
        load_sae(write(tmp_path, CFG, weights))


def test_a_scaling_factor_of_ones_and_a_log_threshold_are_older_spellings(tmp_path: Path) -> None:
    plain = load_sae(write(tmp_path, CFG))
    assert load_sae(write(tmp_path, CFG, tensors(scaling_factor=torch.ones(D_SAE)))).key == plain.key
    log_threshold = torch.linspace(-3, 1, D_SAE)
    spelled = load_sae(
        write(tmp_path, {**CFG, "architecture": "jumprelu"}, tensors(log_threshold=log_threshold))
    )
    torch.testing.assert_close(spelled.encoder.threshold_F, log_threshold.exp())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(CFG))
    for name in ("sae_weights.pt", "sae_weights.bin", "ae.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"a folder with sae_weights.safetensors, .* safetensors alone"):
        load_sae(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_sae(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_torn_or_foreign_file_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    file = write(folder, CFG) / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=rf"{name} is not (JSON|a whole safetensors file) \(.*\); get it again"
    ):
        load_sae(folder)
    elsewhere = tmp_path / name
    elsewhere.write_bytes(whole)
    file.unlink()
    file.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=rf"{name} must be a file inside its folder"):
        load_sae(folder)
    file.unlink()
    with pytest.raises(ValueError, match=f"sae.path must be a folder with {name}"):
        load_sae(folder)


def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cfg.json must be a JSON object, got 'list'"):
        load_sae(write(tmp_path, [CFG]))
    (tmp_path / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"cfg.json is not JSON"):
        load_sae(tmp_path)


def test_a_hook_fills_in_a_configuration_that_names_none(tmp_path: Path) -> None:
    unnamed = write(tmp_path, about(hook_name=None))
    assert load_sae(unnamed, hook_name="model.layers.7").hook_name == "blocks.7.hook_resid_post"
    with pytest.raises(ValueError, match=r"sae.hook_name must be blocks.L.hook_resid_pre"):
        load_sae(unnamed, hook_name="blocks.7.mlp")
    named = write(tmp_path, CFG)
    assert load_sae(named, hook_name="blocks.4.hook_resid_pre").hook_name == "blocks.3.hook_resid_post"
    with pytest.raises(
        ValueError, match=r"sae.hook_name must be blocks.3.hook_resid_post, .* drop sae.hook_name"
    ):
        load_sae(named, hook_name="blocks.4.hook_resid_post")
    assert load_sae(write(tmp_path, about(hook_name=None, hf_hook_name="model.layers.5"))).hook_layer == 5


@given(layer=st.integers(0, 9999), point=st.sampled_from(["pre", "post"]))
def test_hooks_are_read_back(layer: int, point: str) -> None:
    hook = parse_hook(f"blocks.{layer}.hook_resid_{point}")
    assert parse_hook(hook.name) == hook
    assert (hook.layer, hook.point, hook.depth) == (layer, f"resid_{point}", layer + (point == "post"))
    assert parse_hook(f"model.layers.{layer}") == parse_hook(f"model.layers.{layer}.output")
    assert parse_hook(f"model.layers.{layer}.input").depth == layer


@given(st.text())
def test_no_other_text_is_a_hook(text: str) -> None:
    with pytest.raises(ValueError, match="hook_name must be"):
        parse_hook(text)
    with pytest.raises(ValueError, match="hook_name must be"):
        parse_hook(f"blocks.3.hook_resid_post{text or '.'}")
