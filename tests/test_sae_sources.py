"""Old configurations, releases and stored dtypes load as sae-lens loads them; the key names the meaning."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from sae_oracle import HOOK, Case, assert_encodes_alike, residuals, sae_lens_sae, saved
from safetensors.torch import save_file

from ray_auditor.sae import load_sae


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_dtype_encode_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    from sae_lens import SAE

    case = Case("gated")
    sae = load_sae(saved(sae_lens_sae(case).to(dtype=dtype), tmp_path))
    assert sae.encoder.W_enc_DF.dtype == sae.encoder.b_enc_F.dtype == torch.float32
    theirs = SAE.load_from_disk(tmp_path, dtype="float32")
    assert assert_encodes_alike(sae, theirs, residuals(case)) == 0


OLD_TOPK = {
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 8},
    "hook_point": "blocks.3.hook_resid_pre",
    "hook_point_layer": 3,
    "hook_point_head_index": None,
    "normalize_activations": False,
    "sae_lens_training_version": "3.9.1",
    "d_in": 24,
    "d_sae": 120,
    "dtype": "torch.float32",
    "device": "cuda",
    "model_name": "old",
}


def old_folder(folder: Path, cfg: dict[str, Any], case: Case) -> str:
    sae_lens_sae(case).save_model(folder)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return str(folder)


def test_an_old_topk_configuration_stays_topk(tmp_path: Path) -> None:
    from sae_lens import SAE

    case = Case("topk")
    sae = load_sae(old_folder(tmp_path, OLD_TOPK, case))
    assert (sae.architecture, sae.encoder.max_active, sae.hook_point) == ("topk", 8, "resid_pre")
    assert sae.model_name == "old"
    theirs = SAE.load_from_disk(tmp_path)
    assert assert_encodes_alike(sae, theirs, residuals(case)) == 0


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_other_old_configurations_encode_as_sae_lens_does(kind: str, tmp_path: Path) -> None:
    from sae_lens import SAE

    case = Case(kind, apply_b_dec=False)
    cfg = {**OLD_TOPK, "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": False}
    sae = load_sae(old_folder(tmp_path, {**cfg, "architecture": kind}, case))
    assert assert_encodes_alike(sae, SAE.load_from_disk(tmp_path), residuals(case)) == 0


def cached(cache: Path, repo_id: str, folder_name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a repository as the hub client keeps it once it is downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40) / folder_name
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("release", "sae_id", "repo_id", "folder_name", "stored"),
    [
        pytest.param(
            "gemma-2b-res-jb",
            "blocks.12.hook_resid_post",
            "jbloom/Gemma-2b-Residual-Stream-SAEs",
            "gemma_2b_blocks.12.hook_resid_post_16384",
            "expected_average_only_in",
            id="scale-of-the-release",
        ),
        pytest.param(
            "mistral-7b-res-wg",
            "blocks.8.hook_resid_pre",
            "JoshEngels/Mistral-7B-Residual-Stream-SAEs",
            "mistral_7b_layer_8",
            "none",
            id="normalisation-of-the-release",
        ),
        pytest.param("some/repo", "layer/3", "some/repo", "layer/3", "layer_norm", id="repository"),
    ],
)
def test_a_release_encodes_as_sae_lens_loads_it(
    release: str,
    sae_id: str,
    repo_id: str,
    folder_name: str,
    stored: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sae_lens import SAE

    case = Case("standard", normalisation=stored)
    sae_lens_sae(case).save_model(cached(tmp_path, repo_id, folder_name, monkeypatch))
    sae = load_sae(None, release=release, sae_id=sae_id)
    theirs = SAE.from_pretrained(release, sae_id)
    assert assert_encodes_alike(sae, theirs, residuals(case)) == 0


def test_llama_scope_encodes_as_sae_lens_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens import SAE

    folder = cached(tmp_path, "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L3R-8x", monkeypatch)
    hyperparameters = {
        "d_model": 24,
        "d_sae": 120,
        "jump_relu_threshold": 0.5,
        "dataset_average_activation_norm": {"in": 172.0},
        "hook_point_in": HOOK,
    }
    (folder / "hyperparams.json").write_text(json.dumps(hyperparameters))
    theirs = sae_lens_sae(case := Case("standard"))
    (folder / "checkpoints").mkdir()
    weights = {
        "encoder.weight": theirs.W_enc.data.t().contiguous(),
        "encoder.bias": theirs.b_enc.data,
        "decoder.weight": theirs.W_dec.data.t().contiguous(),
        "decoder.bias": theirs.b_dec.data,
    }
    save_file(weights, folder / "checkpoints" / "final.safetensors")
    sae = load_sae(None, release="llama_scope_lxr_8x", sae_id="l3r_8x")
    theirs = SAE.from_pretrained("llama_scope_lxr_8x", "l3r_8x")
    assert sae.architecture == "jumprelu"
    assert assert_encodes_alike(sae, theirs, residuals(case)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": None}, "sae.path must be given where sae.release is not"),
        (
            {"path": "x", "release": "y", "sae_id": "z"},
            "sae.path must be given where sae.release is not, got 'x'",
        ),
        (
            {"path": "absent"},
            "sae.path must be a folder with cfg.json and sae_weights.safetensors, got 'absent'",
        ),
        ({"path": None, "release": "gemma-2b-res-jb"}, "sae.sae_id must be given with sae.release"),
        ({"path": None, "release": "nowhere", "sae_id": "x"}, "sae.release must be a release of sae-lens"),
        (
            {"path": None, "release": "gemma-2b-res-jb", "sae_id": "x"},
            "sae.sae_id must be an SAE of gemma-2b-res-jb",
        ),
        (
            {"path": None, "release": "no/such", "sae_id": "x"},
            "SAE no/such/x cannot be downloaded .* set sae.path",
        ),
    ],
)
def test_a_source_that_is_not_one_sae_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_sae(**arguments)


def test_a_release_of_pickles_is_refused_before_any_download() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    pickles = (
        "connor_rob_hook_z",
        "deepseek_r1",
        "dictionary_learning_1",
        "goodfire",
        "qwen_scope",
        "temporal",
    )
    for release, entry in get_pretrained_saes_directory().items():
        if entry.conversion_func in pickles or "transcoder" in str(entry.conversion_func):
            message = f"sae.release must be SAEs stored without pickles, .* got '{release}'"
            with pytest.raises(ValueError, match=message):
                load_sae(None, release=release, sae_id=next(iter(entry.saes_map)))


KEY = "import sys; from ray_auditor.sae import load_sae; print(load_sae(sys.argv[1]).key)"


@pytest.mark.parametrize(("kind", "bias"), [("topk rescaled", "b_enc"), ("gated", "b_mag")])
def test_the_key_is_the_same_on_another_machine(kind: str, bias: str, tmp_path: Path) -> None:
    """`b_dec @ W_enc` is nothing but rounding here, so that any other order of adding shows in the key."""
    theirs = sae_lens_sae(Case(kind, d_in=200, d_sae=300)).to(dtype=torch.float64)
    along_D = theirs.b_dec.data / theirs.b_dec.data.norm()
    theirs.W_enc.data -= torch.outer(along_D, along_D @ theirs.W_enc.data)
    getattr(theirs, bias).data.zero_()
    path = saved(theirs, tmp_path)
    key = load_sae(path).key
    assert len(bytes.fromhex(key)) == 32
    assert load_sae(path).key == key
    machine = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
    command = [sys.executable, "-c", KEY, path]
    other = subprocess.run(command, env={**os.environ, **machine}, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == key


def test_the_key_follows_meaning_and_nothing_else(tmp_path: Path) -> None:
    case = Case("topk")
    theirs = sae_lens_sae(case)
    path = tmp_path / "sae"
    first = load_sae(saved(theirs, path)).key
    cfg = json.loads((path / "cfg.json").read_text())

    def key_with(**changes: Any) -> str:
        about = {**cfg["metadata"], **changes.pop("metadata", {})}
        (path / "cfg.json").write_text(json.dumps({**cfg, **changes, "metadata": about}))
        return load_sae(path).key

    same = [key_with(metadata={"model_name": "x"}), key_with(metadata={"hook_name": "model.layers.3"})]
    assert same == [first, first]
    changed = [
        key_with(k=9),
        key_with(architecture="abstopk"),
        key_with(apply_b_dec_to_input=False),
        key_with(rescale_acts_by_decoder_norm=True),
        key_with(normalize_activations="layer_norm"),
        key_with(metadata={"hook_name": "blocks.4.hook_resid_post"}),
        load_sae(saved(sae_lens_sae(replace(case, seed=1)), tmp_path / "other")).key,
    ]
    assert len({first, *changed}) == 1 + len(changed)
